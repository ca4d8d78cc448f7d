"""What the arms cost, and which runs failed."""

from __future__ import annotations

from typing import Any

import pandas as pd

from crysdistill.studies.exhibits import Column, Section, exhibit
from crysdistill.studies.numbers import counted
from crysdistill.studies.statistics.results import records


def costs(table: pd.DataFrame) -> Section | None:
    """Return the processor time of each arm; None if it was not measured.

    Args:
        table: the table from `check_results`.
    """
    known = table[table["processor"].notna()]
    if known.empty:
        return None
    rows = []
    for arm, part in known.groupby("arm", sort=False):
        seconds = part["processor"]
        numbers = {"runs": len(part), "mean": seconds.mean(), "total": seconds.sum()}
        rows.append({"arm": arm, **numbers})
    total = known["processor"].sum()
    columns = [
        Column("Arm", lambda r: r["arm"]),
        Column("Runs", lambda r: f"{r['runs']:,}"),
        Column("Processor time of a run", lambda r: duration(r["mean"])),
        Column("All runs", lambda r: duration(r["total"])),
    ]
    return Section(
        "What it cost",
        note=f"Processor time of {counted(len(known), 'run')}, {duration(total)} in "
        "all. Pretraining is not included.",
        exhibits=[exhibit("costs", "Processor seconds of each arm", rows, columns)],
    )


def failures(results: pd.DataFrame) -> Section | None:
    """Return the runs that failed, with their errors; None if there are none.

    Args:
        results: the results as the study wrote them.
    """
    if "error" not in results:
        return None
    failed = results[results["error"].fillna("").astype(str) != ""]
    if failed.empty:
        return None
    known = ("arm", "task", "target", "labels", "seed", "fold", "run", "error")
    names = [n for n in known if n in failed and failed[n].notna().any()]
    rows: list[dict[str, Any]] = records(failed[names])
    columns = [Column("Arm", lambda r: str(r["arm"]))]
    for name in names[1:]:
        head = name.capitalize()
        columns.append(Column(head, _text_of(name), word=name in ("run", "error")))
    return Section(
        "Runs that failed",
        note="The tables above leave them out.",
        said=[f"{counted(len(failed), 'run')} of {len(results):,} failed."],
        exhibits=[exhibit("failed", "Runs that failed", rows, columns)],
    )


def _text_of(name: str) -> Any:
    def text(row: dict[str, Any]) -> str:
        value = row[name]
        if value is None or value != value:
            return "–"
        return f"{value:g}" if isinstance(value, float) else str(value)

    return text


def duration(seconds: float) -> str:
    """Return a duration in words: `1 h 2 min 3 s`."""
    if 0 < seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"
