"""Predictions crystal by crystal: parity, the largest errors, published models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from crysdistill.studies import figures
from crysdistill.studies.exhibits import (
    Column,
    Exhibit,
    Picture,
    Section,
    exhibit,
    stem,
)
from crysdistill.studies.needs import need
from crysdistill.studies.numbers import number, p_text, span
from crysdistill.studies.sections.crystals import (
    DISTANCES,
    error_by_distance,
    error_by_element,
    error_by_system,
)
from crysdistill.studies.statistics import compare_published
from crysdistill.studies.statistics.results import records
from crysdistill.studies.tables import ResultGroup


def predictions_sections(
    predictions: pd.DataFrame,
    groups: Sequence[ResultGroup],
    crystals: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
) -> list[Section]:
    """Return one section for each task: the reference and the best arm.

    Args:
        predictions: test predictions: columns `arm, seed, material_id, target,
            prediction, truth`; also `task` and `labels` if there are several, and
            `distance` to the nearest training crystal and `corpus_distance` to the
            nearest crystal of the corpus if they are known.
        groups: the groups from `result_groups`.
        crystals: columns `material_id, elements, system`, and `task` if the tasks have
            different datasets: atomic numbers and crystal system of test crystals.
        published: the table from `read_published`.
    """
    columns = ["arm", "seed", "material_id", "target", "prediction", "truth"]
    need(predictions, "predictions", columns)
    numbers_ = predictions[["prediction", "truth"]].astype(float)
    table = predictions.loc[pd.Series(np.isfinite(numbers_).all(axis=1))]
    sections = [_section(table, one, crystals, published) for one in tasks_of(groups)]
    return [section for section in sections if section is not None]


def tasks_of(groups: Sequence[ResultGroup]) -> list[list[ResultGroup]]:
    """Return the groups of each task, which differ in their numbers of labels."""
    tasks: dict[Any, list[ResultGroup]] = {}
    for group in groups:
        tasks.setdefault(group.key, []).append(group)
    return list(tasks.values())


class Judged(NamedTuple):
    """The predictions of a task with the largest training set that has any.

    Args:
        part: the predictions.
        group: the group with that number of labels.
        known: whether the predictions say their number of labels.
    """

    part: pd.DataFrame
    group: ResultGroup
    known: bool


def judged_part(predictions: pd.DataFrame, groups: Sequence[ResultGroup]) -> Judged:
    """Return the predictions to show of a task.

    Args:
        predictions: see `predictions_sections`.
        groups: those of one task.
    """
    first = groups[0]
    mask = predictions["target"].astype(str) == first.target
    if "task" in predictions:
        mask &= predictions["task"].astype(str) == first.task
    if "condition" in predictions:
        mask &= predictions["condition"].isin([first.condition, ""])
    part = predictions.loc[mask]
    known = [
        group
        for group in groups
        if "labels" in part and (part["labels"] == group.labels).any()
    ]
    group = (known or groups)[-1]
    if known:
        part = part[part["labels"] == group.labels]
    return Judged(part, group, bool(known))


def _section(
    predictions: pd.DataFrame,
    groups: Sequence[ResultGroup],
    crystals: pd.DataFrame | None,
    published: pd.DataFrame | None,
) -> Section | None:
    part, group, known = judged_part(predictions, groups)
    rows = [row for row in (group.reference, group.best) if row is not None]
    arms = [row.arm for row in rows if (part["arm"] == row.arm).any()]
    arms = arms or list(part["arm"].unique()[:2])
    if not arms:
        return None
    parts = {arm: part[part["arm"] == arm] for arm in arms}
    best, name = arms[-1], stem(group.name)
    said = known or len(groups) == 1
    labels = f", {group.labels:,} training labels" if said else ""
    exhibits: list[Exhibit | None] = []
    pictures: list[Picture | None] = []
    if group.metric == "auc":
        for arm, found in parts.items():
            picture = figures.roc_figure(found, arm)
            pictures.append(Picture(stem("roc", name, arm), picture))
    elif group.metric == "mae":
        pictures += _parity(parts, group)
        exhibits.append(_worst(parts[best], group, best))
        if crystals is not None:
            mine = crystals
            if "task" in crystals:
                mine = crystals[crystals["task"] == group.task]
            elements = error_by_element(parts[best], mine, group, best)
            systems = error_by_system(parts, mine, group)
            pictures += [elements.picture, systems.picture]
            exhibits += [elements.exhibit, systems.exhibit]
        exhibits += [error_by_distance(parts, group, to) for to in DISTANCES]
        if published is not None:
            exhibits.append(_published(parts[best], published, group, best))
    return Section(
        f"Predictions: {group.title}",
        note=f"Test crystals of all seeds{labels}.",
        exhibits=[made for made in exhibits if made is not None],
        pictures=[made for made in pictures if made is not None],
    )


def _parity(parts: Mapping[str, pd.DataFrame], group: ResultGroup) -> list[Picture]:
    """Return predictions against truth, of all arms within the same limits."""
    table = pd.concat(list(parts.values()))
    ends = table[["prediction", "truth"]].to_numpy(float)
    margin = 0.04 * (float(np.ptp(ends)) or 1.0)
    limits = float(ends.min()) - margin, float(ends.max()) + margin
    reference = group.reference.arm if group.reference else None
    return [
        Picture(
            stem("parity", group.name, arm),
            figures.parity_figure(part, arm, group.unit, limits, arm == reference),
        )
        for arm, part in parts.items()
    ]


def _worst(
    predictions: pd.DataFrame, group: ResultGroup, arm: str, count: int = 5
) -> Exhibit:
    """Return the crystals with the largest mean error over the seeds that test them."""
    table = predictions.assign(
        error=(predictions["prediction"] - predictions["truth"]).astype(float)
    )
    mean = table.groupby("material_id")[["truth", "prediction", "error"]].mean()
    mean["seeds"] = table.groupby("material_id").size()
    order = mean["error"].abs().sort_values(ascending=False).index[:count]
    rows = [{"material_id": name, **mean.loc[name].to_dict()} for name in order]
    unit = f" ({group.unit})" if group.unit else ""

    def column(head: str, key: str) -> Column:
        return Column(head, lambda r: number(r[key], group.decimals))

    return exhibit(
        stem("largest-errors", group.name),
        f"Largest errors of {arm}",
        rows,
        [
            Column("Material", lambda r: str(r["material_id"])),
            column("Truth", "truth"),
            column("Prediction", "prediction"),
            column(f"Error{unit}", "error"),
            Column("Seeds", lambda r: str(int(r["seeds"]))),
        ],
    )


def _published(
    predictions: pd.DataFrame, published: pd.DataFrame, group: ResultGroup, arm: str
) -> Exhibit | None:
    """Return the arm beside published models, on the crystals that both predict."""
    found = compare_published(predictions, published)
    if found.empty:
        return None
    unit = f" ({group.unit})" if group.unit else ""
    decimals = group.decimals

    def tone(row: Mapping[str, Any]) -> str:
        if not row["p_holm"] < 0.05:
            return "none"
        return "better" if row["difference"] < 0 else "worse"

    return exhibit(
        stem("published", group.name),
        f"{arm} beside published predictions, paired by crystal",
        records(found),
        [
            Column("Model", lambda r: r["model"]),
            Column("Crystals", lambda r: f"{r['crystals']:,}"),
            Column(f"MAE of {arm}{unit}", lambda r: number(r["mae"], decimals)),
            Column("Published MAE", lambda r: number(r["published_mae"], decimals)),
            Column(
                "Difference, 95 % CI",
                lambda r: (
                    f"{number(r['difference'], decimals)} "
                    f"({span((r['ci_low'], r['ci_high']), decimals)})"
                ),
            ),
            Column("Closer on", lambda r: f"{100 * r['ahead']:.0f} %"),
            Column("p (Wilcoxon, Holm)", lambda r: p_text(r["p_holm"])),
        ],
        tone=tone,
    )
