"""Arms over several tasks: wins, ties and losses, and Wilcoxon's test."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from crysdistill.studies.statistics.paired import BETTER, WORSE, holm
from crysdistill.studies.statistics.results import higher_is_better


def over_tasks(pairs: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Summarise how each arm compares with the reference over all tasks.

    A win or a loss is a comparison whose difference holds after Holm's correction for
    all comparisons of the arm; the rest are ties. Wilcoxon's signed-rank test has one
    value for each task: the mean of log(error / error of the reference) over numbers of
    labels and conditions. The error of a metric of which more is better is 1 minus it.

    Source: J. Demšar, Journal of Machine Learning Research 7, 1-30 (2006),
    https://jmlr.org/papers/v7/demsar06a.html.

    Args:
        pairs: the table from `compare_paired`.
        confidence: 1 minus the p value that counts.

    Returns:
        One row for each arm: `arm, comparisons, wins, ties, losses`, `no_worse`
        (comparisons in which it is no worse than the reference by more than the
        margin), `tasks`, `ahead` (tasks with a smaller mean error), `change` (geometric
        mean of the change of the error over tasks, in percent), `p_wilcoxon` (NaN for
        one task) and `p_smallest` (the smallest p that so many tasks allow).
    """
    rows = []
    for arm, part in pairs[pairs["n"] > 0].groupby("arm", sort=False):
        found = part["p_tasks"] < 1 - confidence
        wins = int((found & (part["verdict"] == BETTER)).sum())
        losses = int((found & (part["verdict"] == WORSE)).sum())
        sure = holm(part["p_no_worse"].to_numpy(float)) < 1 - confidence
        logs = _log_ratios(part)
        many = len(logs) > 1
        rows.append(
            {
                "arm": arm,
                "comparisons": len(part),
                "wins": wins,
                "ties": len(part) - wins - losses,
                "losses": losses,
                "no_worse": int(sure.sum()),
                "tasks": len(logs),
                "ahead": int((logs < 0).sum()),
                "change": 100 * float(np.expm1(logs.mean())) if len(logs) else np.nan,
                "p_wilcoxon": _wilcoxon(logs) if many else np.nan,
                "p_smallest": min(1.0, 2.0 ** (1 - len(logs))) if many else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _wilcoxon(logs: np.ndarray) -> float:
    """Return the two-sided p value; 1 if no task differs."""
    return float(stats.wilcoxon(logs).pvalue) if logs.any() else 1.0


def _log_ratios(part: pd.DataFrame) -> np.ndarray:
    """Return the mean log ratio of the errors of each task, (tasks,)."""
    higher = part["metric"].map(higher_is_better).to_numpy(bool)
    mine, other = (
        np.where(higher, 1 - part[name], part[name]).astype(float)
        for name in ("mean", "reference_mean")
    )
    known = (mine > 0) & (other > 0)
    logs = pd.Series(np.log(mine[known] / other[known]))
    return logs.groupby(part["task"].to_numpy()[known], sort=False).mean().to_numpy()
