"""CGCNN with attention, straight from its equations: one concatenation per edge."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import DiffGroupNorm

from benchmarks.plain_encoders.gatgnn import segment_softmax
from crysdistill.encoders.attention_cgcnn import AttentionCGCNN
from crysdistill.graphs.batch import CrystalBatch, distances


class PlainAttentionCGCNN(nn.Module):
    """The published layout, with the weights of one of our encoders."""

    def __init__(self, encoder: AttentionCGCNN) -> None:
        super().__init__()
        self.given, width = encoder.settings, encoder.width
        self.table = encoder.embedding.element_table
        self.expansion = encoder.expansion
        basis, heads = encoder.expansion.count, self.given["heads"]
        norms = {
            "none": nn.Identity,
            "batch": lambda: nn.BatchNorm1d(width),
            "group": lambda: DiffGroupNorm(width, 10),
        }
        self.embedding = nn.Linear(self.table.shape[1], width)
        self.core = nn.ModuleList(
            nn.Linear(2 * width + basis, width) for _ in encoder.convolutions
        )
        self.radial = nn.ModuleList(
            nn.Linear(basis, heads, bias=False)
            for layer in encoder.convolutions
            if layer.radial is not None
        )
        self.norm = nn.ModuleList(
            norms[self.given["norm"]]() for _ in encoder.convolutions
        )
        self.to(self.table.dtype)
        self.embedding.load_state_dict(encoder.embedding.linear.state_dict())
        for k, layer in enumerate(encoder.convolutions):
            self.core[k].load_state_dict(layer.core.state_dict())
            if layer.radial is not None:
                self.radial[k].load_state_dict(layer.radial.state_dict())
            state = layer.norm.state_dict()
            if self.given["norm"] == "group":
                state = {k.replace("assign", "lin"): v for k, v in state.items()}
            self.norm[k].load_state_dict(state)

    def forward(self, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return atoms (N, F) and crystals (B, F)."""
        x = self.embedding(self.table[batch.atomic_numbers])
        u = self.expansion(distances(batch))  # (E, K)
        neighbour, centre = batch.edge_index
        heads = self.given["heads"]
        for k, core in enumerate(self.core):
            v_i, v_j = x[centre], x[neighbour]
            scores = (v_i * v_j).view(len(u), heads, -1).sum(dim=2)
            if self.given["scores"] == "published":
                scores = scores * (u * u).sum(dim=1, keepdim=True)
            else:
                scores = scores / math.sqrt(x.shape[1] / heads) + self.radial[k](u)
            shares = segment_softmax(scores, centre, len(x))  # (E, H)
            shares = shares.repeat_interleave(x.shape[1] // heads, dim=1)  # (E, F)
            message = F.softplus(core(torch.cat((v_i, v_j, u), dim=1)))
            total = torch.zeros_like(x).index_add(0, centre, shares * message)
            x = x + self.norm[k](total)
        atoms = torch.bincount(batch.batch, minlength=batch.num_graphs)
        pooled = x.new_zeros(batch.num_graphs, x.shape[1])
        return x, pooled.index_add(0, batch.batch, x) / atoms.unsqueeze(1)
