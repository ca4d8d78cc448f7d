"""Batch normalisation over the rows of all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crysdistill.ranks import sum_over_ranks, world_size


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` with statistics over the batch on all ranks.

    In one process it is `nn.BatchNorm1d`. PyTorch's own `SyncBatchNorm` needs a GPU
    and a row on every rank; this class needs neither.

    Source: S. Ioffe and C. Szegedy, ICML 2015, arXiv:1502.03167.

    Args:
        num_features: F.
        in_order: whether the CPU adds rows in one order on any number of threads, so
            that all bits stay the same. PyTorch's own sum takes half of the time.
    """

    def __init__(self, num_features: int, in_order: bool = False) -> None:
        super().__init__(num_features)
        self.in_order = in_order

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (rows, F)."""
        in_order = self.in_order and x.device.type == "cpu" and len(x) > 0
        if not self.training or (world_size() == 1 and not in_order):
            return super().forward(x) if len(x) else x
        count, mean, var = moments(x)
        self.follow(count, mean, var)
        return _Normalize.apply(
            x, self.weight, self.bias, mean, (var + self.eps).rsqrt(), count
        )

    @torch.no_grad()
    def follow(self, count: Tensor | float, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards those of a batch.

        Args:
            count: rows of the batch on all ranks.
            mean: (F,).
            var: (F,), divided by `count`, not by one less.
        """
        seen = self.num_batches_tracked
        if self.running_mean is None or self.running_var is None or seen is None:
            return
        seen.add_(1)
        momentum = self.momentum
        if momentum is None:  # a plain average over all batches
            momentum = 1.0 / float(seen)
        if isinstance(count, Tensor):
            unbiased = var * (count / (count - 1).clamp(min=1)).to(var.dtype)
        else:
            unbiased = var * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor | float, Tensor, Tensor]:
    """Return the number of rows on all ranks, and their mean and variance, (F,)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = max(len(x), 1)
    mean = wide.sum(dim=0) / rows
    var = (wide - mean).square_().sum(dim=0) / rows
    count, mean, var = over_ranks(len(x), mean.double(), var.double())
    return count, mean.to(wide.dtype), var.to(wide.dtype)


def over_ranks(
    rows: int, mean: Tensor, var: Tensor
) -> tuple[Tensor | float, Tensor, Tensor]:
    """Return rows, mean and variance of all ranks from those of this rank, in float64.

    Args:
        rows: the number of rows on this rank.
        mean: (F,) float64.
        var: (F,) float64, divided by `rows`, not by one less.
    """
    if world_size() == 1:
        return float(rows), mean, var
    n = torch.full((1,), float(rows), dtype=torch.float64, device=mean.device)
    # In double precision, so that the difference of two large sums stays exact.
    sums = sum_over_ranks(torch.cat((n, n * mean, n * (var + mean.square()))))
    count, total, squares = sums[0], *sums[1:].chunk(2)
    mean = total / count.clamp(min=1)
    var = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return count, mean, var


def moments_of_sums(
    rows: int, pivot: np.ndarray, sums: np.ndarray
) -> tuple[float, Tensor, Tensor]:
    """Return rows, mean and variance of all ranks from sums of compiled code.

    Args:
        rows: the number of rows on this rank.
        pivot: (F,) float32, numbers near the mean.
        sums: (parts, 2, F) float64, of x - pivot and of its square.
    """
    # In numpy, whose calls cost less than those of PyTorch.
    offset, square = sums.sum(axis=0) / max(rows, 1)
    mean = torch.from_numpy(pivot + offset)
    var = torch.from_numpy(np.maximum(square - np.square(offset), 0))
    count, mean, var = over_ranks(rows, mean, var)
    return float(count), mean.float(), var.float()


class _Normalize(torch.autograd.Function):
    """y = gamma (x - mean) / sigma + beta, with mean and sigma of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse: Tensor,
        count: Tensor | float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.count = count
        return (x - mean).mul_(inverse * weight).add_(bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        centred = x - mean  # (rows, F)
        dy = dy.to(centred.dtype)
        d_bias, d_weight = dy.sum(dim=0), (dy * centred).sum(dim=0) * inverse
        # The gradients of weight and bias stay this rank's own: DDP adds them up.
        both = sum_over_ranks(torch.cat((d_bias, d_weight)).double()) / ctx.count
        along_bias, along_weight = both.to(centred.dtype).chunk(2)
        dx = centred.mul_(-along_weight * inverse).add_(dy).sub_(along_bias)
        dx = dx.mul_(weight * inverse)
        return dx.to(x.dtype), d_weight, d_bias, None, None, None
