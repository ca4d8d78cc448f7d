"""What every encoder offers to objectives, heads and freezing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.graphs.batch import CrystalBatch, mean_over_atoms


@dataclass(frozen=True)
class Work:
    """What a training step must do at least, to hold against a machine's ceiling.

    Args:
        flops: floating-point operations; a multiply-add counts as two.
        bytes: moved from and to memory.
    """

    flops: float
    bytes: float


class Encoder(nn.Module, ABC):
    """From a batch of crystals to atom embeddings and crystal embeddings.

    Attributes:
        name: the key in `ENCODERS`.
        width: F, the width of both kinds of embedding.
        settings: the arguments that rebuild this encoder, as plain values.
        normalize: whether `pool` averages unit vectors, as CrysGNN does.
        elements: the name of the element table.
        element_table: (101, features), the element table; a buffer.
    """

    name: ClassVar[str]
    width: int
    settings: dict[str, Any]
    normalize: bool
    elements: str
    element_table: Tensor

    @abstractmethod
    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return atom embeddings, (N, F)."""

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """Return the embedding and then each convolution, in forward order."""

    def pool(self, atom_embeddings: Tensor, batch: CrystalBatch) -> Tensor:
        """Average atom embeddings (N, F) to crystal embeddings (B, F)."""
        if self.normalize:
            atom_embeddings = F.normalize(atom_embeddings, dim=1)
        return mean_over_atoms(atom_embeddings, batch)

    def work(self, crystals: int, atoms: int, edges: int) -> Work | None:
        """Estimate one training step, forward and backward; None where not known.

        Args:
            crystals: B, in the batch.
            atoms: N, in the batch.
            edges: E, in the batch.
        """
        return None
