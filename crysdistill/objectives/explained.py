"""How much of the variance of targets is explained: exact over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from crysdistill.objectives.objective import ratio

_UNIT = 1 << 16


def fixed(x: Tensor) -> Tensor:
    """Return numbers as integers, in units of the fixed point.

    They are rounded one by one, so that their sums do not depend on how batches are
    cut and dealt to ranks.
    """
    return (x.double() * _UNIT).round().long()


def explained(sums: dict[str, Tensor], counts: Tensor) -> float:
    """Return R2, the share of the variance that is explained.

    1 - (sum of squared errors) / (sum of squares about the mean of each column). NaN
    where the targets vary by no more than rounding.

    Args:
        sums: of `fixed` numbers: `wrong`, squared errors, of any shape; `total`, the
            targets (K,); `squares`, their squares, of any shape.
        counts: how many targets of each column there are, (K,) or (1,).
    """
    wrong, total, squares = (sums[n].double() for n in ("wrong", "total", "squares"))
    mean = total / counts.double().clamp(min=1)
    variance = squares.sum() - (mean * total).sum() / _UNIT
    # Each number may be off by half a unit, and its square by the number of units.
    rounding = (2 * mean.abs() / _UNIT + 1) * counts.double()
    if variance <= rounding.expand_as(total).sum():
        return float("nan")
    return 1.0 - ratio(wrong.sum(), variance)


def sums_of(predicted: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return what a batch adds to `explained`, with one error and square for all.

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
