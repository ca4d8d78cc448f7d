"""The arms of a study: a mean with an interval each, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from crysdistill.errors import InputError, did_you_mean
from crysdistill.studies.statistics.intervals import (
    Interval,
    hierarchical_interval,
    t_interval,
)
from crysdistill.studies.statistics.paired import (
    BETTER,
    WORSE,
    compare_pairs,
    holm,
)
from crysdistill.studies.statistics.results import (
    GROUP,
    check_results,
    comparable,
    higher_is_better,
)


def summarise(
    results: pd.DataFrame, confidence: float = 0.95, reference: str = "scratch"
) -> pd.DataFrame:
    """Summarise each arm, for each task, metric and number of labels.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics.results`.
        confidence: the confidence level of the interval.
        reference: the arm that sets the conditions; see `check_results`.

    Returns:
        Columns `task, target, unit, metric, labels, condition, arm`, `n` (runs),
        `failed` (runs without a finite value, which the rest leaves out), `mean`, `sd`
        (between runs, n - 1), `ci_low`, `ci_high` (of the mean: a t interval over
        seeds, or a hierarchical bootstrap over folds and seeds), `best`, `worst` and
        `validation` (mean selected value). Tasks and arms keep their order, labels
        ascend. With one run, `sd` and the interval are NaN.

    Raises:
        InputError: see `check_results` and `t_interval`.
    """
    rows = []
    for key, group in comparable(check_results(results, reference)):
        for arm, runs in group.groupby("arm", sort=False):
            finite = runs[np.isfinite(runs["value"])]
            values = finite["value"].to_numpy(float)
            ends = values.min(initial=np.inf), values.max(initial=-np.inf)
            best, worst = ends[::-1] if higher_is_better(key["metric"]) else ends
            interval = _interval(finite, confidence)
            rows.append(
                {
                    **key,
                    "arm": arm,
                    "n": len(values),
                    "failed": len(runs) - len(values),
                    "mean": values.mean() if len(values) else np.nan,
                    "sd": values.std(ddof=1) if len(values) > 1 else np.nan,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "best": best if len(values) else np.nan,
                    "worst": worst if len(values) else np.nan,
                    "validation": finite["validation"].mean(),
                }
            )
    return pd.DataFrame(rows)


def _interval(runs: pd.DataFrame, confidence: float) -> Interval:
    """Return the interval of a mean over seeds, or over folds and seeds."""
    if runs["fold"].nunique() > 1:
        folds = [part["value"].to_numpy(float) for _, part in runs.groupby("fold")]
        return hierarchical_interval(folds, confidence)
    return t_interval(runs["value"].to_numpy(float), confidence)


def compare_paired(
    results: pd.DataFrame,
    reference: str = "scratch",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Compare every other arm with the reference, over the splits that both have.

    Runs of one seed share the split, so a paired t test judges their differences. If
    the column `test_train` is known, it is the corrected resampled t test. The runs of
    a fold share a split; they count as one pair, with their mean.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics.results`.
        reference: the arm that the others are compared with.
        confidence: the level of the intervals; p values are compared with 1 minus it.

    Returns:
        One row for each other arm, with the columns `task, target, unit, metric,
        labels, condition, arm, reference`; `n` (pairs), `unpaired` (runs of the arm
        without a partner or a finite value), `mean` and `reference_mean` (over the
        pairs); `difference` (arm minus reference), `sd_difference`, `ci_low`,
        `ci_high`; the same in percent of the reference's mean, which counts as exact:
        `change`, `change_low`, `change_high`; `wins` (pairs in which the arm is
        better), `ratio` (of the corrected test), `p`; `p_no_worse` and `p_equal` (of
        being no worse than the reference by `MARGIN`, and of being within it); `p_holm`
        (Holm's correction for the arms of the same task, metric and number of labels)
        and `p_tasks` (that for all comparisons of the arm); `verdict` ("better" or
        "worse" if the interval excludes 0, else "no difference shown"; another text if
        one seed allows no verdict) and `holds` (whether a "better" or "worse" still
        holds for `p_holm`).

    Raises:
        InputError: the reference has no run; see also `check_results`, `t_interval`.
    """
    table = check_results(results, reference)
    arms = list(table["arm"].unique())
    if reference not in arms:
        raise InputError(
            f"no run has the reference arm `{reference}`; the arms are "
            f"{', '.join(arms)}{did_you_mean(reference, arms)}"
        )
    rows: list[dict[str, Any]] = []
    for key, group in comparable(table):
        values = _values(group)
        other = values.get(reference, {})
        ratio = float(np.nan_to_num(group["test_train"].max()))
        compared = []
        for arm, part in group.groupby("arm", sort=False):
            if arm == reference:
                continue
            mine = values.get(str(arm), {})
            paired, beside = _common(mine, other)
            row = compare_pairs(
                paired,
                beside,
                higher_is_better(key["metric"]),
                confidence,
                ratio,
            )
            unpaired = len(part) - len(mine.keys() & other.keys())
            head = {"arm": arm, "reference": reference, "ratio": ratio}
            compared.append({**key, **head, "unpaired": unpaired, **row})
        corrected = holm([row["p"] for row in compared])
        for row, p in zip(compared, corrected, strict=True):
            decided = row["verdict"] in (BETTER, WORSE)
            rows.append(
                {**row, "p_holm": p, "holds": bool(decided and p < 1 - confidence)}
            )
    columns = (
        "arm reference n unpaired mean reference_mean difference sd_difference ci_low "
        "ci_high change change_low change_high wins ratio p p_no_worse p_equal p_holm "
        "p_tasks verdict holds"
    )
    found = pd.DataFrame(rows, columns=[*GROUP, *columns.split()])
    for _, part in found.groupby("arm"):
        found.loc[part.index, "p_tasks"] = holm(part["p"].to_numpy(float))
    return found


def paired_values(
    group: pd.DataFrame, arm: str, reference: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of two arms over the splits that both have, (n,) each.

    Args:
        group: runs that may be compared; see `comparable`.
        arm: the one arm.
        reference: the other.
    """
    mine, other = common_values(group, (arm, reference))
    return mine, other


def common_values(group: pd.DataFrame, arms: Sequence[str]) -> list[np.ndarray]:
    """Return the values of arms over the splits that all of them have, (n,) each.

    Args:
        group: runs that may be compared; see `comparable`.
        arms: the arms.
    """
    values = _values(group)
    return _common(*(values.get(arm, {}) for arm in arms))


_Split = tuple[Any, Any]
"""Fold and seed of a run."""


def _values(group: pd.DataFrame) -> dict[str, dict[_Split, float]]:
    """Return the finite values of each arm by split."""
    found: dict[str, dict[_Split, float]] = {}
    columns = (group[name].tolist() for name in ("arm", "fold", "seed", "value"))
    for arm, fold, seed, value in zip(*columns, strict=True):
        if math.isfinite(value):
            found.setdefault(arm, {})[fold, seed] = value
    return found


def _common(*arms: dict[_Split, float]) -> list[np.ndarray]:
    """Return the values of the splits that all have; of several folds, the means."""
    splits = [split for split in arms[0] if all(split in other for other in arms[1:])]
    folds: dict[Any, list[_Split]] = {}
    for fold, seed in splits:
        folds.setdefault(fold, []).append((fold, seed))
    parts = list(folds.values()) if len(folds) > 1 else [[split] for split in splits]
    return [
        np.array([np.mean([values[split] for split in part]) for part in parts], float)
        for values in arms
    ]
