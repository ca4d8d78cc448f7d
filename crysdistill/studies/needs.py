"""Which columns a table must have."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from crysdistill.errors import InputError


def need(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    """Refuse a table without some columns.

    Args:
        table: the table.
        name: its name.
        columns: the columns that it must have.

    Raises:
        InputError: one is missing.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        names = " and ".join(f"`{column}`" for column in missing)
        verb = "lack" if name.endswith("s") else "lacks"
        raise InputError(
            f"the {name} {verb} {names}; needed are the columns {', '.join(columns)}"
        )
