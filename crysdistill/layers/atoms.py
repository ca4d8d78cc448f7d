"""The first vectors of atoms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.layers.settings import at_least, one_of
from crysdistill.structures.elements import ELEMENT_TABLES, element_table


class AtomEmbedding(nn.Module):
    """W [element | degree] + b, computed once for each element, not for each atom.

    Columns of the element table that no element fills are left out: their weights would
    only see masked atoms, which the bias represents.

    Args:
        width: F, the width of the result.
        elements: the element table, one of
            `crysdistill.structures.elements.ELEMENT_TABLES`.
        degrees: columns for the one-hot number of edges that arrive at an atom; the
            last column is for all larger numbers. MatDeepLearn has 14, and counts an
            edge of the atom to itself.
        bias: whether there is a b.
        absent: atomic numbers that look like a masked atom.

    Raises:
        InputError: a setting is out of range.
    """

    element_table: Tensor

    def __init__(
        self,
        width: int,
        elements: str = "onehot",
        degrees: int = 0,
        bias: bool = True,
        absent: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        one_of("elements", elements, ELEMENT_TABLES)
        at_least(1, width=width)
        at_least(0, degrees=degrees)
        self.degrees = degrees
        table = element_table(elements)  # (101, columns)
        table[list(absent)] = 0.0
        table = table[:, table[1:].any(axis=0)]
        self.register_buffer("element_table", torch.from_numpy(table))
        self.linear = nn.Linear(table.shape[1] + degrees, width, bias=bias)

    def kinds(self, batch: CrystalBatch) -> Tensor:
        """Return numbers that differ if the first vectors may differ, (N,)."""
        if not self.degrees:
            return batch.atomic_numbers
        return batch.atomic_numbers * self.degrees + self._degree(batch)

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return the first vectors of all atoms, (N, F)."""
        columns = self.element_table.shape[1]
        weight, bias = self.linear.weight, self.linear.bias
        by_element = F.linear(self.element_table, weight[:, :columns], bias)  # (101, F)
        x = by_element.index_select(0, batch.atomic_numbers)  # (N, F)
        if self.degrees:
            x = x + weight[:, columns:].mT.index_select(0, self._degree(batch))
        return x

    def _degree(self, batch: CrystalBatch) -> Tensor:
        ptr = batch.neighbor_ptr
        return (ptr[1:] - ptr[:-1] + 1).clamp(max=self.degrees - 1)  # (N,)
