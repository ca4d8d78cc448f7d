"""Objective: predict the element of an atom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    full_precision,
    mean_over_ranks,
    ratio,
)
from crysdistill.objectives.views import masked_or_clean
from crysdistill.structures.elements import ELEMENT_TABLES, element_table

__all__ = ["NodeFeatures"]


class NodeFeatures(Objective):
    """Reconstruct the element vector of an atom from its embedding.

    There is one logit per bit of the element table. The loss is the binary
    cross-entropy, averaged over target atoms and bits. By default the elements of the
    target atoms are hidden from the encoder, so that the answer has to come from their
    surroundings. In CrysGNN the encoder sees the vector to reconstruct, and the
    embeddings are L2-normalised first.

    Numbers: `feature_accuracy`, the share of bits on the right side of 1/2; its chance
    level answers the majority value of each bit. `element_accuracy`, how often the most
    likely row of the table is the atom's (elements with equal rows count as one); its
    chance level answers the most frequent row.

    Sources: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892;
    masking, W. Hu et al., ICLR 2020, arXiv:1905.12265.

    Args:
        encoder_width: F, the width of the embeddings.
        elements: the element table to reconstruct; usually the encoder's own.
        mask_fraction: the chance that an atom is hidden from the encoder; with 0 none
            is hidden and all atoms are targets.
        normalize: whether the decoder sees embeddings of length one.

    Raises:
        InputError: `mask_fraction` is not in [0, 1], or `elements` does not name a
            table of zeros and ones.
    """

    name: ClassVar[str] = "node_features"
    PUBLISHED: ClassVar[Mapping[str, Any]] = {"mask_fraction": 0.0, "normalize": True}

    table: Tensor
    same_row: Tensor

    def __init__(
        self,
        encoder_width: int,
        *,
        elements: str = "cgcnn92",
        mask_fraction: float = 0.15,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.views = (masked_or_clean(mask_fraction),)
        self.normalize = normalize
        table = _bit_table(elements)
        self.register_buffer("table", table, persistent=False)  # (101, bits)
        self.register_buffer("same_row", _first_equal_row(table), persistent=False)
        bits = table.shape[1]
        self.decoder = nn.Linear(encoder_width, bits)
        self.totals = Totals(
            atoms=1, bits_right=1, bits_set=bits, elements_right=1, rows=len(table)
        )

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the mean binary cross-entropy per bit, in nats."""
        logits, numbers = self._decode(seen[0], batch)
        total = F.binary_cross_entropy_with_logits(
            logits, self.table[numbers].to(logits.dtype), reduction="sum"
        )
        return mean_over_ranks(total, torch.full_like(total, logits.numel()))

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        logits, numbers = self._decode(seen[0], batch)
        bits = self.table[numbers] > 0.5  # (n, bits)
        # ln p(row r) = sum_b r_b z_b + terms that do not depend on r. Row 0, "no
        # element", is not a possible answer.
        likely = (logits.float() @ self.table[1:].T).argmax(dim=1) + 1  # (n,)
        rows = self.same_row[numbers]
        self.totals.update(
            atoms=torch.tensor(len(numbers), device=logits.device),
            bits_right=((logits > 0) == bits).sum(),
            bits_set=bits.sum(dim=0),
            elements_right=(self.same_row[likely] == rows).sum(),
            rows=torch.bincount(rows, minlength=len(self.table)),
        )

    def compute(self) -> dict[str, float]:
        """Return bit and element accuracy, each beside its chance level."""
        sums = self.totals.compute()
        atoms, ones = sums["atoms"], sums["bits_set"]
        majority = torch.maximum(ones, atoms - ones).sum()
        return {
            "feature_accuracy": ratio(sums["bits_right"], atoms * len(ones)),
            "feature_accuracy_chance": ratio(majority, atoms * len(ones)),
            "element_accuracy": ratio(sums["elements_right"], atoms),
            "element_accuracy_chance": ratio(sums["rows"].max(), atoms),
        }

    def _decode(self, embedded: Embedded, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return logits (n, bits) and atomic numbers (n,) of the target atoms."""
        atoms, numbers = embedded.atoms, batch.atomic_numbers
        if "masked_atoms" in embedded.batch:
            asked = embedded.batch.masked_atoms.nonzero().squeeze(1)
            atoms, numbers = atoms[asked], numbers[asked]
        if self.normalize:
            atoms = F.normalize(atoms, dim=1)
        return full_precision(self.decoder(atoms)), numbers


def _bit_table(elements: str) -> Tensor:
    """Return the element table of that name, (101, bits), zeros and ones."""
    if elements not in ELEMENT_TABLES:
        raise InputError(
            f"`elements` is {elements!r} but must be one of "
            f"{', '.join(ELEMENT_TABLES)}{did_you_mean(elements, ELEMENT_TABLES)}"
        )
    table = torch.from_numpy(element_table(elements))
    if not ((table == 0) | (table == 1)).all():
        raise InputError(
            f"`elements` is {elements!r}, whose values are not all 0 or 1, but "
            "`node_features` reconstructs bits"
        )
    return table


def _first_equal_row(table: Tensor) -> Tensor:
    """Return for each row the index of the first row equal to it, (rows,) int64."""
    equal = (table.unsqueeze(0) == table.unsqueeze(1)).all(dim=2)  # (rows, rows)
    return equal.int().argmax(dim=1)
