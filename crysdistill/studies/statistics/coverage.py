"""Whether predicted uncertainties are right: how many truths their intervals hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from crysdistill.errors import InputError

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal shares of truths in an interval."""


class Calibration(NamedTuple):
    """What uncertainties are worth.

    Args:
        coverage: the share of truths that the intervals hold, one for each level.
        width: the mean width of the interval of the last level.
        correlation: Spearman's, of the deviations with the absolute errors; NaN if one
            of them is constant.
        crystals: how many were judged.
    """

    coverage: tuple[float, ...]
    width: float
    correlation: float
    crystals: int


def calibration(
    errors: np.ndarray, sd: np.ndarray, levels: Sequence[float] = LEVELS
) -> Calibration:
    """Judge the intervals of normal distributions around predictions.

    Args:
        errors: prediction minus truth, (n,).
        sd: standard deviations of the predictions in the same unit, (n,).
        levels: nominal shares, between 0 and 1.

    Raises:
        InputError: there is no crystal, a deviation is negative, or a level is not
            between 0 and 1.
    """
    errors, sd = np.abs(np.asarray(errors, float)), np.asarray(sd, float)
    if not len(errors):
        raise InputError("there is no prediction to calibrate; give at least one")
    if (sd < 0).any():
        raise InputError(
            f"an `sd` is {sd.min():g} but must not be negative; correct the predictions"
        )
    wrong = [level for level in levels if not 0 < level < 1]
    if wrong:
        raise InputError(f"a level is {wrong[0]} but must be between 0 and 1")
    z = stats.norm.ppf((1 + np.array(levels)) / 2)
    held = errors[:, None] <= z * sd[:, None]  # (n, levels)
    constant = np.ptp(errors) == 0 or np.ptp(sd) == 0
    correlation = np.nan if constant else float(stats.spearmanr(sd, errors)[0])
    width = float(2 * z[-1] * sd.mean())
    shares = tuple(float(share) for share in held.mean(axis=0))
    return Calibration(shares, width, correlation, len(errors))
