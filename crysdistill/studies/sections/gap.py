"""How much of the gap between scratch and the teacher a distilled student closes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from crysdistill.studies.exhibits import Column, Picture, Section, exhibit
from crysdistill.studies.forest import Change, forest_figure
from crysdistill.studies.numbers import counted, percent, span
from crysdistill.studies.statistics import common_values, gap_closed
from crysdistill.studies.statistics.results import as_texts, axes, runs_of
from crysdistill.studies.tables import ResultGroup, ResultRow

NO_GAP = "no gap shown"

_TEACHER = "finetuned"  # if the study has it: the teacher itself, all of it learning


def share_of_gap(
    groups: Sequence[ResultGroup], table: pd.DataFrame, roles: Mapping[str, str]
) -> Section | None:
    """Return the share of each student; None without a student, teacher or reference.

    Args:
        groups: the groups from `result_groups`.
        table: the table from `check_results`.
        roles: `student` or `teacher`, by the method of an arm; see `Arm.role`.
    """
    rows = [row for group in groups for row in _rows(group, table, roles)]
    if not rows:
        return None
    scratch = next(group.reference.arm for group in groups if group.reference)
    teachers = " or ".join(dict.fromkeys(row["teacher"] for row in rows))
    columns = [
        Column("Task", lambda r: f"{r['task']}, {r['labels']:,} labels"),
        Column("Student", lambda r: r["student"], word=True),
        Column("Teacher (%)", lambda r: percent(r["gap"])),
        Column("Closed (%)", _closed),
        Column("95 % CI", lambda r: span((r["low"], r["high"]), 1)),
        Column("Seeds", lambda r: str(r["seeds"])),
    ]
    known = [row for row in rows if math.isfinite(row["low"])]
    drawn = [
        Change(
            f"{row['task']}, {row['labels']:,} labels", row["student"], row["closed"],
            (row["low"], row["high"]),
        )
        for row in known
    ]  # fmt: skip
    title = f"closed of the gap between {scratch} and {teachers} (%)"
    judged = [row for row in rows if row["seeds"] > 1]
    left = len(judged) - len(known)
    said = []
    if left:
        said.append(
            f"In {left} of {counted(len(judged), 'case')} the teacher is not shown to "
            f"be better than {scratch} (95 % interval): there is no gap to close."
        )
    if len(judged) < len(rows):
        said.append("One seed gives no interval, and so no share; run at least three.")
    return Section(
        "Gap to the teacher that distillation closes",
        note=f"The teacher is {teachers}: the weights that teach the student, used for "
        f"the task themselves and given the same labels. The gap is what it gains over "
        f"{scratch}; a student that closes 100 % of it is as good as its teacher. "
        "“Teacher” is its change against "
        f"{scratch}. Intervals are Fieller's, over the seeds that all three have.",
        said=said,
        exhibits=[
            exhibit("gap-closed", "Share of the gap that is closed", rows, columns)
        ],
        pictures=[Picture("gap-closed", forest_figure(drawn, title))] if drawn else [],
    )


def _rows(
    group: ResultGroup, table: pd.DataFrame, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    reference = group.reference
    if reference is None:
        return []
    runs, found = runs_of(table, group), []
    for student in (row for row in group.rows if roles.get(row.method) == "student"):
        teacher = _teacher(student, group, runs, roles)
        if teacher is None:
            continue
        names = (reference.arm, student.arm, teacher.arm)
        values = common_values(runs, names)
        if not len(values[0]):
            continue
        sign = -1.0 if group.higher else 1.0  # errors, which fall
        alone, taught, best = (sign * one for one in values)
        share = gap_closed(alone, taught, best, ratio=student.ratio)
        gap = float((values[2] - values[0]).mean() / abs(values[0].mean()))
        known = math.isfinite(share.interval.low)
        found.append(
            {
                "task": group.name, "labels": group.labels, "metric": group.metric,
                "student": student.arm, "teacher": teacher.arm, "gap": 100 * gap,
                "closed": 100 * share.value if known else math.nan,
                "low": 100 * share.interval.low, "high": 100 * share.interval.high,
                "seeds": len(values[0]),
            }
        )  # fmt: skip
    return found


def _teacher(
    student: ResultRow, group: ResultGroup, runs: pd.DataFrame, roles: Mapping[str, str]
) -> ResultRow | None:
    """Return the arm of the student's own teacher; its values choose nothing.

    It must have the same weights. Fine-tuned weights come before frozen ones, and
    before those with other settings than the student's.
    """
    first = runs.drop_duplicates("arm").set_index("arm")
    texts = {axis: as_texts(first[axis]) for axis in axes(runs)}
    own = {axis: values[student.arm] for axis, values in texts.items()}

    def rank(row: ResultRow) -> tuple[Any, ...]:
        other = [axis for axis in texts if texts[axis][row.arm] != own[axis]]
        return row.control, row.method != _TEACHER, len(other), order.index(row.arm)

    order = list(first.index)
    same = texts.get("weights")
    found = [
        row
        for row in group.rows
        if roles.get(row.method) == "teacher" and row.n
        and (same is None or same[row.arm] == own["weights"])
    ]  # fmt: skip
    return min(found, key=rank, default=None)


def _closed(row: Mapping[str, Any]) -> str:
    if math.isfinite(row["closed"]):
        return percent(row["closed"]).lstrip("+")
    return NO_GAP if row["seeds"] > 1 else "one seed"
