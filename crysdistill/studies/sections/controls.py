"""The gain of the best arm against every control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from crysdistill.studies.exhibits import Column, Picture, Section, exhibit, stem
from crysdistill.studies.forest import Change, forest_figure
from crysdistill.studies.numbers import p_text, percent, percent_span
from crysdistill.studies.statistics import BETTER, WORSE, higher_is_better, holm
from crysdistill.studies.statistics.arms import paired_values
from crysdistill.studies.statistics.paired import compare_pairs
from crysdistill.studies.statistics.results import runs_of
from crysdistill.studies.tables import ResultGroup

_PICTURES = 8


def gains(groups: Sequence[ResultGroup], table: pd.DataFrame) -> Section | None:
    """Return the best arm against each control; None if there is no control.

    Args:
        groups: those to show, from `result_groups`.
        table: the table from `check_results`.
    """
    rows: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    for group in groups:
        found = _against_controls(group, table)
        rows += found
        drawn = [
            Change(
                f"against {row['control']}",
                "",
                row["change"],
                (row["change_low"], row["change_high"]),
                _tone(row),
            )
            for row in found
            if np.isfinite(row["change"])
        ]
        if drawn and len(pictures) < _PICTURES:
            best = found[0]["arm"]
            title = f"{group.name}, {group.labels:,} labels: change of {best} (%)"
            name = stem("controls", group.name, group.labels)
            pictures.append(Picture(name, forest_figure(drawn, title)))
    if not rows:
        return None
    several = len({(row["task"], row["labels"]) for row in rows}) > 1
    task = [Column("Task", lambda r: f"{r['task']}, {r['labels']:,} labels")]
    columns = [
        *(task if several else []),
        Column("Arm", lambda r: r["arm"], word=True),
        Column("Control", lambda r: r["control"], word=True),
        Column("Change (%)", lambda r: percent(r["change"])),
        Column("95 % CI", lambda r: percent_span((r["change_low"], r["change_high"]))),
        Column("p (Holm)", lambda r: p_text(r["p_holm"])),
        Column("Verdict", _said, word=True),
    ]
    return Section(
        "Gain against controls",
        note="Changes of the best arm, paired by seed, against arms that learn from "
        "no pretraining, from a teacher that knows nothing, or without a network. A "
        "gain that a control shows too does not come from pretraining.",
        exhibits=[
            exhibit(
                "controls",
                "The best arm of each task against every control",
                rows,
                columns,
                tone=_tone,
            )
        ],
        pictures=pictures,
    )


def _against_controls(group: ResultGroup, table: pd.DataFrame) -> list[dict[str, Any]]:
    best = group.best
    controls = [row.arm for row in group.rows if (row.control or row.reference)]
    if best is None or not any(row.control for row in group.rows):
        return []
    runs = runs_of(table, group)
    higher = higher_is_better(group.metric)
    found = []
    for control in controls:
        mine, other = paired_values(runs, best.arm, control)
        if not len(mine):
            continue
        pair = compare_pairs(mine, other, higher, ratio=best.ratio)
        head = {"task": group.name, "labels": group.labels, "metric": group.metric}
        found.append({**head, "arm": best.arm, "control": control, **pair})
    for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = p
    return found


def _tone(row: dict[str, Any] | Any) -> str:
    if row["verdict"] not in (BETTER, WORSE):
        return "none"
    return str(row["verdict"]) if row["p_holm"] < 0.05 else "unsure"


def _said(row: dict[str, Any]) -> str:
    unsure = _tone(row) == "unsure"
    return f"{row['verdict']}, not after Holm" if unsure else str(row["verdict"])
