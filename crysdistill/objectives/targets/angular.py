"""Targets: how the neighbours are arranged around an atom."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.objectives.targets.elements import standard_table
from crysdistill.objectives.targets.family import Column, Family
from crysdistill.objectives.targets.surroundings import Surroundings

__all__ = ["ORDERS", "SHELLS", "Angular", "harmonics"]

ORDERS = (1, 2, 3, 4)
"""Orders l of the angular moments."""

SHELLS = ((2.0, 0.7), (3.0, 0.8), (4.5, 1.2))
"""Middle and width of each radial shell, Å."""

_WEIGHTS = ("count", "electronegativity")


def harmonics(directions: Tensor) -> Tensor:
    """Return real spherical harmonics of orders 1 to 4, (E, 3 + 5 + 7 + 9).

    In Racah's normalisation: for unit vectors u and v the sum over m of
    C_lm(u) C_lm(v) is the Legendre polynomial P_l(u . v).

    Args:
        directions: (E, 3) unit vectors.
    """
    x, y, z = directions.T.contiguous()  # (E,) each
    xx, yy, zz, xy = x * x, y * y, z * z, x * y
    three, cross = x * (xx - 3 * yy), y * (3 * xx - yy)  # of the order m = 3
    root = math.sqrt
    return torch.stack(
        (
            *(x, y, z),
            (3 * zz - 1) / 2,
            root(3) * x * z,
            root(3) * y * z,
            root(3) * xy,
            root(3) / 2 * (xx - yy),
            z * (5 * zz - 3) / 2,
            root(3 / 8) * x * (5 * zz - 1),
            root(3 / 8) * y * (5 * zz - 1),
            root(15) * xy * z,
            root(15) / 2 * z * (xx - yy),
            root(5 / 8) * three,
            root(5 / 8) * cross,
            (35 * zz * zz - 30 * zz + 3) / 8,
            root(5 / 8) * x * z * (7 * zz - 3),
            root(5 / 8) * y * z * (7 * zz - 3),
            root(5) / 4 * (xx - yy) * (7 * zz - 1),
            root(5) / 2 * xy * (7 * zz - 1),
            root(35 / 8) * z * three,
            root(35 / 8) * z * cross,
            root(35) / 8 * (xx * xx - 6 * xx * yy + yy * yy),
            root(35) / 2 * xy * (xx - yy),
        ),
        dim=1,
    )  # (E, 24)


class Angular(Family):
    """Lengths of the angular moments of the neighbours in three radial shells.

    A_lsw(i)^2 = sum_m |sum_j w(Z_j) g_s(d_ij) C_lm(u_ij)|^2
               = sum_jk w_j w_k g_j g_k P_l(cos theta_jk),
    l = 1 to 4, g_s(d) = exp(-((d - d_s) / width_s)^2), and w is 1 or the
    electronegativity, standardised over the elements (unknown where a neighbour has
    none). Pure numbers: n neighbours in the middle of a shell give n times
    Steinhardt's Q_l. Only neighbours in the graph count. If the graph cuts through a
    shell of equal distances, moments that symmetry would make zero are not zero.

    Sources: A. P. Bartók, R. Kondor and G. Csányi, Phys. Rev. B 87, 184115 (2013),
    doi:10.1103/PhysRevB.87.184115 (the power spectrum); P. J. Steinhardt, D. R. Nelson
    and M. Ronchetti, Phys. Rev. B 28, 784 (1983), doi:10.1103/PhysRevB.28.784, Eq. 1.4.

    Differs from the sources: targets are roots, so that they are of the order of
    counts; shells are not mixed.
    """

    name: ClassVar[str] = "angular"
    level: ClassVar[Literal["atoms", "crystals"]] = "atoms"

    shells: Tensor
    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        electronegativity = standard_table(_WEIGHTS[1:])
        weights = torch.cat((torch.ones(101, 1), electronegativity), dim=1)  # (101, W)
        self.register_buffer("shells", torch.tensor(SHELLS), persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        self.columns = tuple(
            Column(f"{weight}, l = {order}, at {middle} Å")
            for order in ORDERS
            for middle, _ in SHELLS
            for weight in _WEIGHTS
        )

    def compute(self, seen: Surroundings) -> Tensor:
        """Return the lengths of the moments, (N, 4 * 3 * 2)."""
        middle, width = self.shells.unbind(1)  # (S,) each
        offsets = (seen.lengths[:, None] - middle) / width  # (E, S)
        w = seen.of_neighbours(self.weights)  # (E, W)
        shells = torch.exp(-offsets.square())
        parts = (shells.unsqueeze(2) * w.unsqueeze(1)).flatten(1)  # (E, S * W)
        moments = seen.sum_of_products(harmonics(seen.directions), parts)
        orders = moments.square().split([2 * order + 1 for order in ORDERS], dim=1)
        return torch.cat([order.sum(dim=1).sqrt() for order in orders], dim=1)
