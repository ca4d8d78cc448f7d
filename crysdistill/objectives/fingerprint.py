"""Objective: predict a fingerprint of an atom's neighbours."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    distances,
    gather_neighbours,
    sum_over_neighbours,
)
from crysdistill.objectives.explained import explained, sums_of
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    full_precision,
)
from crysdistill.objectives.views import masked_or_clean
from crysdistill.ranks import sum_over_ranks
from crysdistill.structures.elements import CGCNN_BLOCKS, cgcnn92

__all__ = ["WEIGHTS", "Fingerprint", "element_weights", "fingerprints"]

WEIGHTS = ("electronegativity", "covalent_radius", "valence_electrons", "atomic_volume")
"""Element properties by which neighbours are weighted, besides weight 1 for all."""

_LEAST_VARIANCE = 1e-3


def element_weights() -> Tensor:
    """Return (101, 1 + len(WEIGHTS)): 1, then each property's bin centre in (0, 1)."""
    table, columns, start = torch.from_numpy(cgcnn92()), [torch.ones(101)], 0
    for block, width in CGCNN_BLOCKS.items():
        if block in WEIGHTS:
            centre = (torch.arange(width) + 0.5) / width
            columns.append(table[:, start : start + width] @ centre)
        start += width
    return torch.stack(columns, dim=1)


def fingerprints(batch: CrystalBatch, radii: Tensor, weights: Tensor) -> Tensor:
    """Return weighted radial symmetry functions of every atom, (N, R * W).

    G_rw(i) = sum_j w(Z_j) exp(-((d_ij - radius_r) / spacing)^2), over the neighbours
    in the graph. They do not change when the same crystal is described differently.

    Source: M. Gastegger et al., J. Chem. Phys. 148, 241709 (2018),
    doi:10.1063/1.5019667, Eq. 9, without angles and without a cutoff function (the
    sum ends where the graph ends).

    Args:
        batch: the crystals, with their elements.
        radii: (R,) Å, evenly spaced.
        weights: (101, W), by atomic number.
    """
    spacing = radii[1] - radii[0]
    offsets = (distances(batch)[:, None] - radii) / spacing  # (E, R)
    shells = torch.exp(-offsets.square())  # (E, R)
    w = gather_neighbours(weights[batch.atomic_numbers], batch)  # (E, W)
    each = (shells.unsqueeze(2) * w.unsqueeze(1)).flatten(1)  # (E, R * W)
    return sum_over_neighbours(each, batch)  # (N, R * W)


class Fingerprint(Objective):
    """Regress a fingerprint of the surroundings of every atom.

    Each step computes the fingerprint (`fingerprints`) from the unchanged crystal. The
    atom's embedding predicts the square roots of its entries, all of which are of order
    one. If the view hides elements, the encoder has to guess hidden neighbours.

    Number: `fingerprint_r2`, the explained share of the variance over atoms, NaN if
    that variance is negligible; its chance level, 0, always answers the mean.

    Sources: the idea, S. Jia et al., arXiv:2503.01227 (2025); the fingerprint, see
    `fingerprints`.

    Args:
        encoder_width: F, the width of the embeddings.
        radii: the number of shells.
        longest: Å, the radius of the last shell; the first is at 1 Å.
        mask_fraction: the chance that an atom is hidden; 0 hides none.

    Raises:
        InputError: fewer than two radii, or a length or fraction out of range.
    """

    name: ClassVar[str] = "fingerprint"

    radii: Tensor
    element_weights: Tensor

    def __init__(
        self,
        encoder_width: int,
        *,
        radii: int = 12,
        longest: float = 6.5,
        mask_fraction: float = 0.15,
    ) -> None:
        super().__init__()
        if radii < 2:
            raise InputError(f"`radii` is {radii} but must be at least 2")
        if not longest > 1:
            raise InputError(f"`longest` is {longest} but must be more than 1 Å")
        self.views = (masked_or_clean(mask_fraction),)
        weights = element_weights()
        grid = torch.linspace(1.0, longest, radii)
        self.register_buffer("radii", grid, persistent=False)
        self.register_buffer("element_weights", weights, persistent=False)
        self.size = radii * weights.shape[1]
        self.decoder = nn.Sequential(
            nn.Linear(encoder_width, encoder_width),
            nn.SiLU(),
            nn.Linear(encoder_width, self.size),
        )
        sizes = {"count": 1, "wrong": 1, "total": self.size, "squares": 1}
        self.totals = Totals(**sizes)

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the unexplained share of each entry's variance, averaged over them."""
        predicted, wanted = self._compare(seen[0], batch)
        atoms = torch.full((), float(len(wanted)), device=wanted.device)
        atoms, total, squares = (
            sum_over_ranks(amount)
            for amount in (atoms, wanted.sum(dim=0), wanted.square().sum(dim=0))
        )
        variance = squares - total.square() / atoms  # (R * W,), times atoms
        wrong = (predicted - wanted).square().sum(dim=0)  # (R * W,)
        # An entry that hardly varies in this batch must not cause large steps.
        return (wrong / (variance + _LEAST_VARIANCE * atoms)).mean()

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        self.totals.update(**sums_of(*self._compare(seen[0], batch)))

    def compute(self) -> dict[str, float]:
        """Return the explained share of the variance, and its chance level."""
        sums = self.totals.compute()
        r2 = explained(sums, sums["count"])
        return {"fingerprint_r2": r2, "fingerprint_r2_chance": 0.0}

    def _compare(
        self, embedded: Embedded, batch: CrystalBatch
    ) -> tuple[Tensor, Tensor]:
        """Return predicted and true roots of the fingerprints, (N, R * W)."""
        with torch.no_grad():
            wanted = fingerprints(batch, self.radii, self.element_weights).sqrt()
        return full_precision(self.decoder(embedded.atoms)), wanted
