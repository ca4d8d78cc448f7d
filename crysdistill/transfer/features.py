"""Frozen embeddings of a crystal as one feature vector for other models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crysdistill.encoders import Embeddings, Encoder
from crysdistill.graphs.batch import CrystalBatch, composition, mean_over_atoms
from crysdistill.structures.elements import element_table


class CrystalFeatures(nn.Module):
    """Mean and spread over atoms of the embeddings in every layer, and of elements.

    The composition itself is more accurate than a network's copy of it, so the vector
    holds both. It does not depend on the size of the chosen cell.

    Source: the layers side by side, H. Yamazaki et al., arXiv:2506.18497 (2025); the
    spread beside the mean, Chorna et al., arXiv:2512.05717 (2025); the composition
    beside the embeddings, S. Gong et al., Sci. Adv. 9, eadi3245 (2023),
    doi:10.1126/sciadv.adi3245.

    Args:
        encoder: the encoder of the embeddings; None uses the composition only.

    Attributes:
        width: D, the length of the vector.
    """

    elements: Tensor

    def __init__(self, encoder: Encoder | None) -> None:
        super().__init__()
        table = torch.from_numpy(element_table("cgcnn92")).float()  # (101, 92)
        self.register_buffer("elements", table, persistent=False)
        self.width = len(table) + 2 * table.shape[1]
        if encoder is not None:
            layers = 1 + len(encoder.blocks().convolutions)
            self.width += 2 * layers * encoder.width

    def forward(self, embeddings: Embeddings | None, batch: CrystalBatch) -> Tensor:
        """Return (B, D).

        Args:
            embeddings: with all layers; None without an encoder.
            batch: the crystals.
        """
        layers = embeddings.layers if embeddings else ()
        parts = [composition(batch, len(self.elements))]  # (B, 101)
        for x in (*layers, self.elements[batch.atomic_numbers]):
            mean = mean_over_atoms(x, batch)  # (B, F)
            square = mean_over_atoms((x - mean[batch.batch]).square(), batch)
            parts += [mean, square.sqrt()]
        return torch.cat(parts, dim=1)
