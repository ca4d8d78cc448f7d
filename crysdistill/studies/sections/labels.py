"""Learning curves in labels: how many labels an arm saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from crysdistill.studies.exhibits import (
    Column,
    Exhibit,
    Picture,
    Section,
    exhibit,
    stem,
)
from crysdistill.studies.figures import labels_figure
from crysdistill.studies.numbers import number
from crysdistill.studies.statistics import label_efficiency, learning_exponents
from crysdistill.studies.statistics.results import records
from crysdistill.studies.tables import ResultGroup

_CLAIMS = 6


def learning_curves(
    groups: Sequence[ResultGroup], table: pd.DataFrame, reference: str
) -> Section | None:
    """Return the learning curves of one task; None for one number of labels.

    Args:
        groups: the groups of the task, labels ascending.
        table: the table from `check_results`.
        reference: the arm whose curve is the measure.
    """
    if len(groups) < 2:
        return None
    clear, left_out = _clear(groups)
    name = stem(groups[0].name)
    pictures = [Picture(f"labels-{name}", labels_figure(clear))]
    if any(row.changes for group in clear for row in group.rows):
        changes = labels_figure(clear, changes=True)
        pictures.append(Picture(f"labels-{name}-changes", changes))
    mine = table[
        (table["task"] == groups[0].task) & (table["target"] == groups[0].target)
    ]
    mine = mine[mine["condition"].isin([groups[0].condition, ""])]
    exhibits = [
        made
        for made in (
            _efficiency(label_efficiency(mine, reference), name, reference),
            _exponents(learning_exponents(mine, reference), name),
        )
        if made is not None
    ]
    note = "Mean over seeds; the band is the 95 % CI. The plot of changes leaves out "
    note += "arms that are far from all others."
    if left_out:
        note += f" The tables also have {', '.join(left_out)}."
    return Section(
        "How many labels it takes", exhibits=exhibits, pictures=pictures, after=note
    )


def _clear(
    groups: Sequence[ResultGroup],
) -> tuple[list[ResultGroup], list[str]]:
    """Return groups without the arms that would crowd a figure, and their names."""
    best = sorted(groups[-1].rows, key=lambda row: not row.reference)
    claims = [row.arm for row in best if not row.reference and not row.control]
    controls = [row.arm for row in best if row.control]
    reference = [row.arm for row in best if row.reference]
    kept = {*reference, *claims[:_CLAIMS], *controls[: max(1, _CLAIMS - len(claims))]}
    left = [row.arm for row in best if row.arm not in kept]
    return [
        replace(group, rows=tuple(row for row in group.rows if row.arm in kept))
        for group in groups
    ], left


def _efficiency(found: pd.DataFrame, name: str, reference: str) -> Exhibit | None:
    """Return the factors of each arm, a column for each number of labels."""
    if found.empty:
        return None
    least, most = found["labels"].min(), found["labels"].max()
    sizes = sorted(found["labels"].unique())
    texts = []
    for arm, part in found.groupby("arm", sort=False):
        rows = {row["labels"]: row for row in records(part)}
        texts.append([arm, *(_factor(rows, n, (least, most)) for n in sizes)])
    shown = pd.DataFrame(
        texts, columns=["Arm", *(f"{n:,} labels" for n in sizes)], dtype=object
    )
    text = f"How many times as many labels {reference} needs for the same error"
    return Exhibit(f"label-efficiency-{name}", text, found, shown)


def _factor(
    rows: dict[int, dict[str, Any]], labels: int, tried: tuple[int, int]
) -> str:
    """Return a factor with its interval; the curve ends at the labels that were tried.

    Args:
        rows: of one arm, by number of labels.
        labels: the number of labels.
        tried: the fewest and the most labels of the study.
    """
    if labels not in rows:
        return "–"
    row = rows[labels]

    def said(value: float) -> str:
        if math.isinf(value):
            return f"> {number(tried[1] / labels, 1)}"
        return number(value, 1) if value else f"< {number(tried[0] / labels, 1)}"

    if math.isnan(row["low"]) or row["seeds"] < 2:
        return said(row["factor"])
    ends = [said(row["low"]), said(row["high"])]
    if ends[0] == ends[1]:
        return said(row["factor"])
    return f"{said(row['factor'])} ({' to '.join(ends)})"


def _exponents(found: pd.DataFrame, name: str) -> Exhibit | None:
    if found.empty:
        return None
    floor = bool(found["c"].notna().any())
    columns = [
        Column("Arm", lambda r: r["arm"]),
        Column("Exponent b", lambda r: number(r["b"], 2)),
        Column(
            "95 % CI",
            lambda r: (
                f"{number(r['b_low'], 2)} to {number(r['b_high'], 2)}"
                if math.isfinite(r["b_low"])
                else "–"
            ),
        ),
    ]
    if floor:
        columns += [
            Column("b with a floor", lambda r: number(r["b_floor"], 2)),
            Column("Floor c", lambda r: f"{r['c']:.3g}"),
        ]
    text = "Learning curves: error = a n^-b for n labels"
    text += "; with a floor, error = a n^-b + c" if floor else ""
    return exhibit(f"exponents-{name}", text, records(found), columns)
