"""Targets: density, composition and anisotropy of a crystal."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.graphs.batch import (
    composition,
    gather_crystals,
    mean_over_atoms,
    sum_over_atoms,
)
from crysdistill.objectives.targets.elements import PROPERTIES, property_table
from crysdistill.objectives.targets.family import Column, Family
from crysdistill.objectives.targets.surroundings import Surroundings

__all__ = ["COMPOSITION", "Crystal"]

COMPOSITION = tuple(name for name in PROPERTIES if name != "mass")
"""Element properties with statistics over the composition."""

_STATISTICS = ("mean", "mean deviation of", "least", "largest")
_U_PER_A3 = 1.66053907  # g/cm3


class Crystal(Family):
    """Density, packing, anisotropy of the bonds, and statistics of the composition.

    Nothing here depends on the choice of cell. Lengths and angles of a cell do, so they
    are left out. Invariants of a tensor D replace them. D is the mean of u u^T over all
    bonds (directions u, weighted by `Surroundings.bonds`, each atom with the same
    weight) minus a third of the unit matrix. One is the anisotropy sqrt(3/2 tr D^2), 0
    in a cubic crystal and 1 if all bonds are parallel. The other is the asymmetry
    27/2 det D, 1 for such chains and -1/8 for layers. Each property has its mean, mean
    absolute deviation, minimum and maximum over the atoms of a crystal; NaN if it is
    unknown for one of the elements. For bonds, only neighbours in the graph count.

    Sources: composition, L. Ward et al., npj Comput. Mater. 2, 16028 (2016),
    doi:10.1038/npjcompumats.2016.28; the tensor, M. Oda, Soils Found. 12, 17 (1972),
    doi:10.3208/sandf1960.12.17; properties, see
    `crysdistill.objectives.targets.elements.PROPERTIES`.
    """

    name: ClassVar[str] = "crystal"
    level: ClassVar[Literal["atoms", "crystals"]] = "crystals"

    properties: Tensor
    mass_and_ball: Tensor

    def __init__(self) -> None:
        super().__init__()
        mass, radius = property_table(["mass", "covalent_radius"]).unbind(1)
        ball = 4 / 3 * math.pi * radius**3  # (101,) Å^3
        buffers = {
            "properties": property_table(COMPOSITION),  # (101, P)
            "mass_and_ball": torch.stack((mass, ball), dim=1),  # (101, 2)
        }
        for name, table in buffers.items():
            self.register_buffer(name, table, persistent=False)
        self.columns = (
            Column("density", "g/cm3"),
            Column("volume per atom", "Å3"),
            Column("logarithm of volume per atom", "ln Å3"),
            Column("volume of covalent spheres per volume"),
            Column("nearest distance per edge of an atom's cube"),
            Column("anisotropy of bonds"),
            Column("asymmetry of bonds"),
            Column("elements"),
            Column("entropy of mixing", "k per atom"),
            *(
                Column(f"{statistic} {name}", PROPERTIES[name].unit)
                for statistic in _STATISTICS
                for name in COMPOSITION
            ),
        )

    def compute(self, seen: Surroundings) -> Tensor:
        """Return the numbers of every crystal, (B, 9 + 4 * 15)."""
        batch = seen.batch
        atoms = batch.ptr.diff().to(batch.cell.dtype)  # (B,)
        volume = torch.linalg.det(batch.cell).abs() / atoms  # (B,) Å^3 per atom
        mass, ball = mean_over_atoms(seen.of_atoms(self.mass_and_ball), batch).unbind(
            1
        )  # (B,) each
        shares = composition(batch)  # (B, 101)
        nearest, anisotropy = self._bonds(seen)
        facts = torch.stack(
            (
                _U_PER_A3 * mass / volume,
                volume,
                volume.log(),
                ball / volume,
                nearest / volume.pow(1 / 3),
                *anisotropy.unbind(1),
                (shares > 0).sum(dim=1),
                torch.special.entr(shares).sum(dim=1),
            ),
            dim=1,
        )  # (B, 9)
        return torch.cat((facts, self._composition(seen)), dim=1)

    def _bonds(self, seen: Surroundings) -> tuple[Tensor, Tensor]:
        """Return mean nearest distances, (B,), and anisotropy and asymmetry, (B, 2)."""
        batch, directions = seen.batch, seen.directions
        tensor = seen.sum_of_products(seen.bonds[:, None] * directions, directions)
        # The trace is the sum of the weights, unless atoms coincide.
        trace = tensor.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=1e-6)
        mean = mean_over_atoms((tensor / trace[:, None, None]).flatten(1), batch)
        xx, xy, xz, _, yy, yz, _, _, zz = mean.unbind(1)  # (B,) each
        xx, yy, zz = xx - 1 / 3, yy - 1 / 3, zz - 1 / 3
        square = xx * xx + yy * yy + zz * zz + 2 * (xy * xy + xz * xz + yz * yz)
        cube = xx * (yy * zz - yz * yz) - xy * (xy * zz - yz * xz)
        cube = cube + xz * (xy * yz - yy * xz)  # the determinant
        values = torch.stack(((1.5 * square).sqrt(), 13.5 * cube), dim=1)  # (B, 2)
        return mean_over_atoms(seen.nearest.unsqueeze(1), batch).squeeze(1), values

    def _composition(self, seen: Surroundings) -> Tensor:
        """Return statistics over the atoms of each crystal, (B, 4 * P)."""
        batch, values = seen.batch, seen.of_atoms(self.properties)  # (N, P)
        mean = mean_over_atoms(values, batch)  # (B, P)
        off = (values - gather_crystals(mean, batch)).abs()
        crystal = batch.batch.unsqueeze(1).expand_as(values)
        ends = [
            torch.zeros_like(mean).scatter_reduce(
                0, crystal, values.nan_to_num(), which, include_self=False
            )
            for which in ("amin", "amax")
        ]
        known = sum_over_atoms(values.isnan().float(), batch) == 0  # (B, P)
        ends = [end.masked_fill(~known, torch.nan) for end in ends]
        return torch.cat((mean, mean_over_atoms(off, batch), *ends), dim=1)
