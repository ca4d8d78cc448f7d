"""Objective: bring together crystals of one class that follows from the structure."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.layers.settings import one_of
from crysdistill.objectives.contrastive import Contrast
from crysdistill.objectives.objective import Embedded
from crysdistill.objectives.targets.elements import property_table
from crysdistill.ranks import sum_over_ranks

__all__ = ["CLASSES", "Surrogate", "anion_groups", "stoichiometries"]

CLASSES = ("stoichiometry", "anion", "space_group")
"""The ways to sort crystals into classes."""

_ELEMENTS = 128  # a power of two above the last atomic number
_FACTOR = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: odd, bits without a pattern
_LABEL_BITS = 24  # float32 holds integers of so many bits exactly


class Surrogate(Contrast):
    """Contrast crystals by a class that follows from the crystal itself.

    Classes are `stoichiometry`, such as AB2C4, whatever A, B and C are; `anion`, the
    group of the periodic table of the most electronegative element; `space_group`.
    The class replaces a property for which there are no labels.

    Number: `surrogate_retrieval`, how often the nearest other validation crystal, by
    cosine of crystal embeddings, is of the same class. The chance level draws the other
    crystal at random.

    Sources: surrogate labels for crystals, C. M. A. Rahman, A. H. Romero and P. K.
    Gyawali, arXiv:2504.20112 (2025); the losses, see `nt_xent` and
    `supervised_contrastive`.

    Differs from the papers:

    - Classes need no label: they follow from the crystal alone.
    - The loss is divided by ln of the number of crystals that each is compared with, so
      that it is about 1 for equal scores.
    - There is one view of a crystal, not two.

    Args:
        crystal_width: F', the width of crystal embeddings.
        classes: `stoichiometry`, `anion` or `space_group`.
        loss: `supcon` or `nt-xent`.
        projection: whether there is a projection head.
        temperature: T, which divides cosines.
        mask_fraction: the chance that an atom's element is hidden from the encoder; 0
            hides none.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "surrogate"
    number: ClassVar[str] = "surrogate"

    properties: Tensor

    def __init__(
        self,
        crystal_width: int,
        *,
        classes: Literal["stoichiometry", "anion", "space_group"] = "anion",
        loss: Literal["supcon", "nt-xent"] = "supcon",
        projection: bool = True,
        temperature: float = 0.07,
        mask_fraction: float = 0.15,
    ) -> None:
        super().__init__(crystal_width, loss, projection, temperature, mask_fraction)
        one_of("classes", classes, CLASSES)
        self.kind = classes
        table = property_table(["electronegativity", "group"]).nan_to_num(0.0)
        self.register_buffer("properties", table, persistent=False)  # (101, 2)

    def classes(self, batch: CrystalBatch) -> Tensor:
        """Return the class of each crystal, (B,); -1 where unknown."""
        if self.kind == "stoichiometry":
            return stoichiometries(batch)
        if self.kind == "anion":
            return anion_groups(batch, self.properties)
        return batch.space_groups.long() - 1

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the contrastive loss, divided by the loss for equal scores."""
        known = sum_over_ranks((self.classes(batch) >= 0).sum())
        # With one other crystal the loss is 0, and so would ln 1 be: divide by ln 2.
        equal = (known - 1).clamp(min=2).double().log()
        return super().forward(seen, batch, seed) / equal.float()


def stoichiometries(batch: CrystalBatch) -> Tensor:
    """Return a number for each crystal's formula, whatever its elements, (B,).

    NaCl and CsI share one number, Mg2Si and CaF2 another. Two different formulas get
    the same number in about one of 2^24 pairs.
    """
    place = batch.batch * _ELEMENTS + batch.atomic_numbers
    counts = torch.bincount(place, minlength=batch.num_graphs * _ELEMENTS)
    counts = counts.view(-1, _ELEMENTS).sort(dim=1, descending=True).values
    common = counts  # (B, elements), halved until one is left
    while common.shape[1] > 1:
        common = torch.gcd(*common.chunk(2, dim=1))
    counts = counts // common
    # The highest bits of a sum of c_k f^(k+1), modulo 2^64.
    powers = [pow(_FACTOR, k + 1, 1 << 64) for k in range(_ELEMENTS)]
    signed = [power - (power >> 63 << 64) for power in powers]
    words = (counts * torch.tensor(signed, device=counts.device)).sum(dim=1)  # (B,)
    return (words >> (64 - _LABEL_BITS)) & ((1 << _LABEL_BITS) - 1)


def anion_groups(batch: CrystalBatch, properties: Tensor) -> Tensor:
    """Return the group of the most electronegative element of each crystal, (B,).

    Args:
        batch: the crystals.
        properties: (101, 2), electronegativity and group by atomic number. If two
            elements are equally electronegative, the higher group counts.
    """
    electronegativity, group = properties[batch.atomic_numbers].unbind(1)  # (N,)
    nothing = torch.zeros(batch.num_graphs, device=group.device)
    most = nothing.scatter_reduce(0, batch.batch, electronegativity, "amax")
    group = group.masked_fill(electronegativity < most[batch.batch], 0.0)
    return nothing.scatter_reduce(0, batch.batch, group, "amax").long()
