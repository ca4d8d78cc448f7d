"""The share of the gap between student and teacher that distillation closes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from crysdistill.errors import InputError
from crysdistill.studies.statistics.intervals import Interval, check_confidence


class Share(NamedTuple):
    """A share with its interval; NaN where there is none."""

    value: float
    interval: Interval


def gap_closed(
    alone: np.ndarray,
    taught: np.ndarray,
    teacher: np.ndarray,
    confidence: float = 0.95,
    ratio: float = 0.0,
) -> Share:
    """Return (alone - taught) / (alone - teacher), with Fieller's interval.

    Source: E. C. Fieller, Journal of the Royal Statistical Society B 16, 175-185
    (1954), doi:10.1111/j.2517-6161.1954.tb00159.x.

    Args:
        alone: errors of the student without its teacher, (n,), one for each seed.
        taught: those of the student with its teacher, (n,).
        teacher: those of the teacher, (n,).
        confidence: the confidence level.
        ratio: test crystals over training crystals, for splits that overlap; 0 for
            independent ones. See `crysdistill.studies.statistics.paired`.

    Returns:
        The share: 0 if the teacher changes nothing, 1 if the student reaches it. There
        is no share if the teacher is not better than the student alone, and no interval
        if the gap itself may be zero.

    Raises:
        InputError: the lengths differ, or the confidence is not between 0 and 1.
    """
    check_confidence(confidence)
    if not len(alone) == len(taught) == len(teacher):
        raise InputError(
            f"the arms have {len(alone)}, {len(taught)} and {len(teacher)} values; "
            "give those of the same seeds"
        )
    none = Interval(float("nan"), float("nan"))
    gain, gap = alone - taught, alone - teacher
    if not len(gap) or gap.mean() <= 0:
        return Share(float("nan"), none)
    share = float(gain.mean() / gap.mean())
    n = len(gap)
    if n < 2:
        return Share(share, none)
    square = float(stats.t.ppf((1 + confidence) / 2, n - 1)) ** 2
    (gains, both), (_, gaps) = np.cov(gain, gap) * (1 / n + ratio)
    a = gap.mean() ** 2 - square * gaps
    b = gain.mean() * gap.mean() - square * both
    c = gain.mean() ** 2 - square * gains
    if a <= 0:
        return Share(share, none)
    root = float(np.sqrt(max(0.0, b * b - a * c)))
    return Share(share, Interval(float((b - root) / a), float((b + root) / a)))
