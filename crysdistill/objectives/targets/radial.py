"""Targets: the distances and elements of the neighbours."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.objectives.fingerprint import WEIGHTS, element_weights
from crysdistill.objectives.targets.elements import standard_table
from crysdistill.objectives.targets.family import Column, Family, signed_root
from crysdistill.objectives.targets.surroundings import Surroundings

__all__ = ["WIDE_WEIGHTS", "Radial"]

WIDE_WEIGHTS = (
    "period",
    "mendeleev_number",
    "log_mass",
    "ionization_energy",
    "electron_affinity",
    "van_der_waals_radius",
    "melting_point",
    "s_electrons",
    "p_electrons",
    "d_electrons",
    "f_electrons",
    "unpaired_electrons",
)
"""Element properties that weight the neighbours in the wide shells."""


class Radial(Family):
    """Radial symmetry functions: weighted counts of neighbours in shells.

    Twelve shells of 0.5 Å have the five weights of the objective `fingerprint`; these
    targets are roots. Six shells of 1.1 Å have twelve more element properties. These
    are standardised over the elements, so that their sums measure how much the
    neighbours differ from the mean element. Pure numbers. Only neighbours in the graph
    count.

    Source: see `crysdistill.objectives.fingerprint.fingerprints`.
    """

    name: ClassVar[str] = "radial"
    level: ClassVar[Literal["atoms", "crystals"]] = "atoms"

    narrow: Tensor
    wide: Tensor
    narrow_weights: Tensor
    wide_weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        buffers = {
            "narrow": torch.linspace(1.0, 6.5, 12),
            "wide": torch.linspace(1.0, 6.5, 6),
            "narrow_weights": element_weights(),
            "wide_weights": standard_table(WIDE_WEIGHTS),
        }
        for name, table in buffers.items():
            self.register_buffer(name, table, persistent=False)
        self.columns = tuple(
            Column(f"{weight} at {radius:.1f} Å")
            for radii, weights in (
                (self.narrow, ("count", *WEIGHTS)),
                (self.wide, WIDE_WEIGHTS),
            )
            for radius in radii.tolist()
            for weight in weights
        )

    def compute(self, seen: Surroundings) -> Tensor:
        """Return the compressed sums, (N, 12 * 5 + 6 * 12)."""
        narrow, wide = (
            seen.sum_of_products(_shells(seen, radii), seen.of_neighbours(weights))
            for radii, weights in (
                (self.narrow, self.narrow_weights),
                (self.wide, self.wide_weights),
            )
        )  # (N, 12, 5) and (N, 6, 12)
        parts = narrow.sqrt().flatten(1), signed_root(wide).flatten(1)
        return torch.cat(parts, dim=1)


def _shells(seen: Surroundings, radii: Tensor) -> Tensor:
    """Return the weight of each neighbour in each shell, (E, R)."""
    spacing = radii[1] - radii[0]
    return torch.exp(-((seen.lengths[:, None] - radii) / spacing).square())
