"""The overview: every arm on every task, and the tests over tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from crysdistill.studies.exhibits import Column, Exhibit, Picture, Section, exhibit
from crysdistill.studies.forest import Change, forest_figure
from crysdistill.studies.numbers import number, p_text, percent, percent_span
from crysdistill.studies.statistics import MARGIN, compare_paired, over_tasks
from crysdistill.studies.statistics.results import records
from crysdistill.studies.tables import ResultGroup, ResultRow, metric_name

_COLUMNS = 6  # more would not fit; then each task has one number of labels
_SERIES = 6


def overview(
    groups: Sequence[ResultGroup], table: pd.DataFrame, reference: str
) -> Section | None:
    """Return the changes of all arms on all tasks; None for a single comparison.

    Args:
        groups: the groups from `result_groups`.
        table: the table from `check_results`.
        reference: the arm that the others are compared with.
    """
    if len(groups) < 2 or not any(group.reference for group in groups):
        return None
    shown = list(groups) if len(groups) <= _COLUMNS else fullest(groups)
    arms = _arms(shown)
    rows = [_row(arm, shown) for arm in arms]
    tones = {
        (i, j + 1): row.tone
        for i, arm in enumerate(arms)
        for j, group in enumerate(shown)
        if (row := _find(group, arm)) is not None
    }
    texts = pd.DataFrame(
        [[arm, *(_cell(_find(group, arm), group) for group in shown)] for arm in arms],
        columns=["Arm", *_heads(shown)],
        dtype=object,
    )
    title = f"Change of the error of each arm against {reference}, in percent"
    if len({group.labels for group in shown}) == 1:
        title += f", with {shown[0].labels:,} labels"
    tests = records(over_tasks(compare_paired(table, reference)))
    # An arm that only other numbers of labels have comes last.
    places = {arm: place for place, arm in enumerate(arms)}
    tests.sort(key=lambda row: places.get(row["arm"], len(arms)))
    return Section(
        "Overview",
        note=f"Change against {reference} in percent, with its 95 % interval; the row "
        f"of {reference} has its own value. A star marks changes that hold after "
        "Holm's correction for all comparisons of the arm.",
        exhibits=[
            Exhibit("overview", title, pd.DataFrame(rows), texts, tones),
            _tests(tests, reference),
        ],
        pictures=_pictures(shown, arms),
        after="Arms are sorted by their mean change. Wilcoxon's test has one value "
        "for each task, so few tasks cannot give a small p value.",
    )


def fullest(groups: Sequence[ResultGroup]) -> list[ResultGroup]:
    """Return of each task the group with the most arms, and the most labels of these.

    A study may run some arms with a few numbers of labels only.
    """
    found: dict[tuple[str, ...], ResultGroup] = {}
    for group in sorted(groups, key=lambda g: (_arms_of(g), g.labels)):
        found[group.key] = group
    return [found[key] for key in dict.fromkeys(group.key for group in groups)]


def _arms_of(group: ResultGroup) -> int:
    return sum(row.n > 0 for row in group.rows)


def _arms(groups: Sequence[ResultGroup]) -> list[str]:
    """Return the arms, the reference first, then by their mean change."""
    changes: dict[str, list[float]] = {}
    for group in groups:
        sign = -1 if group.higher else 1
        for row in group.rows:
            found = changes.setdefault(row.arm, [])
            if math.isfinite(row.change):
                found.append(sign * row.change)
    reference = {row.arm for group in groups for row in group.rows if row.reference}

    def order(arm: str) -> tuple[bool, float]:
        known = changes[arm]
        return arm not in reference, sum(known) / len(known) if known else math.inf

    return sorted(changes, key=order)


def _heads(groups: Sequence[ResultGroup]) -> list[str]:
    """Return the names of groups, with their labels where these differ."""
    if len({group.labels for group in groups}) == 1:
        return [group.name for group in groups]
    return [f"{group.name}, {group.labels:,} labels" for group in groups]


def _find(group: ResultGroup, arm: str) -> ResultRow | None:
    return next((row for row in group.rows if row.arm == arm), None)


def _row(arm: str, groups: Sequence[ResultGroup]) -> dict[str, Any]:
    """Return the numbers of an arm, for the file."""
    found: dict[str, Any] = {"arm": arm}
    for group in groups:
        row = _find(group, arm)
        if row is None:
            continue
        head = f"{group.name} {group.labels}"
        found[f"{head} {group.metric}"] = row.mean
        found[f"{head} change"] = row.change
        found[f"{head} low"], found[f"{head} high"] = row.change_interval
        found[f"{head} p"] = row.p_tasks
    return found


def _cell(row: ResultRow | None, group: ResultGroup) -> str:
    if row is None or not row.n:
        return "–"
    if row.reference:
        name = metric_name(group.metric)
        return f"{name} {number(row.mean, group.decimals)} {group.unit}".rstrip()
    star = "*" if row.p_tasks < 0.05 else ""
    ends = percent_span(row.change_interval)
    return f"{percent(row.change)}{star}" + (f" ({ends})" if ends != "–" else "")


def _tests(rows: Sequence[dict[str, Any]], reference: str) -> Exhibit:
    bound = f"no worse than {100 * MARGIN:g} %"
    return exhibit(
        "over-tasks",
        f"All comparisons of each arm with {reference}, after Holm's correction",
        rows,
        [
            Column("Arm", lambda r: r["arm"]),
            Column(
                "Better / same / worse",
                lambda r: f"{r['wins']} / {r['ties']} / {r['losses']}",
            ),
            Column(bound, lambda r: f"{r['no_worse']} of {r['comparisons']}"),
            Column("Tasks ahead", lambda r: f"{r['ahead']} of {r['tasks']}"),
            Column("Mean change (%)", lambda r: percent(r["change"])),
            Column(
                "Wilcoxon p (smallest possible)",
                lambda r: (
                    f"{p_text(r['p_wilcoxon'])} ({p_text(r['p_smallest'])})"
                    if math.isfinite(r["p_wilcoxon"])
                    else "–"
                ),
            ),
        ],
    )


def _pictures(groups: Sequence[ResultGroup], arms: Sequence[str]) -> list[Picture]:
    """Return changes of all arms, a few tasks in one figure."""
    pictures = []
    heads = dict(zip(map(id, groups), _heads(groups), strict=True))
    for start in range(0, len(groups), _SERIES):
        part = groups[start : start + _SERIES]
        changes = [
            Change(
                arm,
                heads[id(g)],
                row.change,
                row.change_interval,
                row.tone,
            )
            for arm in arms
            for g in part
            if (row := _find(g, arm)) is not None and math.isfinite(row.change)
        ]
        if changes:
            number = f"-{start // _SERIES + 1}" if len(groups) > _SERIES else ""
            figure = forest_figure(changes, "change against the reference (%)")
            pictures.append(Picture(f"overview{number}", figure))
    return pictures
