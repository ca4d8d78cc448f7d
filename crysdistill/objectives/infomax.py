"""Objective: predict which crystal of the batch an atom belongs to."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.graphs.randomness import per_atom_integers
from crysdistill.layers.settings import at_least
from crysdistill.objectives.nearest import OwnIsBest
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    full_precision,
    mean_over_ranks,
)
from crysdistill.objectives.views import masked_or_clean
from crysdistill.ranks import gather_rows

__all__ = ["Infomax"]


class Infomax(Objective):
    """Tell an atom's own crystal from the others of the batch.

    The score T of an atom and a crystal is the product of their projected embeddings
    over sqrt(P). With softplus(x) = ln(1 + e^x), the loss is the mean of softplus(-T)
    over atoms and their own crystals, plus the mean of softplus(T) over atoms and all
    other crystals, all over 2 ln 2. It is a bound on their mutual information in the
    sense of Jensen and Shannon, and it is 1 if all scores are 0. The other crystals are
    those of all ranks.

    Number: `infomax_accuracy`. One atom is drawn at random from each validation
    crystal; the accuracy is how often its own crystal has the highest score of all
    validation crystals. The chance level is 1 over the number of these crystals.

    Source: F.-Y. Sun et al., ICLR 2020, arXiv:1908.01000 (InfoGraph), with
    its Jensen-Shannon estimator.

    Differs from the paper:

    - The loss is divided by 2 ln 2, and scores by sqrt(P).
    - An atom's embedding is that after the last convolution; the paper concatenates
      those of all layers.

    Args:
        encoder_width: F, the width of atom embeddings.
        crystal_width: F', the width of crystal embeddings.
        projected: P, the width of the projected embeddings.
        mask_fraction: the chance that an atom is hidden from the encoder; 0 hides none.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "infomax"

    def __init__(
        self,
        encoder_width: int,
        crystal_width: int,
        *,
        projected: int = 64,
        mask_fraction: float = 0.15,
    ) -> None:
        super().__init__()
        self.views = (masked_or_clean(mask_fraction),)
        at_least(2, projected=projected)
        self.of_atoms, self.of_crystals = (
            nn.Sequential(
                nn.Linear(width, projected), nn.ReLU(), nn.Linear(projected, projected)
            )
            for width in (encoder_width, crystal_width)
        )
        self.found = OwnIsBest(projected)

    def _project(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """Return atoms (N, P) and crystals (B, P), ready for a product."""
        atoms = full_precision(self.of_atoms(embedded.atoms))
        return atoms, full_precision(self.of_crystals(embedded.crystals))

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the loss; 0 if there is only one crystal."""
        atoms, crystals = self._project(seen[0])
        everyone, first = gather_rows(crystals)  # (C, P)
        with torch.autocast(atoms.device.type, enabled=False):
            scores = atoms @ everyone.T / math.sqrt(atoms.shape[1])  # (N, C)
        own = (batch.batch + first).unsqueeze(1)  # (N, 1)
        right = scores.gather(1, own)
        others = F.softplus(scores).sum() - F.softplus(right).sum()
        total = F.softplus(-right).sum() + others / max(1, len(everyone) - 1)
        loss = mean_over_ranks(total, torch.full_like(total, len(atoms)))
        return loss * float(len(everyone) > 1) / (2 * math.log(2))

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the number."""
        atoms, crystals = self._project(seen[0])
        draw = per_atom_integers(batch, seed, "infomax judged atoms")  # (N,)
        lowest = torch.full_like(batch.rows, torch.iinfo(draw.dtype).max)
        lowest = lowest.scatter_reduce(0, batch.batch, draw, "amin")  # (B,)
        drawn = (draw == lowest[batch.batch]).nonzero().squeeze(1)  # (B,)
        self.found.update(atoms[drawn], crystals)

    def compute(self) -> dict[str, float]:
        """Return the accuracy beside its chance level."""
        accuracy, chance = self.found.compute()
        return {
            "infomax_accuracy": accuracy.item(),
            "infomax_accuracy_chance": chance.item(),
        }
