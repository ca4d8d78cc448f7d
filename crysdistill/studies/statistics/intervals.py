"""Confidence intervals of a mean over runs, and over folds and the runs in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from crysdistill.errors import InputError

DRAWS = 2000
"""The number of samples of a bootstrap."""


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval; NaN if there is none."""

    low: float
    high: float


def check_confidence(confidence: float) -> None:
    """Refuse a confidence level that is not between 0 and 1.

    Raises:
        InputError: it is not.
    """
    if not 0 < confidence < 1:
        raise InputError(f"`confidence` is {confidence} but must be between 0 and 1")


def t_interval(
    values: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    ratio: float = 0.0,
) -> Interval:
    """Return Student's confidence interval of a mean.

    Args:
        values: a sample, (n,).
        confidence: the probability that such an interval contains the true mean.
        ratio: test crystals over training crystals, if the values belong to overlapping
            splits; see `crysdistill.studies.statistics.paired`.

    Returns:
        The interval in the unit of the values; NaN for n < 2.

    Raises:
        InputError: the confidence is not between 0 and 1.
    """
    check_confidence(confidence)
    if len(values) < 2:
        return Interval(float("nan"), float("nan"))
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    half = float(quantile) * standard_error(values, ratio)
    mean = float(np.mean(values))
    return Interval(mean - half, mean + half)


def standard_error(values: Sequence[float] | np.ndarray, ratio: float = 0.0) -> float:
    """Return the standard error of a mean over n >= 2 overlapping splits.

    Source: C. Nadeau and Y. Bengio, Machine Learning 52, 239-281 (2003),
    doi:10.1023/A:1024068626366.

    Args:
        values: one value for each split, (n,).
        ratio: test crystals over training crystals; 0 for independent values.
    """
    n = len(values)
    spread = float(np.std(values, ddof=1))
    return spread * float(np.sqrt(1 / n + ratio))  # section 3.1, the corrected test


def bootstrap_means(
    folds: Sequence[Sequence[float] | np.ndarray], draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Return means of resampled runs, (draws,): first folds, then runs in each.

    Source: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application,
    Cambridge (1997), section 3.8.

    Args:
        folds: the values of the runs of each fold.
        draws: the number of samples.
        seed: of the random choice.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(folds), size=(draws, len(folds)))
    means = np.zeros(chosen.shape)
    for place, fold in enumerate(folds):
        here = chosen == place
        runs = np.asarray(fold, float)
        picked = rng.integers(len(runs), size=(int(here.sum()), len(runs)))
        means[here] = runs[picked].mean(axis=1)
    return means.mean(axis=1)


def hierarchical_interval(
    folds: Sequence[Sequence[float] | np.ndarray], confidence: float = 0.95
) -> Interval:
    """Return the interval of a mean over folds and the runs in them, by bootstrap.

    Args:
        folds: the values of the runs of each fold.
        confidence: the confidence level.

    Returns:
        The interval in the unit of the values; NaN for fewer than two folds.

    Raises:
        InputError: the confidence is not between 0 and 1.
    """
    check_confidence(confidence)
    if len(folds) < 2:
        return Interval(float("nan"), float("nan"))
    ends = (0.5 - confidence / 2, 0.5 + confidence / 2)
    low, high = np.quantile(bootstrap_means(folds), ends)
    return Interval(float(low), float(high))
