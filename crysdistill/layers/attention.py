"""Attention of GATGNN: over the neighbours of an atom, and over the atoms of a crystal.

Source: S.-Y. Louis et al., Phys. Chem. Chem. Phys. 22, 18141 (2020),
doi:10.1039/D0CP01474E, with the code published with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crysdistill.graphs.batch import (
    CrystalBatch,
    gather_crystals,
    softmax_over_atoms,
    softmax_over_neighbours,
)
from crysdistill.layers.normalization import BatchNorm
from crysdistill.layers.settings import at_least

_NUMBERS_AT_ONCE = 1 << 17
"""Numbers that a thread processes together, so that they stay in the cache."""


class Ends(NamedTuple):
    """The ends of edges: an atom and a length each.

    In a crystal an atom has several neighbours at one distance, and every edge has a
    reverse, so most ends are shared. If no distances were equal, there would be P = 2 E
    ends; in the crystals of the Materials Project P < E.

    Args:
        rows: (D, any width), the vector of each distinct length.
        atom: (P,) int64, the atom of each distinct end.
        length: (P,) int64, its row in `rows`.
        neighbour: (E,) int64, the end of each edge at the neighbour.
        centre: (E,) int64, the end of each edge at the centre.
    """

    rows: Tensor
    atom: Tensor
    length: Tensor
    neighbour: Tensor
    centre: Tensor


def find_ends(rows: Tensor, place: Tensor, batch: CrystalBatch) -> Ends:
    """Return the distinct ends of all edges.

    Args:
        rows: (D, any width), the vector of each distinct length.
        place: (E,) int64, the row of each edge.
        batch: the batch of the edges.
    """
    lengths = max(len(rows), 1)
    ends, end = torch.unique(batch.edge_index * lengths + place, return_inverse=True)
    return Ends(rows, ends // lengths, ends % lengths, *end)


class AugmentedAttention(nn.Module):
    """The augmented graph attention layer (AGAT): both ends of an edge get its length.

    For each of H heads, with one W for both ends:

    h_i = softplus([v_i | e_ij] W) and h_j = softplus([v_j | e_ij] W);
    s_ij = softplus(a . [h_i | h_j]);
    c_ij = softmax over the neighbours of i of softplus(BN(s_ij));
    v_i' = mean over heads of sum_j c_ij h_j, plus b.

    Products with v are computed once per atom, products with e once per distinct
    distance.

    Differs from the paper: only the published code has the batch norm, with statistics
    over all edges, and the second softplus around it. That code also holds one PReLU,
    which it never uses.

    Args:
        width: F, of atoms and edges alike.
        heads: H.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        at_least(1, width=width, heads=heads)
        self.width = width
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(heads * width, 2 * width))  # W
        self.score = nn.Parameter(torch.empty(heads, 2 * width))  # a
        self.bias = nn.Parameter(torch.zeros(width))  # b
        self.norm = BatchNorm(heads)
        nn.init.xavier_uniform_(self.weight)
        nn.init.xavier_uniform_(self.score)

    def forward(self, x: Tensor, edges: Ends, batch: CrystalBatch) -> Tensor:
        """Update atoms (N, F).

        Args:
            x: vectors of atoms, (N, F).
            edges: ends of edges, with rows F wide.
            batch: the batch of the edges.
        """
        of_atom, of_edge = self.weight.chunk(2, dim=1)  # (H F, F) each
        z = F.linear(x, of_atom).index_select(0, edges.atom)  # (P, H F)
        z = z + F.linear(edges.rows, of_edge).index_select(0, edges.length)
        h = F.softplus(z).unflatten(1, (self.heads, -1))  # (P, H, F)
        as_centre, as_neighbour = (
            (h * a).sum(dim=2) for a in self.score.chunk(2, dim=1)
        )  # (P, H) each
        scores = as_centre.index_select(0, edges.centre)
        scores = scores + as_neighbour.index_select(0, edges.neighbour)  # (E, H)
        scores = F.softplus(self.norm(F.softplus(scores)))
        shares = softmax_over_neighbours(scores, batch) / self.heads  # (E, H)
        total = _WeightedSum.apply(
            h, shares, edges.neighbour, batch.edge_index[1], len(x)
        )
        return total + self.bias  # (N, F)


class CompositionAttention(nn.Module):
    """Weights of a crystal's atoms that depend on its whole composition (GI-M1).

    softmax over the atoms of the crystal of MLP([v_i | shares of the elements]), with
    softplus between the layers. The shares are multiplied once per crystal.

    Args:
        width: F, of atoms.
        elements: the number of shares.
        hidden: the widths of the hidden layers.
    """

    def __init__(self, width: int, elements: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [width, elements]
        self.first = nn.Linear(width + elements, hidden[0])
        self.rest = nn.ModuleList(
            nn.Linear(one, other) for one, other in pairwise((*hidden, 1))
        )

    def forward(self, x: Tensor, shares: Tensor, batch: CrystalBatch) -> Tensor:
        """Return weights that sum to one over the atoms of each crystal, (N, 1).

        Args:
            x: vectors of atoms, (N, F).
            shares: shares of the elements in each crystal, (B, elements).
            batch: the batch of the atoms.
        """
        of_atom, of_crystal = self.first.weight.split(self.sizes, dim=1)
        crystals = F.linear(shares, of_crystal, self.first.bias)
        hidden = F.linear(x, of_atom) + gather_crystals(crystals, batch)
        for layer in self.rest:
            hidden = layer(F.softplus(hidden))
        return softmax_over_atoms(hidden, batch)


class _WeightedSum(torch.autograd.Function):
    """The sum over heads and neighbours of shares times messages of neighbours' ends.

    The messages of ends, (P, H, F), are gathered for a few edges at a time, in both
    passes. So no row of width H F is kept for each edge.
    """

    @staticmethod
    def forward(
        ctx: Any,
        said: Tensor,
        shares: Tensor,
        end: Tensor,
        centre: Tensor,
        atoms: int,
    ) -> Tensor:
        total = shares.new_zeros(atoms, said.shape[2])  # (N, F)
        for rows in _blocks(shares, said):
            message = said.index_select(0, end[rows]) * shares[rows].unsqueeze(2)
            total.index_add_(0, centre[rows], message.sum(dim=1))
        ctx.save_for_backward(said, shares, end, centre)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> Any:
        said, shares, end, centre = ctx.saved_tensors
        d_said, d_shares = torch.zeros_like(said), torch.empty_like(shares)
        for rows in _blocks(shares, said):
            each = d_total.index_select(0, centre[rows]).unsqueeze(1)  # (rows, 1, F)
            d_shares[rows] = (said.index_select(0, end[rows]) * each).sum(dim=2)
            weighted = (each * shares[rows].unsqueeze(2)).to(said.dtype)
            d_said.index_add_(0, end[rows], weighted)
        return d_said, d_shares, None, None, None


def _blocks(shares: Tensor, said: Tensor) -> Iterator[slice]:
    """Yield the edges that are processed together; all edges on a GPU."""
    count, wide = len(shares), said.shape[1] * said.shape[2]
    step = max(_NUMBERS_AT_ONCE * torch.get_num_threads() // wide, 1)
    step = step if shares.device.type == "cpu" else max(count, 1)
    for start in range(0, count, step):
        yield slice(start, start + step)
