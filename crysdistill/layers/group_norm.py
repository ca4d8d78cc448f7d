"""Differentiable group normalisation, which keeps atoms of deep encoders distinct."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.layers.normalization import BatchNorm
from crysdistill.ranks import sum_over_ranks, world_size


class DifferentiableGroupNorm(nn.Module):
    """Normalises atoms within learned groups.

    With s = softmax(x U), the shares of an atom in each group:

    x' = x + scale * sum_g BN_g(s_g * x).

    The batch norms are linear in x once their statistics are known. So the sum over
    groups is x * (s A) + c, with A (groups, F) and c (F,). Neither the values of every
    group, (N, groups, F), nor their gradients are kept in memory.

    Sources: K. Zhou et al., NeurIPS 2020, arXiv:2006.06972; equation numbers are those
    of DeeperGATGNN, S. S. Omee et al., Patterns 3, 100491 (2022),
    doi:10.1016/j.patter.2022.100491.

    Args:
        width: F, of the atoms.
        groups: the number of groups.
        scale: the weight of the normalised atoms.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(self, width: int, groups: int = 10, scale: float = 0.01) -> None:
        super().__init__()
        for name, value in (("width", width), ("groups", groups)):
            if value < 1:
                raise InputError(f"`{name}` is {value} but must be at least 1")
        self.groups = groups
        self.scale = scale
        self.assign = nn.Linear(width, groups, bias=False)  # U
        self.norm = BatchNorm(groups * width)  # all groups in one, group by group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise atoms (N, F)."""
        shares = torch.softmax(self.assign(x), dim=1).to(x.dtype)  # (N, groups), Eq. 3
        mean, var = self._statistics(x, shares)  # (groups F,) each, of Eq. 4
        weight = self.norm.weight * torch.rsqrt(var + self.norm.eps)  # A
        total = (self.norm.bias - weight * mean).view(self.groups, -1).sum(dim=0)  # c
        slope = shares @ weight.view(self.groups, -1).to(x.dtype)  # (N, F)
        return x + self.scale * (x * slope + total.to(x.dtype))  # Eqs. 5 and 6

    def _statistics(self, x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of s_g x_f, (groups F,) each."""
        norm = self.norm
        if not self.training:
            return norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        # In double precision, so that the difference of two large sums stays exact.
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        with torch.autocast(x.device.type, enabled=False):
            x, shares = x.to(wide), shares.to(wide)
            first = shares.mT @ x  # (groups, F)
            second = shares.square().mT @ x.square()
        rows = x.new_full((1,), len(x))
        sums = torch.cat((first.flatten(), second.flatten(), rows))
        if world_size() > 1:
            sums = _SumOverRanks.apply(sums)
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count.clamp(min=1)).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        if len(x) or world_size() > 1:
            norm.follow(count, mean.detach(), var.detach())
        return mean.to(norm.weight.dtype), var.to(norm.weight.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Adds up sums of all ranks; the losses of all ranks depend on each of them."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        return sum_over_ranks(sums)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.contiguous())


NORMS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "batch": BatchNorm,
    "group": DifferentiableGroupNorm,
}
"""Norms of atoms after a convolution, by their name in settings."""
