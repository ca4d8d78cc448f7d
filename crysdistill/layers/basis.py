"""Basis functions: distances and angles as vectors of numbers between 0 and 1."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gaussians(nn.Module):
    """Values on an even grid of Gaussians.

    u_k(x) = exp(-((x - mu_k) / width)^2); there is no factor 2 in the exponent.
    Published programs write the exponent in several ways. `width` covers all of them:
    `spacing` for CGCNN, sqrt(spacing) for ALIGNN, sqrt(2) sigma for a Gaussian of
    standard deviation sigma.

    Args:
        start: the first centre.
        stop: the last centre.
        count: K, the number of centres.
        width: the width of each Gaussian, in the unit of the values.
    """

    centres: Tensor

    def __init__(self, start: float, stop: float, count: int, width: float) -> None:
        super().__init__()
        self.count = count
        self.width = width
        self.register_buffer(
            "centres", torch.linspace(start, stop, count), persistent=False
        )  # (K,)

    def forward(self, x: Tensor) -> Tensor:
        """Expand values (R,) to (R, K)."""
        return torch.exp(-((x.unsqueeze(1) - self.centres) / self.width).square())


class Bessel(nn.Module):
    """The radial functions of a free particle in a sphere.

    u_n(d) = sqrt(2 / cutoff) sin(n pi d / cutoff) / d, n = 1, ..., K.

    Source: J. Gasteiger, J. Groß and S. Günnemann, ICLR 2020, arXiv:2003.03123, Eq. 7.

    Args:
        cutoff: Å, where all functions are zero.
        count: K, the number of functions.
    """

    orders: Tensor

    def __init__(self, cutoff: float, count: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.count = count
        self.register_buffer(
            "orders", torch.arange(1, count + 1) * math.pi / cutoff, persistent=False
        )  # (K,)

    def forward(self, distance: Tensor) -> Tensor:
        """Expand distances (E,) in Å to (E, K)."""
        d = distance.unsqueeze(1)  # (E, 1)
        return math.sqrt(2 / self.cutoff) * torch.sin(self.orders * d) / d


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """Return (cos(pi d / cutoff) + 1) / 2 inside of the cutoff, 0 outside; (E,).

    Source: J. Behler and M. Parrinello, Phys. Rev. Lett. 98, 146401 (2007),
    doi:10.1103/PhysRevLett.98.146401, Eq. 4.

    Args:
        distance: (E,) Å.
        cutoff: Å.
    """
    value = 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1)
    return value.masked_fill(distance > cutoff, 0.0)


def shifted_softplus(x: Tensor) -> Tensor:
    """Return softplus(x) - ln 2, which is 0 at 0; any shape.

    Source: K. T. Schütt et al., NIPS 2017, arXiv:1706.08566, section 4.2.
    """
    return F.softplus(x) - math.log(2.0)
