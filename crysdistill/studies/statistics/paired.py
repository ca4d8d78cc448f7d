"""Tests on paired differences: difference, equivalence, and the runs that they need.

Runs of one seed share their split, so the test looks at the differences of two arms.
The splits of different seeds overlap: a crystal that tests one trains another. The
differences then depend on each other, and a plain t test finds effects that are not
there. The corrected resampled t test multiplies the variance by 1/n + r, in which r is
the number of test crystals over that of training crystals. In a study with few labels,
train and test are a small part of the dataset and their overlap is small as well. The
ratio of such a study is t / (N - t), with t test crystals of N in the dataset; if the
study uses the whole dataset, it is that of the source.

Source: C. Nadeau and Y. Bengio, Machine Learning 52, 239-281 (2003),
doi:10.1023/A:1024068626366.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from crysdistill.errors import InputError
from crysdistill.studies.statistics.intervals import standard_error, t_interval

BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
ONE_SEED = "one seed: no verdict"
NO_PAIR = "no common seed: no verdict"

MARGIN = 0.02
"""Arms whose means differ by less than this share count as equally good."""


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p values corrected for the number of tests, (n,).

    Source: S. Holm, Scandinavian Journal of Statistics 6, 65-70 (1979),
    https://www.jstor.org/stable/4615733.

    Args:
        p_values: one for each test. NaN marks a test that could not be made; it stays
            NaN and does not count.
    """
    p = np.asarray(p_values, float)
    corrected = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def p_value(
    differences: np.ndarray, ratio: float = 0.0, above: float | None = None
) -> float:
    """Return the p value of a mean of paired differences; NaN for n < 2.

    Args:
        differences: one for each pair, (n,).
        ratio: test crystals over training crystals; 0 for independent pairs.
        above: test one-sided whether the mean is above this; None tests two-sided
            whether it differs from 0.
    """
    n = len(differences)
    if n < 2:
        return float("nan")
    mean = float(np.mean(differences)) - (above or 0.0)
    error = standard_error(differences, ratio)
    if error == 0:  # the same difference in every pair
        return float(mean == 0 if above is None else mean <= 0)
    t = mean / error
    if above is not None:
        return float(stats.t.sf(t, n - 1))
    return float(2 * stats.t.sf(abs(t), n - 1))


def p_no_worse(gains: np.ndarray, margin: float, ratio: float = 0.0) -> float:
    """Return the p value of "the mean gain is above minus the margin".

    Args:
        gains: how much better an arm is than the other in each pair, (n,).
        margin: the loss that does not matter, in the unit of the gains.
        ratio: see `p_value`.

    Raises:
        InputError: the margin is not positive.
    """
    if not margin > 0:
        raise InputError(f"`margin` is {margin} but must be positive")
    return p_value(gains, ratio, above=-margin)


def p_equal(differences: np.ndarray, margin: float, ratio: float = 0.0) -> float:
    """Return the p value of "the mean differs by less than the margin" (TOST).

    Source: D. J. Schuirmann, J. Pharmacokinet. Biopharm. 15, 657-680 (1987),
    doi:10.1007/BF01068419.

    Args:
        differences: one for each pair, (n,).
        margin: the difference that does not matter, in their unit.
        ratio: see `p_value`.

    Raises:
        InputError: the margin is not positive.
    """
    sides = (p_no_worse(side, margin, ratio) for side in (differences, -differences))
    return max(sides)


def runs_needed(
    effect: float,
    spread: float,
    ratio: float = 0.0,
    power: float = 0.8,
    confidence: float = 0.95,
    most: int = 1000,
) -> int | None:
    """Return how many pairs a two-sided test needs to find an effect.

    Args:
        effect: the true mean difference.
        spread: the standard deviation of the differences.
        ratio: see `p_value`. More runs on the same dataset do not make its part of the
            variance smaller.
        power: the probability of finding the effect.
        confidence: 1 minus the p value that counts.
        most: the largest number to try.

    Returns:
        The smallest number of at least 2, or None if it is above `most`.
    """
    if not spread > 0:
        return 2 if effect else None
    for n in range(2, most + 1):
        shift = abs(effect) / (spread * np.sqrt(1 / n + ratio))
        quantile = stats.t.ppf((1 + confidence) / 2, n - 1)
        if stats.nct.sf(quantile, n - 1, shift) >= power:
            return n
    return None


def compare_pairs(
    values: np.ndarray,
    reference: np.ndarray,
    higher: bool,
    confidence: float = 0.95,
    ratio: float = 0.0,
) -> dict[str, Any]:
    """Compare the values of an arm with those of the reference, pair by pair.

    Args:
        values: (n,).
        reference: (n,), of the same splits.
        higher: whether higher values are better.
        confidence: the level of the intervals.
        ratio: test crystals over training crystals; 0 for independent pairs.

    Returns:
        The columns of `compare_paired`, from `n` to `verdict`.
    """
    n = len(values)
    if n == 0:
        return {"n": 0, "wins": 0, "p": np.nan, "verdict": NO_PAIR}
    differences = values - reference
    gains = differences if higher else -differences
    difference = float(differences.mean())
    low, high = t_interval(differences, confidence, ratio)
    scale = abs(float(reference.mean()))
    percent = 100 / scale if scale > 0 else np.nan
    if n == 1:
        verdict = ONE_SEED
    elif low <= 0 <= high:
        verdict = NO_DIFFERENCE
    else:
        verdict = BETTER if gains.mean() > 0 else WORSE
    margin = MARGIN * scale
    return {
        "n": n,
        "mean": float(values.mean()),
        "reference_mean": float(reference.mean()),
        "difference": difference,
        "sd_difference": float(differences.std(ddof=1)) if n > 1 else np.nan,
        "ci_low": low,
        "ci_high": high,
        "change": difference * percent,
        "change_low": low * percent,
        "change_high": high * percent,
        "wins": int((gains > 0).sum()),
        "p": p_value(differences, ratio),
        "p_no_worse": p_no_worse(gains, margin, ratio) if scale > 0 else np.nan,
        "p_equal": p_equal(differences, margin, ratio) if scale > 0 else np.nan,
        "verdict": verdict,
    }
