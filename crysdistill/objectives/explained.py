"""The explained share of the variance of targets, exact over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from crysdistill.objectives.objective import ratio

_UNIT = 1 << 16


def fixed(x: Tensor) -> Tensor:
    """Return numbers as integers, in units of the fixed point.

    Each number is rounded on its own. So sums do not depend on how crystals are divided
    into batches and among ranks.
    """
    return (x.double() * _UNIT).round().long()


def explained(sums: dict[str, Tensor], counts: Tensor) -> float:
    """Return R2, the explained share of the variance.

    1 - (sum of squared errors) / (sum of squares about the mean of each column). NaN
    if the targets vary by no more than the rounding error.

    Args:
        sums: of `fixed` numbers: `wrong`, squared errors, of any shape; `total`, the
            targets (K,); `squares`, their squares, of any shape.
        counts: the number of targets in each column, (K,) or (1,).
    """
    wrong, total, squares = (sums[n].double() for n in ("wrong", "total", "squares"))
    mean = total / counts.double().clamp(min=1)
    variance = squares.sum() - (mean * total).sum() / _UNIT
    # Each number x may be off by half a unit, and its square by about x units.
    rounding = (2 * mean.abs() / _UNIT + 1) * counts.double()
    if variance <= rounding.expand_as(total).sum():
        return float("nan")
    return 1.0 - ratio(wrong.sum(), variance)


def sums_of(predicted: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return a batch's sums for `explained`; only `total` keeps one per column.

    Args:
        predicted: (n, K).
        wanted: (n, K).
    """
    return {
        "wrong": fixed((predicted.double() - wanted.double()).square()).sum(),
        "total": fixed(wanted).sum(dim=0),
        "squares": fixed(wanted.double().square()).sum(),
        "count": torch.tensor(len(wanted)),
    }
