"""Tells whether a loss or the weights have diverged."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

FACTOR = 1e3
"""How many times larger than usual an exploding loss is."""

STREAK = 5
"""The number of consecutive steps for which it must be that large."""

WINDOW = 100
"""The number of steps that define the usual loss."""


class LossWatch:
    """Distinguishes a diverged loss from a noisy one, step by step.

    A loss that is not finite has diverged. So has a loss that is more than 1000 times
    as large as usual for 5 consecutive steps. The usual loss is the median of the 100
    steps before, but at least 1. Targets are normalised, and cross-entropies and
    contrastive losses are naturally of order 1. In a healthy run, tiny losses may rise
    by any factor, but not to 1000 five times in a row.
    """

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._high: list[float] = []

    def state_dict(self) -> dict[str, list[float]]:
        """Return the recent losses, for a checkpoint."""
        return {"usual": list(self._usual), "high": list(self._high)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from a checkpoint."""
        self._usual.extend(state["usual"])
        self._high.extend(state["high"])

    def add(self, loss: float) -> str | None:
        """Add the loss of a step; return what is wrong with it, such as "is nan"."""
        if not math.isfinite(loss):
            return f"is {loss}"
        size = abs(loss)
        if size > FACTOR and self._usual:
            usual = max(1.0, statistics.median(self._usual))
            if size > FACTOR * usual:
                self._high.append(size)
                if len(self._high) < STREAK:
                    return None
                return (
                    f"is {loss:.3g}, and for {STREAK} steps more than {FACTOR:,.0f} "
                    f"times as large as usual ({statistics.median(self._usual):.3g})"
                )
        self._usual.extend((*self._high, size))
        self._high.clear()
        return None


def all_finite(module: nn.Module) -> bool:
    """Return whether weights and batch norms are finite; waits for the device once."""
    tensors = [p.detach() for p in module.parameters()]
    for statistic, _ in _statistics(module):
        tensors.append(statistic)
    checks = [tensor.isfinite().all() for tensor in tensors]
    return bool(torch.stack(checks).all()) if checks else True


@torch.no_grad()
def mend_statistics(module: nn.Module) -> None:
    """Reset batch-norm statistics that a bad batch made infinite or NaN."""
    for statistic, neutral in _statistics(module):
        if not bool(statistic.isfinite().all()):
            statistic.fill_(neutral)


def _statistics(module: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Yield the statistics of batch norms, each with its initial value."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            for statistic, start in ((part.running_mean, 0.0), (part.running_var, 1.0)):
                if statistic is not None:
                    yield statistic, start
