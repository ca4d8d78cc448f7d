"""MEGNet in the plainest form of its published layouts: one concatenation per edge."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import Set2Set
from torch_geometric.utils import scatter

from crysdistill.encoders.megnet import MEGNet
from crysdistill.graphs.batch import CrystalBatch, distances
from crysdistill.layers.basis import Gaussians, shifted_softplus


class PlainDense(nn.Module):
    """Linear layers, each with an activation and an optional batch norm."""

    def __init__(self, widths: list[int], relu: bool, norm: bool) -> None:
        super().__init__()
        self.act = F.relu if relu else shifted_softplus
        pairs = list(pairwise(widths))
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(b) if norm else nn.Identity() for _, b in pairs
        )

    def forward(self, *parts: Tensor) -> Tensor:
        """Map parts (rows, any width) to (rows, last width)."""
        x = torch.cat(parts, dim=1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = norm(self.act(linear(x)))
        return x


class PlainMEGNet(nn.Module):
    """The published layout, with the weights of one of our encoders.

    Args:
        encoder: without `degrees`, `skip` and group norm.
    """

    def __init__(self, encoder: MEGNet) -> None:
        super().__init__()
        s = self.settings = encoder.settings
        w, h = s["width"], s["hidden"]
        relu, norm = s["activation"] == "relu", s["norm"] == "batch"
        self.gaussians = Gaussians(
            0.0, s["cutoff"] + s["beyond"], s["gaussians"], s["gaussian_width"]
        )
        table = encoder.embedding.elements.element_table
        self.register_buffer("table", table)
        dense = s["embedding"] == "dense"
        self.embedding = nn.Linear(table.shape[1], s["atom_width"], bias=dense)
        self.embedding.load_state_dict(encoder.embedding.elements.linear.state_dict())
        self.encoders, self.blocks = nn.ModuleDict(), nn.ModuleList()
        for kind, inputs in (
            ("atoms", s["atom_width"]),
            ("edges", s["gaussians"]),
            ("state", s["state_inputs"]),
        ):
            if inputs:
                self.encoders[kind] = PlainDense([inputs, h, w], relu, False)
                ours = getattr(encoder.embedding, kind)
                self.encoders[kind].load_state_dict(ours.state_dict())
            else:
                self.start = nn.Parameter(
                    encoder.embedding.state.start.detach().clone()
                )
        hidden = [h] * (s["layers"] - 1) + [w]
        for ours in encoder.convolutions:
            block = nn.ModuleDict(
                {
                    "edges": PlainDense([4 * w, *hidden], relu, norm),
                    "atoms": PlainDense([3 * w, *hidden], relu, norm),
                    "state": PlainDense([3 * w, *hidden], relu, norm),
                    "dense": nn.ModuleDict(
                        {k: PlainDense([w, h, w], relu, False) for k in ours.dense}
                    ),
                }
            )
            block.load_state_dict(ours.state_dict())
            self.blocks.append(block)
        self.sets = nn.ModuleList()
        for ours in (encoder.pooling.atoms, encoder.pooling.edges):
            if ours is not None:
                theirs = Set2Set(w, ours.steps)
                theirs.lstm.load_state_dict(
                    {f"{name}_l0": t for name, t in ours.lstm.state_dict().items()}
                )
                self.sets.append(theirs)

    def forward(self, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return atoms (N, F) and crystals (B, F')."""
        s, crystal, count = self.settings, batch.batch, batch.num_graphs
        j, i = batch.edge_index
        owner = crystal[i]  # (E,)
        x = self.embedding(self.table[batch.atomic_numbers])
        x = self.encoders["atoms"](F.relu(x) if s["embedding"] == "dense" else x)
        e = self.encoders["edges"](self.gaussians(distances(batch)))
        if s["state_inputs"]:
            u = self.encoders["state"](x.new_zeros(count, s["state_inputs"]))
        else:
            u = self.start.expand(count, -1)

        def mean_edges(e: Tensor) -> Tensor:
            if s["edge_mean"] == "edges":
                return scatter(e, owner, 0, count, reduce="mean")
            of_atoms = scatter(e, i, 0, len(x), reduce="mean")
            return scatter(of_atoms, crystal, 0, count, reduce="mean")

        def mean_atoms(x: Tensor) -> Tensor:
            return scatter(x, crystal, 0, count, reduce="mean")

        for block in self.blocks:
            before = x, e, u
            if len(block["dense"]):
                dense = block["dense"]
                x, e, u = dense["atoms"](x), dense["edges"](e), dense["state"](u)
            e = block["edges"](x[j], x[i], e, u[owner])
            x = block["atoms"](x, scatter(e, i, 0, len(x), reduce="mean"), u[crystal])
            u = block["state"](mean_edges(e), mean_atoms(x), u)
            x, e, u = (new + old for new, old in zip((x, e, u), before, strict=True))
        if self.sets:
            pooled = (
                self.sets[0](x, crystal, dim_size=count),
                self.sets[1](e, owner, dim_size=count),
            )
        else:
            pooled = mean_atoms(x), mean_edges(e)
        return x, torch.cat((*pooled, u), dim=1)
