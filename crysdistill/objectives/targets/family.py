"""What a family of targets offers to the objective `bank`."""

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
        name: as reports show it.
        unit: empty for a pure number.
    """

    name: str
    unit: str = ""


class Family(nn.Module, ABC):
    """Numbers that follow from the crystals of a batch, to be learned.

    Targets see what the graph has: where it holds the 12 nearest neighbours, no target
    knows the 13th. They do not change with origin, orientation, the order of atoms, or
    the choice of cell. Tables are buffers that no weights file holds.

    A family is one file, and one line in `FAMILIES`.

    Attributes:
        name: the key in `FAMILIES`.
        level: whether there is a row for each of the atoms or of the crystals.
        columns: what the K columns are.
    """

    name: ClassVar[str]
    level: ClassVar[Literal["atoms", "crystals"]]
    columns: tuple[Column, ...]

    @abstractmethod
    def compute(self, seen: Surroundings) -> Tensor:
        """Return the targets, (N or B, K) float32; not finite where not known.

        Args:
            seen: the crystals.
        """


def signed_root(x: Tensor) -> Tensor:
    """Return x / sqrt(1 + |x|): x where small, its root with its sign where large.

    A plain root would be infinitely steep at zero.
    """
    return x * torch.rsqrt(1.0 + x.abs())
