"""CrysGNN's pretraining as published, in plain PyTorch, for comparison.

This is our own re-implementation of the published computation and of its layout. The
encoder is padded and has five convolutions. A Python loop handles one crystal after the
other. The connectivity decoder makes two (n, n, 64) tensors that repeat every atom
beside every other of its crystal, and applies a bilinear layer and a linear one to all
of them. NT-Xent has the layout of pytorch-metric-learning, with one row for each
positive pair and one column for each negative pair of the batch.

Source: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892, and the code
published with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import PublishedConvolution

CLASSES = 6


class PublishedPretraining(nn.Module):
    """Encoder and decoders of CrysGNN."""

    def __init__(self, convolutions: int = 5, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Linear(92, width, bias=False)
        self.convolutions = nn.ModuleList(
            PublishedConvolution(width) for _ in range(convolutions)
        )
        self.pairs = nn.Bilinear(width, width, CLASSES)
        self.mix = nn.Linear(CLASSES, CLASSES)
        self.features = nn.Linear(width, 92)
        self.space_group = nn.Linear(width, 230)

    def forward(
        self,
        elements: Tensor,
        u: Tensor,
        neighbor: Tensor,
        crystals: list[Tensor],
        adjacency: list[Tensor],
        space_groups: Tensor,
        systems: Tensor,
    ) -> dict[str, Tensor]:
        """Return the four losses.

        Args:
            elements: (N, 92) element vectors.
            u: (N, 12, 41) Gaussians.
            neighbor: (N, 12).
            crystals: the atoms of each crystal.
            adjacency: for each crystal (n, n), how often j is a neighbour of i, up to
                5.
            space_groups: (B,), from 0.
            systems: (B,), from 0.
        """
        x = self.embedding(elements)
        for convolution in self.convolutions:
            x = convolution(x, u, neighbor)
        logits, bits, pooled = [], [], []
        for rows in crystals:
            h = F.normalize(x[rows], dim=1)  # (n, 64)
            n = len(rows)
            first = h.unsqueeze(1).repeat(1, n, 1)  # (n, n, 64)
            second = h.unsqueeze(0).repeat(n, 1, 1)  # (n, n, 64)
            pair = F.log_softmax(self.mix(self.pairs(first, second)), dim=-1)
            logits.append(pair.view(-1, CLASSES))
            bits.append(self.features(h))
            pooled.append(h.mean(dim=0))
        weight = torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0, 1.0])
        labels = torch.cat([a.view(-1) for a in adjacency])
        z = torch.stack(pooled)  # (B, 64)
        return {
            "node_features": F.binary_cross_entropy_with_logits(
                torch.cat(bits), elements
            ),
            "connectivity": F.nll_loss(torch.cat(logits), labels, weight),
            "space_group": F.nll_loss(
                F.log_softmax(self.space_group(z), dim=1), space_groups
            ),
            "crystal_system": nt_xent(z, systems),
        }


def nt_xent(z: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Return NT-Xent over all positive pairs, each against its anchor's negatives."""
    unit = F.normalize(z, dim=1)
    scores = unit @ unit.T / temperature
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    itself = torch.eye(len(z), dtype=torch.bool)
    anchor, positive = torch.where(same & ~itself)  # (P,)
    other_anchor, negative = torch.where(~same)  # (M,)
    right = scores[anchor, positive].unsqueeze(1)  # (P, 1)
    own = other_anchor.unsqueeze(0) == anchor.unsqueeze(1)  # (P, M)
    wrong = scores[other_anchor, negative].unsqueeze(0).expand(len(anchor), -1)
    wrong = wrong.masked_fill(~own, torch.finfo(scores.dtype).min)  # (P, M)
    most = torch.maximum(right, wrong.max(dim=1, keepdim=True).values).detach()
    numerator = torch.exp(right - most).squeeze(1)  # (P,)
    denominator = torch.exp(wrong - most).sum(dim=1) + numerator
    tiny = torch.finfo(scores.dtype).tiny
    return -torch.log(numerator / denominator + tiny).mean()
