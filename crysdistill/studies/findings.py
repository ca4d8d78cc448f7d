"""Sentences on the findings of a study, and on their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from crysdistill.studies.numbers import counted, number, percent, percent_span
from crysdistill.studies.statistics import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    check_results,
    compare_paired,
    higher_is_better,
    runs_needed,
)
from crysdistill.studies.statistics.results import runs_of
from crysdistill.studies.tables import ResultGroup, ResultRow, metric_name

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
        results: the results of all runs, to compare the best arm with the controls.
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


def tally(groups: Sequence[ResultGroup], most: int = 5) -> list[str]:
    """Return how often each arm was better or worse than the reference, in sentences.

    Args:
        groups: the groups from `result_groups`.
        most: the number of arms; those with the largest mean gain come first.
    """
    said: list[tuple[float, str]] = []
    for arm in dict.fromkeys(row.arm for group in groups for row in group.rows):
        found = [
            (r, g.higher) for g in groups for r in g.rows if r.arm == arm and r.changes
        ]
        rows = [row for row, _ in found]
        if not rows or rows[0].control:
            continue
        name = next(g.reference.arm for g in groups if g.reference)
        gains = [c if up else -c for row, up in found for c in row.changes]
        won = sum(gain > 0 for gain in gains)
        better, worse = (sum(r.tone == tone for r in rows) for tone in (BETTER, WORSE))
        gain = sum(gains) / len(gains)
        text = (
            f"{arm}: better than {name} in {won} of {len(gains)} pairs of runs, mean "
            f"gain {percent(gain)} %. After Holm's correction better in {better} of "
            f"{len(rows)} comparisons, worse in {worse}."
        )
        said.append((-gain, text))
    return [text for _, text in sorted(said, key=lambda pair: pair[0])[:most]]


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
    if table["fold"].nunique() > 1:
        said.append(
            "Means over several folds have an interval from a bootstrap that draws "
            "folds, then seeds in each; the pairs of a test are the folds."
        )
    if reference not in set(table["arm"]):
        return said
    said.append(
        f"Changes are paired: each run against the {reference} run of the same "
        f"seed, in percent of the mean of {reference}. “Better” and “worse” mean "
        "that the 95 % interval of the change excludes 0. Holm's correction is for "
        "the number of arms; verdicts that fail it are marked."
    )
    ratios = table["test_train"].dropna().unique()
    if len(ratios) and ratios.max() > 0:
        ends = " to ".join(f"{r:.2g}" for r in sorted({ratios.min(), ratios.max()}))
        said.append(
            "Intervals and p values of changes come from the corrected resampled t "
            "test for overlapping splits (Nadeau and Bengio 2003, "
            "doi:10.1023/A:1024068626366), with test crystals over the other crystals "
            f"of the dataset = {ends}."
        )
    said.append(
        "“No worse than 2 %” and “equal within 2 %” are equivalence tests (TOST) at "
        "5 %, each on its own."
    )
    return said


def limits(
    table: pd.DataFrame,
    groups: Sequence[ResultGroup],
    reference: str,
    overlap: Mapping[str, Any] | None,
    absent: Sequence[str] = (),
) -> list[str]:
    """Return sentences on the limits of the results.

    Args:
        table: the table from `check_results`.
        groups: the groups from `result_groups`.
        reference: the arm that the others are compared with.
        overlap: the `word` and `meaning` of the overlap; None if nothing is known.
        absent: sentences on what the page cannot show.
    """
    seeds = table[["seed", "fold"]].drop_duplicates().shape[0]
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
        said.append(_spread_described(table))
    said += _too_small(groups)
    if any(len(group.rows) > 2 for group in groups):
        said.append(
            "The arm called best was picked by its test values, which flatters it."
        )
    said += absent
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


def _spread_described(table: pd.DataFrame) -> str:
    """Say what the intervals describe, and what they leave out."""
    where = "on this dataset, not on other chemistries"
    if table["test_train"].isna().all():
        return (
            f"The intervals describe the spread between seeds {where}. Seeds share "
            "crystals, which makes them somewhat too narrow (Nadeau and Bengio 2003, "
            "doi:10.1023/A:1024068626366)."
        )
    if (table["test_train"].fillna(0) == 0).all():
        return (
            "All seeds have the same test crystals: the intervals describe the spread "
            f"between runs {where}, and not the choice of the test crystals."
        )
    return (
        f"The intervals describe the spread between splits {where}. Intervals of "
        "changes are corrected for crystals that splits share; those of means are not."
    )


def _too_small(groups: Sequence[ResultGroup], most: int = 6) -> list[str]:
    """Say how many seeds the claims need that the study cannot make."""
    said = []
    for group in groups:
        best = group.best
        if best is None or len(best.changes) < 2 or abs(best.change) < 1:
            continue
        if best.verdict != NO_DIFFERENCE and best.holds:
            continue
        needed = runs_needed(best.change, best.spread, best.ratio)
        place = f"{group.name}, {group.labels:,} labels"
        claim = f"{place}: a change of {percent(best.change)}\u00a0% by {best.arm}"
        if needed is None:
            why = "a larger test set" if best.ratio > 0 else "more than 1,000 seeds"
            said.append(f"{claim} needs {why} to be shown.")
        elif needed > len(best.changes):
            said.append(
                f"{claim} needs about {counted(needed, 'seed')} to be shown with a "
                f"probability of 80 %; the study has {len(best.changes)}."
            )
    left = len(said) - most
    return said[:most] + ([f"The same holds for {left} other claims."] * (left > 0))


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

    def ahead_of(row: ResultRow) -> bool:
        return row.mean > best.mean if higher else row.mean < best.mean

    for row in group.rows:
        if row.control and not row.reference and ahead_of(row):
            value = f"{number(row.mean, group.decimals)} {group.unit}".rstrip()
            said.append(
                f"The control {row.arm} has a better mean than {best.arm}: {value}."
            )
    behind = [
        row
        for row in group.rows
        if row.control and row.n and not row.reference and not ahead_of(row)
    ]
    if behind:  # the rows are sorted, best first
        name = behind[0].arm
        runs = runs_of(table, group)
        found = compare_paired(runs[runs["arm"].isin([best.arm, name])], name).iloc[0]
        ends = (found["change_low"], found["change_high"])
        change = _change_text(found["change"], ends, found["n"])
        said.append(
            f"Knowledge, or only regularisation? {best.arm} is at {change} against the "
            f"control {name}: {found['verdict']}."
        )
    return said
