"""DeeperGATGNN in its published layout: one row for every edge, PyG's group norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import DiffGroupNorm
from torch_geometric.nn.aggr import Set2Set

from benchmarks.plain_encoders.gatgnn import (
    PlainAttention,
    PlainGlobalAttention,
    counted_composition,
)
from crysdistill.encoders.deeper_gatgnn import COMPOSITION, DeeperGATGNN
from crysdistill.graphs.batch import CrystalBatch, distances


class PlainDeeperGATGNN(nn.Module):
    """The published layout, with the weights of one of our encoders."""

    def __init__(self, encoder: DeeperGATGNN) -> None:
        super().__init__()
        self.given, width = encoder.settings, encoder.width
        norms = {
            "none": nn.Identity,
            "batch": lambda: nn.BatchNorm1d(width),
            "group": lambda: DiffGroupNorm(width, 10),
        }
        self.table = encoder.embedding.atoms.element_table
        self.expansion = encoder.expansion
        self.atoms = nn.Linear(self.table.shape[1] + self.given["degrees"], width)
        self.edges = nn.Linear(self.given["gaussians"], width)
        self.attention = nn.ModuleList(
            PlainAttention(width, self.given["heads"]) for _ in encoder.convolutions
        )
        self.norm = nn.ModuleList(
            norms[self.given["norm"]]() for _ in encoder.convolutions
        )
        self.weigh = PlainGlobalAttention(width, COMPOSITION, (width, width))
        self.set2set = (
            None if self.given["pooling"] == "attention" else Set2Set(width, 3)
        )
        self.to(self.table.dtype)
        self._copy(encoder)

    def _copy(self, encoder: DeeperGATGNN) -> None:
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (self.atoms, encoder.embedding.atoms.linear),
            (self.edges, encoder.embedding.edges),
            (self.weigh, encoder.pooling.attention),
        ]
        for k, convolution in enumerate(encoder.convolutions):
            pairs.append((self.attention[k], convolution.attention))
            if self.given["norm"] == "group":
                pairs.append((self.norm[k].lin, convolution.norm.assign))
                pairs.append((self.norm[k].norm, convolution.norm.norm))
            else:
                pairs.append((self.norm[k], convolution.norm))
        for plain, ours in pairs:
            plain.load_state_dict(ours.state_dict())
        if self.set2set is not None:
            cell = encoder.pooling.set2set.lstm.state_dict()
            self.set2set.lstm.load_state_dict({f"{k}_l0": v for k, v in cell.items()})

    def forward(
        self, batch: CrystalBatch, u: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return atoms (N, F) and crystals (B, F')."""
        x = self.table[batch.atomic_numbers]
        if self.given["degrees"]:
            degree = torch.bincount(batch.edge_index[1], minlength=len(x)) + 1
            degree = degree.clamp(max=self.given["degrees"] - 1)
            columns = F.one_hot(degree, self.given["degrees"]).to(x.dtype)
            x = torch.cat((x, columns), dim=1)
        x = F.leaky_relu(self.atoms(x), 0.2)
        u = self.expansion(distances(batch)) if u is None else u  # (E, K)
        edges = F.leaky_relu(self.edges(u), 0.2)
        for attention, norm in zip(self.attention, self.norm, strict=True):
            heard = norm(attention(x, edges, batch.edge_index))
            x = heard + x if self.given["skip"] else heard
        shares = counted_composition(batch, COMPOSITION)
        weights = self.weigh(x, shares, batch)
        if self.set2set is None:
            pooled = x.new_zeros(batch.num_graphs, x.shape[1])
            return x, pooled.index_add(0, batch.batch, x * weights)
        if self.given["pooling"] == "set2set":
            atoms = torch.bincount(batch.batch, minlength=batch.num_graphs)
            weights = weights * atoms[batch.batch].unsqueeze(1)
        return x, self.set2set(x * weights, batch.batch)
