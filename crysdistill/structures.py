"""One crystal: its arrays, its checks and its symmetry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pymatgen.core import Structure


@dataclass(frozen=True, slots=True)
class Crystal:
    """One ordered periodic structure as flat arrays, without a graph.

    Args:
        material_id: the name by which tables and errors call it.
        atomic_numbers: (N,) uint8.
        frac_coords: (N, 3) float64, fractional, wrapped into [0, 1).
        cell: (3, 3) float64 in Å, rows are lattice vectors.
        properties: known labels by name, in the unit of their source.
    """

    material_id: str
    atomic_numbers: np.ndarray
    frac_coords: np.ndarray
    cell: np.ndarray
    properties: Mapping[str, float] = field(default_factory=dict)
