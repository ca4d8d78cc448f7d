"""Leaves out corpus crystals that are also in the datasets to exclude."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich
from rich.markup import escape

from crysdistill.overlap.exclusion import Exclusion, find_exclusion
from crysdistill.overlap.sides import Side, open_sides
from crysdistill.store.checks import (
    DatasetCheck,
    find_check,
    join_checks,
    read_checks,
)
from crysdistill.store.store import Store

EXCLUDED = "excluded.json"
"""A file in the run directory with the search's result, for a resumed run."""


@dataclass(frozen=True)
class Cleaned:
    """The remaining crystals of a corpus.

    Args:
        rows: the rows to learn from.
        checks: the datasets that were compared with the corpus.
        record: the result to keep for a resumed run; None if nothing was searched.
    """

    rows: np.ndarray
    checks: list[DatasetCheck]
    record: dict[str, Any] | None = None


def clean_rows(
    store: Store,
    exclude: Sequence[Path],
    kinds: Sequence[str],
    *,
    run: Path | None = None,
    progress: bool = False,
) -> Cleaned:
    """Return the crystals of a corpus that are not in the datasets to exclude.

    Args:
        store: the corpus.
        exclude: the datasets; anything that `build` reads.
        kinds: the kinds of pairs for which a crystal is left out.
        run: the directory of the run to resume. Its result is used again if corpus and
            datasets have not changed.
        progress: whether to show progress bars.

    Raises:
        InputError: a dataset cannot be read or is empty.
    """
    rows = np.arange(len(store))
    before = read_checks(store.facts)
    if not exclude:
        return Cleaned(rows, before)
    sides = []
    for side in open_sides(exclude, progress=progress):
        known = find_check(before, side.crystals.structures_hash)
        if known and not known.kept and set(kinds) <= set(known.kinds):
            rich.print(escape(f"{store.path} was built without {side.name}"))
        else:
            sides.append(side)
    identity = _identity(store, sides, kinds)
    found = _read(run, identity)
    if found is None:
        for side in sides:
            rich.print(escape(f"looking for crystals of {side.path} in {store.path}"))
        found = find_exclusion(store, sides, kinds=kinds, progress=progress)
    record = {"of": identity, "found": found.to_dict()}
    rows = np.setdiff1d(rows, list(found.rows))
    return Cleaned(rows, join_checks(before, found.checks), record)


def _identity(
    store: Store, sides: Sequence[Side], kinds: Sequence[str]
) -> dict[str, Any]:
    """Return all that a search's result depends on, as plain values."""
    return {
        "corpus": store.structures_hash,
        "datasets": [[side.name, side.crystals.structures_hash] for side in sides],
        "kinds": list(kinds),
    }


def _read(run: Path | None, identity: dict[str, Any]) -> Exclusion | None:
    """Return the result of an earlier run on the same data; None if there is none."""
    try:
        values = json.loads((run / EXCLUDED).read_bytes()) if run else {}
        if values.get("of") == identity:
            return Exclusion.from_dict(values["found"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # missing or damaged: search again
    return None
