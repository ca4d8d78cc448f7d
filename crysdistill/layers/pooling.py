"""Pooling: from any number of atoms in each crystal to one vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from crysdistill.graphs.batch import (
    CrystalBatch,
    gather_crystals,
    mean_over_atoms,
    replace,
    softmax_over_atoms,
    sum_over_atoms,
)
from crysdistill.layers.settings import at_least, one_of


class Set2Set(nn.Module):
    """Reads a set several times; each reading sets the query of the next.

    An LSTM gives the query, q_t = LSTM(q*_{t-1}) from q*_0 = 0. The set answers by
    attention, r_t = sum_i softmax_i(x_i . q_t) x_i. The next step gets both,
    q*_t = [q_t | r_t]. The result does not depend on the order of the set, nor does it
    change if every member occurs twice: a supercell has the embedding of its cell.

    Source: O. Vinyals, S. Bengio and M. Kudlur, ICLR 2016, arXiv:1511.06391, Eqs. 3-7.

    Args:
        width: F, of the members; the result has 2 F.
        steps: the number of readings. With one step, the LSTM uses only its biases.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(self, width: int, steps: int = 3) -> None:
        super().__init__()
        at_least(1, width=width, steps=steps)
        self.steps = steps
        self.width = 2 * width
        self.lstm = nn.LSTMCell(2 * width, width)

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Pool atoms (N, F) to crystals (B, 2 F); edges too: see `edges_as_atoms`."""
        asked = x.new_zeros(batch.num_graphs, self.width)  # (B, 2 F)
        state = None
        for _ in range(self.steps):
            state = self.lstm(asked, state)
            query = state[0]  # (B, F), Eq. 3
            scores = (x * gather_crystals(query, batch)).sum(dim=1, keepdim=True)
            share = softmax_over_atoms(scores, batch)  # (N, 1), Eqs. 4 and 5
            read = sum_over_atoms(share * x, batch)  # (B, F), Eq. 6
            asked = torch.cat((query, read.to(query.dtype)), dim=1)  # (B, 2 F), Eq. 7
        return asked


def edges_as_atoms(batch: CrystalBatch) -> CrystalBatch:
    """Return a batch with the edges of a crystal in place of its atoms.

    `gather_crystals`, `sum_over_atoms`, `softmax_over_atoms` and `Set2Set` then run
    over edges, (E, F). The batch has no other use.
    """
    edges = replace(batch, ptr=batch.neighbor_ptr.index_select(0, batch.ptr))
    edges.batch = batch.batch.index_select(0, batch.edge_index[1])  # (E,)
    return edges


def max_over_atoms(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Return the largest value of each column in each crystal: (N, F) to (B, F)."""
    index = batch.batch.unsqueeze(1).expand_as(x)
    largest = x.new_zeros(batch.num_graphs, x.shape[1])
    return largest.scatter_reduce(0, index, x, "amax", include_self=False)


POOLINGS: dict[str, Callable[[Tensor, CrystalBatch], Tensor]] = {
    "mean": mean_over_atoms,
    "max": max_over_atoms,
    "sum": sum_over_atoms,
}
"""Poolings without weights. A sum grows with the chosen cell."""


class Pooling(nn.Module):
    """One of several poolings, by name.

    Args:
        kind: one of `POOLINGS`, or `set2set`.
        width: F, of the atoms.
        steps: the number of steps of `set2set`.

    Raises:
        InputError: `kind` is not known, or a setting is out of range.
    """

    def __init__(self, kind: str, width: int, steps: int = 3) -> None:
        super().__init__()
        one_of("pooling", kind, [*POOLINGS, "set2set"])
        self.kind = kind
        self.set2set = Set2Set(width, steps) if kind == "set2set" else None
        self.width = width if self.set2set is None else self.set2set.width

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Pool atoms (N, F) to crystals, (B, F) or, by `set2set`, (B, 2 F)."""
        return (self.set2set or POOLINGS[self.kind])(x, batch)
