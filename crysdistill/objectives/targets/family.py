"""The interface between families of targets and the objective `bank`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crysdistill.objectives.targets.surroundings import Surroundings

__all__ = ["Column", "Family", "signed_root"]


class Column(NamedTuple):
    """One target.

    Args:
        name: for reports.
        unit: empty for a pure number.
    """

    name: str
    unit: str = ""


class Family(nn.Module, ABC):
    """Targets that follow from the crystals of a batch.

    Targets depend only on neighbours in the graph: if it holds the 12 nearest
    neighbours, no target depends on the 13th. They do not change with origin,
    orientation, the order of atoms, or the choice of cell. Tables are buffers that
    weights files leave out.

    A family is one file, and one line in `FAMILIES`.

    Attributes:
        name: the key in `FAMILIES`.
        level: whether there is one row for each atom or for each crystal.
        columns: the K columns.
    """

    name: ClassVar[str]
    level: ClassVar[Literal["atoms", "crystals"]]
    columns: tuple[Column, ...]

    @abstractmethod
    def compute(self, seen: Surroundings) -> Tensor:
        """Return the targets, (N or B, K) float32; not finite where unknown.

        Args:
            seen: the crystals.
        """


def signed_root(x: Tensor) -> Tensor:
    """Return x / sqrt(1 + |x|): about x if small, its signed root if large.

    A plain root would be infinitely steep at zero.
    """
    return x * torch.rsqrt(1.0 + x.abs())
