"""Bonds of a batch, measured once for all families of targets."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, edge_vectors, sum_over_neighbours
from crysdistill.graphs.edits import drop_edges
from crysdistill.machine_code import machine_code

__all__ = ["Surroundings"]

_LEAST = 0.1  # Å; the direction between coinciding atoms would be undefined


@machine_code
def _add_products(
    x: np.ndarray, y: np.ndarray, ptr: np.ndarray, out: np.ndarray
) -> None:
    """Add x[edge, p] * y[edge, q] to out[atom, p, q] for all edges of each atom."""
    for atom in range(len(ptr) - 1):
        for edge in range(ptr[atom], ptr[atom + 1]):
            for p in range(x.shape[1]):
                for q in range(y.shape[1]):
                    out[atom, p, q] += x[edge, p] * y[edge, q]


class Surroundings:
    """A batch without fake edges, and the quantities that several families need.

    Each quantity is computed on first use.

    Args:
        batch: the crystals, with no element hidden.
    """

    def __init__(self, batch: CrystalBatch) -> None:
        fake = "padding" in batch
        self.batch = drop_edges(batch, batch.padding) if fake else batch

    @cached_property
    def vectors(self) -> Tensor:
        """Vectors from centre to neighbour, (E, 3) in Å."""
        return edge_vectors(self.batch)

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the edges, (E,) in Å, none below 0.1 Å."""
        return torch.linalg.vector_norm(self.vectors, dim=1).clamp(min=_LEAST)

    @cached_property
    def directions(self) -> Tensor:
        """Unit vectors from centre to neighbour, (E, 3)."""
        return self.vectors / self.lengths.unsqueeze(1)

    @cached_property
    def elements(self) -> tuple[Tensor, Tensor]:
        """Atomic numbers of the neighbours and of the centres, (E,) each."""
        neighbour, centre = self.batch.edge_index
        numbers = self.batch.atomic_numbers
        return numbers.index_select(0, neighbour), numbers.index_select(0, centre)

    def of_atoms(self, table: Tensor) -> Tensor:
        """Return the row of each atom's element: (101, ...) to (N, ...)."""
        return table.index_select(0, self.batch.atomic_numbers)

    def of_neighbours(self, table: Tensor) -> Tensor:
        """Return the row of each neighbour's element: (101, ...) to (E, ...)."""
        return table.index_select(0, self.elements[0])

    def sum_of_products(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum products of edge quantities over the neighbours of each atom.

        Args:
            x: (E, X).
            y: (E, Y).

        Returns:
            (N, X, Y).
        """
        if x.device.type != "cpu":
            each = x.unsqueeze(2) * y.unsqueeze(1)  # (E, X, Y)
            return sum_over_neighbours(each, self.batch)
        # Three times as fast as making the (E, X, Y) products.
        sums = x.new_zeros(self.batch.num_nodes, x.shape[1], y.shape[1])
        arrays = (z.contiguous().numpy() for z in (x, y, self.batch.neighbor_ptr))
        _add_products(*arrays, sums.numpy())
        return sums

    @cached_property
    def nearest(self) -> Tensor:
        """Distance of the nearest neighbour, (N,) in Å; infinite if there is none."""
        return self.least(self.lengths)

    def least(self, x: Tensor) -> Tensor:
        """Return the least value over the edges of each atom: (E,) to (N,)."""
        found = x.new_full((self.batch.num_nodes,), torch.inf)
        return found.scatter_reduce(0, self.batch.edge_index[1], x, "amin")

    @cached_property
    def bonds(self) -> Tensor:
        """How much each neighbour counts as bonded, (E,).

        w_ij = exp(1 - (d_ij / d_i)^6), where d_i is the mean of the distances weighted
        by exp(1 - (d_ij / nearest_i)^6). The sum of w_ij over neighbours is the
        effective coordination number.

        Source: R. Hoppe, Z. Kristallogr. 150, 23 (1979),
        doi:10.1524/zkri.1979.150.1-4.23.

        Differs from the source: the mean is not iterated to convergence.
        """
        centre = self.batch.edge_index[1]
        first = self._closeness(self.nearest.index_select(0, centre))
        sums = torch.stack((first * self.lengths, first), dim=1)  # (E, 2)
        above, below = sum_over_neighbours(sums, self.batch).unbind(1)  # (N,) each
        return self._closeness((above / below).index_select(0, centre))

    def _closeness(self, to: Tensor) -> Tensor:
        cube = (self.lengths / to) ** 3  # twice as fast as a sixth power
        return torch.exp(1 - cube * cube)

    @cached_property
    def coordination(self) -> Tensor:
        """Effective coordination number, (N,)."""
        return sum_over_neighbours(self.bonds, self.batch)
