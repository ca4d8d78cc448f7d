"""Batch normalisation over the rows of all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crysdistill.ranks import sum_over_ranks, world_size


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose statistics are those of the batch on all ranks.

    In one process it is `nn.BatchNorm1d`. PyTorch's own `SyncBatchNorm` needs a GPU
    and a row on every rank; this needs neither.

    Source: S. Ioffe and C. Szegedy, ICML 2015, arXiv:1502.03167.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (rows, F)."""
        if not self.training or world_size() == 1:
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
            var: (F,), divided by `count` and not by one less.
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
def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many rows all ranks hold, and their mean and variance, (F,)."""
    wide = x.float()
    if len(x):
        var, mean = torch.var_mean(wide, dim=0, correction=0)
    else:
        var = mean = torch.zeros(x.shape[1], device=x.device)
    return over_ranks(len(x), mean.double(), var.double())


def over_ranks(rows: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, mean and variance of all ranks from those of this one.

    Args:
        rows: how many this rank has.
        mean: (F,) float64.
        var: (F,) float64, divided by `rows` and not by one less.
    """
    n = torch.full((1,), float(rows), dtype=torch.float64, device=mean.device)
    # In double precision, so that the difference of two large sums stays exact.
    sums = sum_over_ranks(torch.cat((n, n * mean, n * (var + mean.square()))))
    count, total, squares = sums[0], *sums[1:].chunk(2)
    mean = total / count.clamp(min=1)
    var = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return count, mean.float(), var.float()


def moments_of_sums(
    rows: int, pivot: np.ndarray, sums: np.ndarray
) -> tuple[float, Tensor, Tensor]:
    """Return rows, mean and variance of all ranks from sums that compiled code made.

    Args:
        rows: how many this rank has.
        pivot: (C, L) float32, C blocks of L channels: something near the mean.
        sums: (parts, C, 2 L) float64, of x - pivot and of its square.

    Returns:
        The number, and (C L) twice.
    """
    # In numpy, whose calls cost less than those of PyTorch.
    total = sums.sum(axis=0).reshape(len(pivot), 2, -1) / max(rows, 1)
    mean = (pivot + total[:, 0]).reshape(-1)
    var = np.maximum(total[:, 1] - np.square(total[:, 0]), 0).reshape(-1)
    wide = torch.from_numpy(mean), torch.from_numpy(var)
    if world_size() == 1:
        return float(rows), wide[0].float(), wide[1].float()
    count, all_mean, all_var = over_ranks(rows, *wide)
    return count.item(), all_mean, all_var


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
        count: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse, count)
        return ((x - mean) * (inverse * weight) + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, inverse, count = ctx.saved_tensors
        normal = (x.float() - mean) * inverse  # (rows, F)
        dy = dy.float()
        d_bias, d_weight = dy.sum(dim=0), (dy * normal).sum(dim=0)
        # The gradients of weight and bias stay this rank's own: DDP adds them up.
        both = sum_over_ranks(torch.cat((d_bias, d_weight)).double()) / count
        along_bias, along_weight = both.float().chunk(2)
        dx = (dy - along_bias - normal * along_weight) * (weight * inverse)
        return dx.to(x.dtype), d_weight, d_bias, None, None, None
