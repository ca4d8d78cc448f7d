"""What all tables of embeddings have in common, in any kind of file."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from crysdistill.errors import InputError

ABOUT = "crysdistill"
"""The entry of a table from `embed` that describes its weights, as JSON."""

LAYER = re.compile(r"layer(\d+)$")
"""The name of the block of one layer's atom embeddings."""


def is_block(name: str) -> bool:
    """Return whether an array or a column of that name holds embeddings."""
    return name in ("atoms", "crystals") or LAYER.match(name) is not None


class Atoms(NamedTuple):
    """The atoms of some crystals of a table, one crystal after the other.

    Args:
        numbers: (N,), atomic numbers.
        frac_coords: (N, 3) float64; None if the table has none.
    """

    numbers: np.ndarray
    frac_coords: np.ndarray | None


class Table(ABC):
    """A table of embeddings; little more than the names is read on opening.

    Args:
        path: the file, for messages.
        ids: R names.
        counts: (R,) int64, atoms of each crystal; None if the table has no atoms.
        widths: the width of each block: `atoms`, `crystals`, `layer0`, ...
        about: the file's metadata, as text by name.

    Raises:
        InputError: the table has no block.
    """

    def __init__(
        self,
        path: Path,
        ids: Sequence[str],
        counts: np.ndarray | None,
        widths: Mapping[str, int],
        about: Mapping[str, str],
    ) -> None:
        if not widths:
            raise InputError(
                f"{path} is no table of embeddings: it has neither `atoms` nor "
                "`crystals`"
            )
        self.path = path
        self.ids = ids
        self.counts = counts
        self.widths = dict(widths)
        self.about = dict(about)

    @abstractmethod
    def atoms(self, rows: np.ndarray) -> Atoms:
        """Return the atoms of some crystals, by row of the table."""

    @abstractmethod
    def take(self, block: str, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return an array that holds at least the vectors of some crystals.

        Returns:
            (all, F), and (rows,) int64: where the vectors of each crystal begin.
        """


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the integers first, first + 1, ... of each range, range after range."""
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(counts.sum())
