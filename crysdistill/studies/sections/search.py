"""What the search of settings tried and chose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import pandas as pd

from crysdistill.studies.exhibits import Column, Section, exhibit
from crysdistill.studies.numbers import counted

SHARED = "All arms share their settings; there was no search."


def searched(table: pd.DataFrame, tune: Mapping[str, Any] | None) -> Section | None:
    """Return the settings that were chosen for each run; None without a search.

    Args:
        table: the table from `check_results`.
        tune: `trials`, `folds`, `keys`, and `chosen`, which holds the settings by the
            folder of the run.
    """
    if not tune or not tune.get("chosen"):
        return None
    chosen = {PurePath(run).name: found for run, found in tune["chosen"].items()}
    rows: list[dict[str, Any]] = []
    for row in table.itertuples():
        found = chosen.get(PurePath(str(row.run)).name)
        if found:
            about = {"arm": row.arm, "task": row.task, "labels": row.labels}
            rows.append({**about, "seed": row.seed, **found})
    if not rows:
        return None
    keys = list(dict.fromkeys(key for found in chosen.values() for key in found))
    columns = [
        Column("Arm", lambda r: str(r["arm"])),
        Column("Task", lambda r: str(r["task"]), word=True),
        Column("Labels", lambda r: f"{r['labels']:,}"),
        Column("Seed", lambda r: str(r["seed"])),
        *(Column(key, _text(key)) for key in keys),
    ]
    return Section(
        "What the search chose",
        note=f"{counted(int(tune.get('trials', 0)), 'trial')} for every arm, task and "
        "number of labels, inside the training part.",
        exhibits=[exhibit("searched", "Chosen settings of each run", rows, columns)],
    )


def _text(key: str) -> Any:
    def text(row: Mapping[str, Any]) -> str:
        value = row.get(key, "–")
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return text
