"""Contrast of crystals by class: losses, and a common base class."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.layers.settings import one_of, positive
from crysdistill.objectives.nearest import NearestIsAlike
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    full_precision,
    mean_over_ranks,
)
from crysdistill.objectives.views import masked_or_clean
from crysdistill.ranks import gather_rows

__all__ = [
    "LOSSES",
    "Contrast",
    "nt_xent",
    "supervised_contrastive",
]

# ------------------------------------------------------------------ the losses
#
# Both take anchors and the candidates to compare them with. In one process these are
# the same crystals. With several, the candidates are the crystals of all ranks, and
# `first` is the place of the first anchor among them. Each loss returns the sum of its
# terms and their number.


def _compare(
    anchors: Tensor,
    labels: Tensor,
    others: Tensor,
    other_labels: Tensor,
    first: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled cosines and masks of positive and negative pairs, each (A, C).

    Crystals with a label below 0 are in no pair, and no crystal is paired with itself.
    """
    # Half precision is too coarse: one step of bfloat16 near cosine 1, divided by
    # 0.07, is a factor of 1.06 in every exponential.
    with torch.autocast(device_type=anchors.device.type, enabled=False):
        a = F.normalize(full_precision(anchors), dim=1)
        c = F.normalize(full_precision(others), dim=1)
        scores = a @ c.T / temperature  # (A, C)
    known = (labels >= 0).unsqueeze(1) & (other_labels >= 0)
    same = labels.unsqueeze(1) == other_labels
    here = torch.arange(len(labels), device=labels.device) + first
    itself = here.unsqueeze(1) == torch.arange(len(other_labels), device=labels.device)
    return scores, known & same & ~itself, known & ~same


def _logsumexp_where(scores: Tensor, mask: Tensor) -> Tensor:
    """Return ln sum exp over the columns in `mask`, (A,); hugely negative for none."""
    # Not -inf: its gradient would be NaN.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4).logsumexp(1)


def nt_xent(
    anchors: Tensor,
    labels: Tensor,
    others: Tensor,
    other_labels: Tensor,
    first: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the sum of NT-Xent over positive pairs, and the number of these pairs.

    For a positive pair (a, p), with n over the negatives of a and s a cosine:
    -ln(exp(s_ap / T) / (exp(s_ap / T) + sum_n exp(s_an / T))). Other positives of a
    are not in its denominator. An anchor without negatives adds terms that are zero.

    Sources: K. Sohn, NeurIPS 2016 (for the form); T. Chen et al., ICML 2020,
    arXiv:2002.05709, Eq. 1; with labels as in pytorch-metric-learning's `NTXentLoss`,
    which CrysGNN calls.
    """
    scores, positive, negative = _compare(
        anchors, labels, others, other_labels, first, temperature
    )
    # -ln(e^p / (e^p + e^l)) = softplus(l - p), with l = ln sum_n exp(s_an / T)
    against = _logsumexp_where(scores, negative).unsqueeze(1)  # (A, 1)
    terms = F.softplus(against - scores) * positive  # (A, C)
    return terms.sum(), positive.sum().to(terms.dtype)


def supervised_contrastive(
    anchors: Tensor,
    labels: Tensor,
    others: Tensor,
    other_labels: Tensor,
    first: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the sum of SupCon over anchors with a positive, and the number of these.

    For an anchor a: the mean over its positives p of
    -ln(exp(s_ap / T) / sum_{k != a} exp(s_ak / T)).

    Source: P. Khosla et al., NeurIPS 2020, arXiv:2004.11362, Eq. 2.
    """
    scores, positive, negative = _compare(
        anchors, labels, others, other_labels, first, temperature
    )
    against = _logsumexp_where(scores, positive | negative)  # (A,)
    number = positive.sum(dim=1)
    mean_score = (scores * positive).sum(dim=1) / number.clamp(min=1)  # (A,)
    has = number > 0
    terms = torch.where(has, against - mean_score, torch.zeros_like(against))  # Eq. 2
    return terms.sum(), has.sum().to(terms.dtype)


LOSSES = {"supcon": supervised_contrastive, "nt-xent": nt_xent}
"""Contrastive losses by the name that configurations use."""


# ---------------------------------------------------------------------- the base class


class Contrast(Objective):
    """Bring crystals of one class together, and crystals of different classes apart.

    A subclass defines the classes.

    Attributes:
        number: the first part of the name of its number, `NUMBER_retrieval`.

    Args:
        crystal_width: F', the width of crystal embeddings.
        loss: a name in `LOSSES`.
        projection: whether there is a projection head.
        temperature: T, which divides cosines.
        mask_fraction: the chance that an atom is hidden from the encoder.

    Raises:
        InputError: a setting is out of range.
    """

    number: ClassVar[str]

    def __init__(
        self,
        crystal_width: int,
        loss: str,
        projection: bool,
        temperature: float,
        mask_fraction: float,
    ) -> None:
        super().__init__()
        self.views = (masked_or_clean(mask_fraction),)
        one_of("loss", loss, LOSSES)
        positive(temperature=temperature)
        self.loss = LOSSES[loss]
        self.temperature = temperature
        self.projection: nn.Module = nn.Identity()
        if projection:
            self.projection = nn.Sequential(
                nn.Linear(crystal_width, crystal_width),
                nn.ReLU(),
                nn.Linear(crystal_width, crystal_width),
            )
        self.retrieval = NearestIsAlike(crystal_width)

    @abstractmethod
    def classes(self, batch: CrystalBatch) -> Tensor:
        """Return the class of each crystal, (B,) int64; below 0 where unknown."""

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the contrastive loss, in nats."""
        anchors = self.projection(seen[0].crystals)  # (B, F')
        labels = self.classes(batch)  # (B,)
        others, first = gather_rows(anchors)
        other_labels, _ = gather_rows(labels)
        total, terms = self.loss(
            anchors, labels, others, other_labels, first, self.temperature
        )
        return mean_over_ranks(total, terms)

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        self.retrieval.update(seen[0].crystals, self.classes(batch))

    def compute(self) -> dict[str, float]:
        """Return the retrieval precision beside its chance level."""
        precision, chance = self.retrieval.compute()
        return {
            f"{self.number}_retrieval": precision.item(),
            f"{self.number}_retrieval_chance": chance.item(),
        }
