"""Objective: predict the space group of a crystal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    balanced_weights,
    full_precision,
    mean_over_ranks,
    ratio,
)
from crysdistill.objectives.views import masked_or_clean
from crysdistill.store.store import Store

__all__ = ["SPACE_GROUPS", "SpaceGroup"]

SPACE_GROUPS = 230
"""The number of space groups; number 0 means "not known" and is skipped."""


class SpaceGroup(Objective):
    """Classify crystal embeddings by space group: cross-entropy over 230 classes.

    Numbers: `space_group_top1` and `space_group_top5`, how often the right group is
    the most likely and among the five most likely. Their chance levels always answer
    the most common and the five most common groups of the validation crystals.

    Source: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892.

    Differs from the paper: rare space groups weigh more, by their counts in the corpus
    (a few groups hold most crystals), and some elements are hidden. All groups weigh
    the same before `prepare`, and with `balance` 0 as in CrysGNN.

    Args:
        crystal_width: F', the width of crystal embeddings.
        balance: weight of a space group = (its crystals)^-balance.
        mask_fraction: the chance that an atom's element is hidden from the encoder; 0,
            as in CrysGNN, hides none.

    Raises:
        InputError: `balance` or `mask_fraction` is not in [0, 1].
    """

    name: ClassVar[str] = "space_group"
    PUBLISHED: ClassVar[Mapping[str, Any]] = {"balance": 0.0, "mask_fraction": 0.0}

    class_weights: Tensor

    def __init__(
        self,
        crystal_width: int,
        *,
        balance: float = 0.5,
        mask_fraction: float = 0.15,
    ) -> None:
        super().__init__()
        self.views = (masked_or_clean(mask_fraction),)
        self.balance = balance
        weights = balanced_weights(torch.zeros(SPACE_GROUPS), balance)
        self.register_buffer("class_weights", weights, persistent=False)  # (230,)
        self.decoder = nn.Linear(crystal_width, SPACE_GROUPS)
        self.totals = Totals(top1=1, top5=1, crystals=SPACE_GROUPS)

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Set the class weights from the space groups of the training crystals."""
        groups = store.space_groups[rows, 0]
        counts = torch.from_numpy(np.bincount(groups, minlength=SPACE_GROUPS + 1))
        weights = balanced_weights(counts[1:], self.balance)  # 0 is "not known"
        self.class_weights.copy_(weights)

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the weighted mean cross-entropy of known crystals, in nats."""
        logits = full_precision(self.decoder(seen[0].crystals))  # (B, 230)
        known = batch.space_groups > 0
        label = (batch.space_groups - 1).clamp(min=0)  # (B,)
        nll = -logits.log_softmax(dim=1).gather(1, label.unsqueeze(1)).squeeze(1)
        weight = self.class_weights[label] * known  # (B,)
        return mean_over_ranks((weight * nll).sum(), weight.sum())

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        known = batch.space_groups > 0
        label = batch.space_groups[known] - 1
        likely = self.decoder(seen[0].crystals[known]).topk(5, dim=1).indices
        right = likely == label.unsqueeze(1)  # (known, 5)
        self.totals.update(
            top1=right[:, 0].sum(),
            top5=right.sum(),
            crystals=torch.bincount(label, minlength=SPACE_GROUPS),
        )

    def compute(self) -> dict[str, float]:
        """Return top-1 and top-5 accuracy, each beside its chance level."""
        sums = self.totals.compute()
        crystals = sums["crystals"].sum()
        common = sums["crystals"].topk(5).values
        return {
            "space_group_top1": ratio(sums["top1"], crystals),
            "space_group_top1_chance": ratio(common[0], crystals),
            "space_group_top5": ratio(sums["top5"], crystals),
            "space_group_top5_chance": ratio(common.sum(), crystals),
        }
