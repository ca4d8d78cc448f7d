"""GATGNN in its published layout: one concatenation for every edge and every atom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.encoders.gatgnn import COMPOSITION, GATGNN
from crysdistill.graphs.batch import CrystalBatch, distances


def segment_softmax(scores: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Return weights (rows, H) that sum to one over the rows of each owner."""
    index = owner.unsqueeze(1).expand_as(scores)
    largest = scores.new_full((owners, scores.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, index, scores.detach(), "amax")
    weights = torch.exp(scores - largest[owner])
    total = weights.new_zeros(largest.shape).index_add(0, owner, weights)
    return weights / total[owner]


class PlainAttention(nn.Module):
    """The augmented graph attention layer, with one row per edge throughout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.weight = nn.Parameter(torch.empty(heads * width, 2 * width))
        self.score = nn.Parameter(torch.empty(heads, 2 * width))
        self.bias = nn.Parameter(torch.empty(width))
        self.norm = nn.BatchNorm1d(heads)

    def forward(self, x: Tensor, edges: Tensor, edge_index: Tensor) -> Tensor:
        """Update atoms (N, F) with edges (E, F)."""
        neighbour, centre = edge_index
        h_i = F.softplus(torch.cat((x[centre], edges), dim=1) @ self.weight.T)
        h_j = F.softplus(torch.cat((x[neighbour], edges), dim=1) @ self.weight.T)
        h_i = h_i.view(-1, self.heads, self.width)
        h_j = h_j.view(-1, self.heads, self.width)
        scores = F.softplus((torch.cat((h_i, h_j), dim=2) * self.score).sum(dim=2))
        scores = F.softplus(self.norm(scores))
        shares = segment_softmax(scores, centre, len(x))  # (E, H)
        messages = h_j * shares.unsqueeze(2)  # (E, H, F)
        total = messages.new_zeros(len(x), *messages.shape[1:])
        return total.index_add(0, centre, messages).mean(dim=1) + self.bias


class PlainGlobalAttention(nn.Module):
    """Weights of atoms, with the composition repeated for every atom."""

    def __init__(self, width: int, elements: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.first = nn.Linear(width + elements, hidden[0])
        sizes = [*hidden, 1]
        self.rest = nn.ModuleList(
            nn.Linear(sizes[k], sizes[k + 1]) for k in range(len(hidden))
        )

    def forward(self, x: Tensor, shares: Tensor, batch: CrystalBatch) -> Tensor:
        """Return weights (N, 1)."""
        hidden = self.first(torch.cat((x, shares[batch.batch]), dim=1))
        for layer in self.rest:
            hidden = layer(F.softplus(hidden))
        return segment_softmax(hidden, batch.batch, batch.num_graphs)


def counted_composition(batch: CrystalBatch, elements: int) -> Tensor:
    """Return the share of each atomic number in each crystal, (B, elements)."""
    kinds = F.one_hot(batch.atomic_numbers, elements).to(batch.cell.dtype)  # (N, ...)
    total = kinds.new_zeros(batch.num_graphs, elements)
    total = total.index_add(0, batch.batch, kinds)
    return total / total.sum(dim=1, keepdim=True)


class PlainGATGNN(nn.Module):
    """The published layout, with the weights of one of our encoders."""

    def __init__(self, encoder: GATGNN) -> None:
        super().__init__()
        width, heads = encoder.width, encoder.settings["heads"]
        joins = encoder.settings["join_composition"]
        self.embedding = nn.ModuleDict(
            {
                "atoms": nn.Linear(encoder.embedding.atoms.in_features, width),
                "edges": nn.Linear(encoder.embedding.edges.in_features, width),
            }
        )
        self.convolutions = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": PlainAttention(width, heads),
                    "norm": nn.BatchNorm1d(width),
                }
            )
            for _ in encoder.convolutions
        )
        self.pooling = nn.ModuleDict(
            {"attention": PlainGlobalAttention(width, COMPOSITION, (32,))}
        )
        if joins:
            self.pooling["composition"] = nn.Linear(COMPOSITION, width)
        self.table = encoder.embedding.element_table
        self.centres = encoder.expansion.centres
        self.spacing = encoder.settings["spacing"]
        state = encoder.state_dict()
        del state["embedding.element_table"]
        self.to(self.table.dtype).load_state_dict(state)

    def forward(
        self, batch: CrystalBatch, u: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return atoms (N, F) and crystals (B, F')."""
        x = self.embedding["atoms"](self.table[batch.atomic_numbers])
        if u is None:
            steps = (distances(batch).unsqueeze(1) - self.centres) / self.spacing
            u = torch.exp(-(steps**2))  # (E, K)
        edges = F.leaky_relu(self.embedding["edges"](u), 0.2)
        for layer in self.convolutions:
            x = layer["attention"](x, edges, batch.edge_index)
            x = F.softplus(layer["norm"](x))
        shares = counted_composition(batch, COMPOSITION + 1)[:, 1:]
        weights = self.pooling["attention"](x, shares, batch)
        pooled = x.new_zeros(batch.num_graphs, x.shape[1])
        pooled = pooled.index_add(0, batch.batch, x * weights)
        if "composition" in self.pooling:
            embedded = F.leaky_relu(self.pooling["composition"](shares), 0.2)
            pooled = torch.cat((pooled, embedded), dim=1)
        return x, pooled
