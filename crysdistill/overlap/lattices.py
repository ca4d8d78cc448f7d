"""Compiled geometry of cells: rows are lattice vectors, in Å.

All code is plain loops: they compile in seconds, array operations in a minute.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit


@njit
def length_of(cell: np.ndarray, axis: int) -> float:
    """Return the length of one vector of a cell."""
    a, b, c = cell[axis, 0], cell[axis, 1], cell[axis, 2]
    return math.sqrt(a * a + b * b + c * c)


@njit
def determinant(cell: np.ndarray) -> float:
    """Return the determinant."""
    return (
        cell[0, 0] * (cell[1, 1] * cell[2, 2] - cell[1, 2] * cell[2, 1])
        - cell[0, 1] * (cell[1, 0] * cell[2, 2] - cell[1, 2] * cell[2, 0])
        + cell[0, 2] * (cell[1, 0] * cell[2, 1] - cell[1, 1] * cell[2, 0])
    )


@njit
def invert(cell: np.ndarray, out: np.ndarray) -> None:
    """Write the inverse of a (3, 3) matrix to `out`."""
    volume = determinant(cell)
    for i in range(3):
        k, m = (i + 1) % 3, (i + 2) % 3
        for j in range(3):
            p, q = (j + 1) % 3, (j + 2) % 3
            minor = cell[k, p] * cell[m, q] - cell[k, q] * cell[m, p]
            out[j, i] = minor / volume


@njit
def plane_densities(cell: np.ndarray, inverse: np.ndarray, out: np.ndarray) -> None:
    """Write one over the distance of lattice planes, 1 / Å, and fill `inverse`."""
    invert(cell, inverse)
    for k in range(3):
        a, b, c = inverse[0, k], inverse[1, k], inverse[2, k]
        out[k] = math.sqrt(a * a + b * b + c * c)


@njit
def cosine(cell: np.ndarray, i: int, j: int) -> float:
    """Return the cosine between two vectors of a cell."""
    dot = cell[i, 0] * cell[j, 0] + cell[i, 1] * cell[j, 1] + cell[i, 2] * cell[j, 2]
    return min(max(dot / (length_of(cell, i) * length_of(cell, j)), -1.0), 1.0)


@njit
def lattice_vectors(cell: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return lattice vectors in a range of length, (K, 6): whole numbers, then Å."""
    densities = np.empty(3)
    plane_densities(cell, np.empty((3, 3)), densities)
    reach_a = math.floor(high * densities[0] + 1e-9)
    reach_b = math.floor(high * densities[1] + 1e-9)
    reach_c = math.floor(high * densities[2] + 1e-9)
    found = np.empty((0, 6))
    for turn in range(2):  # count, then fill
        count = 0
        for a in range(-reach_a, reach_a + 1):
            for b in range(-reach_b, reach_b + 1):
                for c in range(-reach_c, reach_c + 1):
                    x = a * cell[0, 0] + b * cell[1, 0] + c * cell[2, 0]
                    y = a * cell[0, 1] + b * cell[1, 1] + c * cell[2, 1]
                    z = a * cell[0, 2] + b * cell[1, 2] + c * cell[2, 2]
                    if low < math.sqrt(x * x + y * y + z * z) < high:
                        if turn:
                            row = found[count]
                            row[0], row[1], row[2] = a, b, c
                            row[3], row[4], row[5] = x, y, z
                        count += 1
        if not turn:
            found = np.empty((count, 6))
    return found


@njit
def average_cell(cell: np.ndarray, other: np.ndarray, out: np.ndarray) -> bool:
    """Write the cell with mean lengths and angles to `out`; False if none exists."""
    a = (length_of(cell, 0) + length_of(other, 0)) / 2
    b = (length_of(cell, 1) + length_of(other, 1)) / 2
    c = (length_of(cell, 2) + length_of(other, 2)) / 2
    alpha = (math.acos(cosine(cell, 1, 2)) + math.acos(cosine(other, 1, 2))) / 2
    beta = (math.acos(cosine(cell, 0, 2)) + math.acos(cosine(other, 0, 2))) / 2
    gamma = (math.acos(cosine(cell, 0, 1)) + math.acos(cosine(other, 0, 1))) / 2
    tilt = (math.cos(alpha) - math.cos(beta) * math.cos(gamma)) / math.sin(gamma)
    rest = 1 - math.cos(beta) ** 2 - tilt * tilt
    if rest <= 0:
        return False
    out[0, 0], out[0, 1], out[0, 2] = a, 0.0, 0.0
    out[1, 0], out[1, 1], out[1, 2] = b * math.cos(gamma), b * math.sin(gamma), 0.0
    out[2, 0], out[2, 1] = c * math.cos(beta), c * tilt
    out[2, 2] = c * math.sqrt(rest)
    return True
