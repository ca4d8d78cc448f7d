"""ALIGNN in the plainest form of its published layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Gated(nn.Module):
    """One product per node, with rows gathered for pairs like DGL's `u_add_v`."""

    def __init__(self, s: dict[str, Any], norm: type[nn.Module], last: bool) -> None:
        super().__init__()
        width, self.offset = s["width"], s["gate_offset"]
        for name in ("receiver_gate", "sender_gate", "edge_gate", "own", "message"):
            setattr(self, name, nn.Linear(width, width))
        self.node_norm = norm(width)
        self.edge_norm = None if last else norm(width)

    def forward(self, x: Tensor, e: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        sender, receiver = pairs
        m = self.sender_gate(x)[sender] + self.receiver_gate(x)[receiver]
        m = m + self.edge_gate(e)
        gate = torch.sigmoid(m)
        values = self.message(x)
        top = torch.zeros_like(values).index_add(0, receiver, gate * values[sender])
        below = torch.zeros_like(values).index_add(0, receiver, gate)
        x_new = self.own(x) + top / (below + self.offset)
        x = x + F.silu(self.node_norm(x_new))
        if self.edge_norm is not None:
            e = e + F.silu(self.edge_norm(m))
        return x, e


class _Both(nn.Module):
    def __init__(self, s: dict[str, Any], norm: type[nn.Module], last: bool) -> None:
        super().__init__()
        self.atoms = _Gated(s, norm, False)
        self.edges = _Gated(s, norm, last)


class _Dense(nn.Module):
    def __init__(self, inputs: int, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norm = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.linear(x)))


class _Scalars(nn.Module):
    def __init__(
        self,
        ends: tuple[float, float],
        count: int,
        s: dict[str, Any],
        norm: type[nn.Module],
    ) -> None:
        super().__init__()
        centres = torch.linspace(*ends, count)
        self.register_buffer("centres", centres, persistent=False)
        self.gamma = (count - 1) / (ends[1] - ends[0])
        self.hidden = _Dense(count, s["hidden"], norm)
        self.dense = _Dense(s["hidden"], s["width"], norm)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.exp(-self.gamma * (x.unsqueeze(1) - self.centres) ** 2)
        return self.dense(self.hidden(u))


class _Embedding(nn.Module):
    def __init__(self, features: int, s: dict[str, Any], norm: type[nn.Module]) -> None:
        super().__init__()
        self.atoms = _Dense(features, s["width"], norm)
        self.edges = _Scalars((0.0, s["cutoff"]), s["distance_functions"], s, norm)
        self.triplets = _Scalars((-1.0, 1.0), s["angle_functions"], s, norm)


class PlainALIGNN(nn.Module):
    """Atoms after each block, from given features; it loads our encoder's weights.

    Args:
        settings: those of `crysdistill.encoders.alignn.ALIGNN`.
        features: of the element table.
    """

    def __init__(self, settings: dict[str, Any], features: int = 92) -> None:
        super().__init__()
        norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[settings["norm"]]
        both, gated = settings["convolutions"], settings["gated_convolutions"]
        self.embedding = _Embedding(features, settings, norm)
        self.convolutions = nn.ModuleList(
            _Both(settings, norm, k == both - 1) for k in range(both)
        )
        self.gated_convolutions = nn.ModuleList(
            _Gated(settings, norm, k == gated - 1) for k in range(gated)
        )

    def forward(
        self,
        atoms: Tensor,
        lengths: Tensor,
        edges: Tensor,
        cosine: Tensor,
        pairs: Tensor,
    ) -> list[Tensor]:
        """Return the atoms after each block, (N, F) each.

        Args:
            atoms: their element vectors, (N, A).
            lengths: of edges, (E,).
            edges: source and destination, (2, E).
            cosine: of angles, (P,).
            pairs: the first and the second edge of each angle, (2, P).
        """
        x = self.embedding.atoms(atoms)
        y = self.embedding.edges(lengths)
        z = self.embedding.triplets(cosine)
        passed = [x]
        for layer in self.convolutions:
            x, y = layer.atoms(x, y, edges)
            y, z = layer.edges(y, z, pairs)
            passed.append(x)
        for layer in self.gated_convolutions:
            x, y = layer(x, y, edges)
            passed.append(x)
        return passed
