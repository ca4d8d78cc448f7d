"""Targets: electron-like densities of the neighbours at the place of an atom."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.objectives.targets.elements import standard_table
from crysdistill.objectives.targets.family import Column, Family
from crysdistill.objectives.targets.surroundings import Surroundings

__all__ = ["Densities"]

_CENTRES = (1.5, 2.5, 3.5, 4.5)  # Å
_DENSITY_WEIGHTS = ("covalent_radius", "s_electrons", "p_electrons", "d_electrons")


class Densities(Family):
    """Embedded densities with angular momentum 0, 1 and 2, as roots.

    rho_ls(i) = sum over a + b + c = l of l! / (a! b! c!) (sum_j w_j phi_j)^2, where
    phi_j = x^a y^b z^c exp(-(d_ij - d_s)^2 / Å^2) and w is an element property of the
    neighbour, standardised over the elements. In Å^l; NaN where a neighbour's property
    is unknown. Only neighbours in the graph count.

    Source: Y. Zhang, C. Hu and B. Jiang, J. Phys. Chem. Lett. 10, 4962 (2019),
    doi:10.1021/acs.jpclett.9b02037, Eq. 3; as targets, S. Jia et al., arXiv:2503.01227.

    Differs from the sources: weights are properties instead of learned numbers; targets
    are roots; there is no cutoff function, since the sum ends where the graph ends.
    """

    name: ClassVar[str] = "densities"
    level: ClassVar[Literal["atoms", "crystals"]] = "atoms"

    centres: Tensor
    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.tensor(_CENTRES), persistent=False)
        weights = standard_table(_DENSITY_WEIGHTS)  # (101, W)
        self.register_buffer("weights", weights, persistent=False)
        units = ("", "Å", "Å2")
        self.columns = tuple(
            Column(f"{weight}, l = {order}, at {centre} Å", unit)
            for order, unit in enumerate(units)
            for centre in _CENTRES
            for weight in _DENSITY_WEIGHTS
        )

    def compute(self, seen: Surroundings) -> Tensor:
        """Return the roots of the densities, (N, 3 * 4 * 4)."""
        shells = torch.exp(-(seen.lengths[:, None] - self.centres).square())  # (E, S)
        w = seen.of_neighbours(self.weights)  # (E, W)
        parts = (shells.unsqueeze(2) * w.unsqueeze(1)).flatten(1)  # (E, S * W)
        x, y, z = seen.vectors.T.contiguous()  # (E,) each
        # The root of 2 is for products of two different axes, which occur twice.
        twice = 2**0.5
        powers = torch.stack(
            (
                torch.ones_like(x),
                *(x, y, z),
                *(x * x, y * y, z * z),
                *(twice * x * y, twice * x * z, twice * y * z),
            ),
            dim=1,
        )  # (E, 10)
        sums = seen.sum_of_products(powers, parts).square()  # (N, 10, S * W)
        orders = sums.split([1, 3, 6], dim=1)
        return torch.cat([order.sum(dim=1).sqrt() for order in orders], dim=1)
