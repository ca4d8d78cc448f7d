"""Courses over epochs: of the training runs, and of pretraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from crysdistill.studies import figures
from crysdistill.studies.exhibits import Picture, Section, stem
from crysdistill.studies.needs import need
from crysdistill.studies.tables import ResultGroup


def training_curves(
    curves: pd.DataFrame, groups: Sequence[ResultGroup], reference: str
) -> Section:
    """Return one picture for each number that the runs logged.

    Args:
        curves: columns `run`, `epoch`, `train_loss` and validation numbers; also `arm`
            if the names of the runs do not begin with it, and `task`.
        groups: the groups from `result_groups`.
        reference: the arm in the neutral colour.
    """
    need(curves, "curves", ["run", "epoch"])
    table = curves.copy()
    if "arm" not in table:
        arms = sorted({r.arm for g in groups for r in g.rows}, key=len, reverse=True)
        names = {
            run: next((arm for arm in arms if str(run).startswith(arm)), str(run))
            for run in table["run"].unique()
        }
        table["arm"] = table["run"].map(names)
    tasks = table["task"].unique() if "task" in table else [""]
    pictures = []
    for task in tasks:
        mine = table[table["task"] == task] if "task" in table else table
        columns = [
            str(name)
            for name in mine.select_dtypes("number").columns
            if str(name).startswith(("train_", "val_")) and mine[name].notna().any()
        ]
        columns.sort(key=lambda name: name != "train_loss")
        if len(tasks) > 1:  # of many tasks, only what chose the epoch
            chosen = [name for name in columns if name.startswith("val_")]
            columns = [name for name in chosen if name != "val_loss"][:1] or columns[:1]
        about = f"{task}: " if len(tasks) > 1 else ""
        for name in columns:
            picture = figures.curves_figure(mine, name, reference, about)
            pictures.append(Picture(stem("training", task, name), picture))
    return Section(
        "Training curves",
        note="Thin lines are runs; thick lines are means over the runs of an arm. With "
        "many runs, only the means are shown.",
        pictures=pictures,
    )


def pretraining(table: pd.DataFrame) -> dict[str, Any]:
    """Return the pretraining numbers, each beside its chance level.

    Args:
        table: the column `epoch` and a column for each number on held-out crystals;
            `x_chance` holds the chance level of `x`.
    """
    need(table, "pretraining table", ["epoch"])
    ordered = table.sort_values("epoch")
    rows = []
    for name in ordered.columns:
        skip = name in ("epoch", "step") or str(name).endswith("_chance")
        skip |= str(name).startswith("lr")  # the learning-rate schedule
        values = pd.to_numeric(ordered[name], errors="coerce").to_numpy(float)
        values = values[np.isfinite(values)]
        if skip or not len(values):
            continue
        chance = math.nan
        if f"{name}_chance" in ordered:
            known = pd.to_numeric(ordered[f"{name}_chance"], errors="coerce").dropna()
            chance = float(known.iloc[-1]) if len(known) else math.nan
        curve = figures.sparkline(values, chance) if len(values) > 1 else None
        row = {"name": str(name).replace("_", " "), "first": values[0]}
        row |= {"last": values[-1], "chance": chance, "curve": curve}
        rows.append({**row, "above": values[-1] > chance, "epochs": len(values)})
    rows.sort(key=lambda row: math.isnan(row["chance"]))  # first those with a chance
    return {"rows": rows, "epochs": ordered["epoch"].nunique()}
