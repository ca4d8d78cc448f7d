"""Sentences on the findings of a study, and on their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from crysdistill.studies.statistics import (
    BETTER,
    WORSE,
    check_results,
    compare_paired,
    higher_is_better,
)
from crysdistill.studies.tables import (
    CONTROLS,
    ResultGroup,
    ResultRow,
    metric_name,
    number,
    percent,
    percent_span,
)

OVERLAP_WORDS = {
    "clean": "the pretraining corpus holds no crystal that matches a test crystal",
    "transductive": "the pretraining corpus holds test crystals (without labels), so "
    "the gain may be smaller on crystals that it has never seen",
    "unknown": "it was not checked whether the pretraining corpus holds test crystals",
}
"""The meaning of each status of an overlap."""

MEASURED = (
    "Epochs and settings were selected on validation crystals only; the test crystals "
    "were predicted once, by the selected weights.",
    "Within a seed, all arms have the same training, validation and test crystals; "
    "all trained networks have the same budget.",
)
"""How results are measured; `facts["measured"]` overrides these sentences."""


def findings(group: ResultGroup, results: pd.DataFrame) -> list[str]:
    """Return the findings of a group of arms in sentences; none without a comparison.

    Args:
        group: one of `result_groups`.
        results: the results of all runs, to compare the distilled arm with the arm
            whose teacher has random weights.
    """
    best, reference = group.best, group.reference
    if best is None or reference is None or not best.changes:
        return []
    higher = higher_is_better(group.metric)
    ahead = best.mean > reference.mean if higher else best.mean < reference.mean
    start = (
        f"{best.arm} has the best mean"
        if ahead
        else f"no arm has a better mean than {reference.arm}; next is {best.arm}"
    )
    value = f"{number(best.mean, group.decimals)} {group.unit}".rstrip()
    change = _change_text(best.change, best.change_interval, len(best.changes))
    return [
        f"{start}, {metric_name(group.metric)} {value}, {change} against "
        f"{reference.arm}: {best.judgement}.",
        *_control_findings(group, best, check_results(results)),
    ]


def tally(groups: Sequence[ResultGroup]) -> list[str]:
    """Return how often each arm was better or worse than the reference, in sentences.

    Args:
        groups: the groups from `result_groups`.
    """
    said = []
    for arm in dict.fromkeys(row.arm for group in groups for row in group.rows):
        rows = [r for g in groups for r in g.rows if r.arm == arm and r.changes]
        if not rows or arm in CONTROLS:
            continue
        name = next(g.reference.arm for g in groups if g.reference)
        better, worse = (sum(r.tone == tone for r in rows) for tone in (BETTER, WORSE))
        said.append(
            f"{arm}: better than {name} in {better} of {len(rows)} comparisons, worse "
            f"in {worse} (after Holm's correction)."
        )
    return said


def statistics_used(table: pd.DataFrame, reference: str) -> list[str]:
    """Return sentences on how the numbers of a report were computed.

    Args:
        table: the table from `check_results`.
        reference: the arm that the others are compared with.
    """
    said = [
        "± is the standard deviation between seeds (n − 1); 95 % CI is Student's t "
        "interval of the mean over seeds.",
    ]
    if reference in set(table["arm"]):
        said.append(
            f"Changes are paired: each run against the {reference} run of the same "
            f"seed, in percent of the mean of {reference}. “Better” and “worse” mean "
            "that the 95 % interval of the change excludes 0. Holm's correction is for "
            "the number of arms; a verdict that does not stand after it says so."
        )
    return said


def limits(
    table: pd.DataFrame,
    groups: Sequence[ResultGroup],
    reference: str,
    overlap: Mapping[str, Any] | None,
) -> list[str]:
    """Return sentences on the limits of the results.

    Args:
        table: the table from `check_results`.
        groups: the groups from `result_groups`.
        reference: the arm that the others are compared with.
        overlap: the `word` and `meaning` of the overlap; None if nothing is known.
    """
    seeds = table["seed"].nunique()
    said = [
        "A negative result is a result. “No difference shown” is not “equal”: the "
        "interval says how large a difference is still possible.",
    ]
    if seeds == 1:
        said.append("One seed gives no interval and no verdict; run at least three.")
    elif seeds < 5:
        said.append(
            f"{seeds} seeds give wide intervals; five to ten would narrow them."
        )
    if seeds > 1:
        said.append(
            "The intervals describe the spread between seeds on this dataset, not on "
            "other chemistries. Seeds share crystals, which makes them somewhat too "
            "narrow (Nadeau and Bengio 2003, doi:10.1023/A:1024068626366)."
        )
    if any(len(group.rows) > 2 for group in groups):
        said.append(
            "The arm called best was picked by its test values, which flatters it."
        )
    if overlap and overlap["word"] != "clean":
        said.append(f"Overlap {overlap['word']}: {overlap['meaning']}.")
    failed = int((~np.isfinite(table["value"])).sum())
    if failed:
        said.append(f"{failed} of {len(table)} runs gave no finite value; left out.")
    if reference in set(table["arm"]):
        unpaired = int(compare_paired(table, reference)["unpaired"].sum())
        if unpaired:
            said.append(
                f"{unpaired} runs have no {reference} run of the same seed; they count "
                "for the means but not for the changes."
            )
    return said


def _change_text(change: float, interval: tuple[float, float], pairs: int) -> str:
    """Return a change in percent, with its interval if there is one."""
    text = f"{percent(change)}\u00a0%"
    if pairs < 2:
        return text
    return f"{text} (95\u00a0% CI {percent_span(interval)}\u00a0%, {pairs} seeds)"


def _control_findings(
    group: ResultGroup, best: ResultRow, table: pd.DataFrame
) -> list[str]:
    """Return sentences on controls that do as well as the methods under test."""
    said = []
    higher = higher_is_better(group.metric)
    for row in group.rows:
        ahead = row.mean > best.mean if higher else row.mean < best.mean
        if row.arm in CONTROLS and ahead:
            value = f"{number(row.mean, group.decimals)} {group.unit}".rstrip()
            said.append(
                f"The control {row.arm} has a better mean than {best.arm}: {value}."
            )
    pair = ["distilled", "random-teacher"]
    if set(pair) <= {row.arm for row in group.rows if row.n}:
        mask = (table["target"] == group.target) & (table["metric"] == group.metric)
        mask &= (table["labels"] == group.labels) & table["arm"].isin(pair)
        found = compare_paired(table[mask], "random-teacher").iloc[0]
        ends = (found["change_low"], found["change_high"])
        change = _change_text(found["change"], ends, found["n"])
        said.append(
            f"Knowledge, or only regularisation? distilled is at {change} against "
            f"random-teacher: {found['verdict']}."
        )
    return said
