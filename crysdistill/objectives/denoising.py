"""Objective: predict how moved atoms changed bond lengths, and the noise level."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    distances,
    gather_centres,
)
from crysdistill.graphs.randomness import per_bond_uniform
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.settings import positive
from crysdistill.objectives.explained import explained, sums_of
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    full_precision,
    mean_over_ranks,
)
from crysdistill.objectives.views import Chain, MovedAtoms, View, masked_or_clean

__all__ = ["Denoising"]

_SPACING = 0.2  # Å, between the Gaussians that expand a length

# Two atoms that move independently by u sigma along each axis change the length of
# their bond by a number with variance 2 u^2 sigma^2. With u uniform in [0, 1]:
_DEVIATION = math.sqrt(2 / 3)  # of a change, in sigma
_MEAN_LEVEL = math.sqrt(1 / 2)  # of a crystal's root mean square change, in sigma
_LEVEL_DEVIATION = math.sqrt(1 / 6)


class Denoising(Objective):
    """Predict how much noise on the atoms of a crystal has changed its bonds.

    Each crystal has its own noise level, uniform between 0 and `sigma`. There are two
    targets. The first is the change of length of a share of the edges. It is predicted
    from the embeddings of both ends and from the length after the move, and both
    directions of an edge give the same answer. The second is the root mean square
    change of all lengths of the crystal. Both are in units of what independent moves
    would give. The loss is the mean of the two mean squared errors: about 1 if every
    answer is the mean, and less in cells so small that atoms move with their own
    images.

    Numbers: `denoising_bond_r2` and `denoising_level_r2`, the explained shares of the
    variance; their chance level, 0, always answers the mean.

    Source: S. Zaidi et al., ICLR 2023, arXiv:2206.00133.

    Differs from the paper: changes of lengths replace the moves themselves, because
    embeddings that do not turn with the crystal hold no direction; the scale of the
    noise is drawn at random and is itself a target.

    Args:
        encoder_width: F, the width of atom embeddings.
        crystal_width: F', the width of crystal embeddings.
        sigma: Å, the largest standard deviation along each axis.
        bonds: the chance that a bond is a target.
        longest: Å, the centre of the last Gaussian of lengths; the graph's cutoff.
        mask_fraction: the chance that an atom's element is hidden too.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "denoising"

    def __init__(
        self,
        encoder_width: int,
        crystal_width: int,
        *,
        sigma: float = 0.05,
        bonds: float = 0.25,
        longest: float = 8.0,
        mask_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        view: View = MovedAtoms(sigma, drawn=True)
        hidden = masked_or_clean(mask_fraction)
        self.views = (Chain((hidden, view)) if mask_fraction else view,)
        if not 0 < bonds <= 1:
            raise InputError(f"`bonds` is {bonds} but must be above 0 and at most 1")
        positive(longest=longest)
        self.sigma, self.bonds = sigma, bonds
        self.basis = Gaussians(0.0, longest, round(longest / _SPACING) + 1, _SPACING)
        # Both ends are summed after a linear layer. So the matrix product is needed
        # once per atom, and an edge needs only the product for its length.
        self.of_atoms = nn.Linear(encoder_width, encoder_width, bias=False)
        self.of_lengths = nn.Linear(self.basis.count, encoder_width)
        self.change = nn.Sequential(nn.SiLU(), nn.Linear(encoder_width, 1))
        self.level = nn.Sequential(
            nn.Linear(crystal_width, crystal_width),
            nn.SiLU(),
            nn.Linear(crystal_width, 1),
        )
        sizes = {"count": 1, "wrong": 1, "total": 1, "squares": 1}
        self.of_bonds, self.of_levels = Totals(**sizes), Totals(**sizes)

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the mean of both mean squared errors."""
        found = self._compare(seen[0], batch, seed)
        totals = torch.stack([(p - t).square().sum() for p, t in found])  # (2,)
        counts = totals.new_tensor([len(t) for _, t in found])  # bonds, crystals
        return mean_over_ranks(totals, counts).mean()

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        found = self._compare(seen[0], batch, seed)
        for totals, (said, wanted) in zip(
            (self.of_bonds, self.of_levels), found, strict=True
        ):
            totals.update(**sums_of(said, wanted))

    def compute(self) -> dict[str, float]:
        """Return both explained shares of variance beside their chance levels."""
        numbers: dict[str, float] = {}
        for name, totals in (("bond", self.of_bonds), ("level", self.of_levels)):
            sums = totals.compute()
            numbers[f"denoising_{name}_r2"] = explained(sums, sums["count"])
            numbers[f"denoising_{name}_r2_chance"] = 0.0
        return numbers

    @torch.no_grad()
    def wanted(
        self, embedded: Embedded, batch: CrystalBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return lengths after the move, their changes, (E,), and levels, (B,).

        Fake edges do not change and count in no level.

        Args:
            embedded: holds the moved crystals, with the same edges as `batch`.
            batch: the crystals before the move.
        """
        # Half precision would ruin positions and distances.
        with torch.autocast(batch.cell.device.type, enabled=False):
            lengths = distances(embedded.batch)  # (E,)
            changes = (lengths - distances(batch)) / self.sigma
        crystal = gather_centres(batch.batch, batch)  # (E,)
        real = torch.ones_like(changes)
        if "padding" in batch:
            real = real.masked_fill(batch.padding, 0.0)
        sums = changes.new_zeros(2, batch.num_graphs)
        sums = sums.index_add(1, crystal, torch.stack((real * changes.square(), real)))
        return lengths, changes, (sums[0] / sums[1].clamp(min=1)).sqrt()

    def _compare(
        self, embedded: Embedded, batch: CrystalBatch, seed: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return predictions and targets, of bonds (n, 1) and of crystals (B, 1)."""
        lengths, changes, levels = self.wanted(embedded, batch)
        asked = per_bond_uniform(batch, seed, "denoising bonds") < self.bonds  # (E,)
        if "padding" in batch:
            asked = asked & ~batch.padding
        edges = asked.nonzero().squeeze(1)  # (n,)
        ends = self.of_atoms(embedded.atoms)  # (N, F)
        neighbour, centre = batch.edge_index[:, edges]
        both = ends.index_select(0, neighbour) + ends.index_select(0, centre)  # (n, F)
        said = self.change(both + self.of_lengths(self.basis(lengths[edges])))  # (n, 1)
        level = (levels - _MEAN_LEVEL) / _LEVEL_DEVIATION
        return [
            (full_precision(said), changes[edges].unsqueeze(1) / _DEVIATION),
            (full_precision(self.level(embedded.crystals)), level.unsqueeze(1)),
        ]
