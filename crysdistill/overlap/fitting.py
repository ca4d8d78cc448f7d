"""A compiled version of pymatgen's StructureMatcher, for the clear cases.

It tries the same mappings of one lattice onto the other and the same translations,
and compares with the same tolerances (S. P. Ong et al. (2013), Comput. Mater. Sci. 68,
314-319, doi:10.1016/j.commatsci.2012.10.028). It leaves uncertain cases to the
original: a value at the very edge of a tolerance, and atoms that could be paired in
several ways.

Legend of shapes: M atoms of the source cell, N of the target cell, N = factor x M.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from crysdistill.machine_code import machine_code
from crysdistill.overlap.lattices import (
    average_cell,
    cosine,
    determinant,
    invert,
    lattice_vectors,
    length_of,
)
from crysdistill.overlap.pairing import NO, UNSURE, YES, any_shift

EDGE = 1e-5
"""Relative. This close to a tolerance, rounding may decide."""


@njit
def _inside(value: float) -> bool:
    return -1e-9 < value < 1 - 1e-9


@njit
def _expand(frac: np.ndarray, scale: np.ndarray, factor: int, out: np.ndarray) -> bool:
    """Write the atoms of the supercell `scale` to `out`, (factor M, 3).

    `scale` holds whole numbers. The images of an atom follow one another. Return False
    if their number is wrong.
    """
    inverse = np.empty((3, 3))
    invert(scale, inverse)
    points = np.zeros((factor, 3))
    count = 0
    low, high = np.zeros(3), np.zeros(3)
    for i in range(3):
        for j in range(3):
            low[j] += min(scale[i, j], 0.0)
            high[j] += max(scale[i, j], 0.0)
    if factor == 1:
        low[:] = 0.0
        high[:] = 0.0
    for a in range(int(low[0]), int(high[0]) + 1):
        for b in range(int(low[1]), int(high[1]) + 1):
            for c in range(int(low[2]), int(high[2]) + 1):
                x = a * inverse[0, 0] + b * inverse[1, 0] + c * inverse[2, 0]
                y = a * inverse[0, 1] + b * inverse[1, 1] + c * inverse[2, 1]
                z = a * inverse[0, 2] + b * inverse[1, 2] + c * inverse[2, 2]
                if _inside(x) and _inside(y) and _inside(z):
                    if count < factor:
                        points[count, 0], points[count, 1], points[count, 2] = x, y, z
                    count += 1
    if count != factor:
        return False
    for atom in range(len(frac)):
        for axis in range(3):
            place = (
                frac[atom, 0] * inverse[0, axis]
                + frac[atom, 1] * inverse[1, axis]
                + frac[atom, 2] * inverse[2, axis]
            )
            for image in range(factor):
                value = place + points[image, axis]
                out[atom * factor + image, axis] = value - math.floor(value)
    return True


@njit
def _angle_fits(
    one: np.ndarray, other: np.ndarray, lowest: float, highest: float
) -> bool:
    """Tell whether the cosine of the angle between two vectors (6,) is in a range."""
    dot = one[3] * other[3] + one[4] * other[4] + one[5] * other[5]
    squares = one[3] * one[3] + one[4] * one[4] + one[5] * one[5]
    squares *= other[3] * other[3] + other[4] * other[4] + other[5] * other[5]
    cosine = dot / math.sqrt(squares)
    return lowest <= min(max(cosine, -1.0), 1.0) <= highest


@machine_code
def fit(
    source_cell: np.ndarray,
    source: np.ndarray,
    target_cell: np.ndarray,
    target: np.ndarray,
    starts: np.ndarray,
    anchor: int,
    factor: int,
    anchored: bool,
    length: float,
    angle: float,
    site: float,
) -> int:
    """Tell whether a crystal, repeated `factor` times, agrees with another.

    Both are scaled to one volume per atom.

    Args:
        source_cell: (3, 3) in Å; its multiples are mapped onto the target's cell.
        source: (M, 3) fractional, by species.
        target_cell: (3, 3) in Å.
        target: (N, 3) fractional, by species.
        starts: (S + 1,) first atom of each species in the target.
        anchor: an atom of the rarest species in the target, or in the repeated source
            if `anchored`.
        factor: N / M.
        anchored: whether the source holds the anchor.
        length: how far the lengths of the cells may differ, relative.
        angle: the same for angles, degrees.
        site: how far atoms may be from their places, in units of the cube root of
            the volume per atom.

    Returns:
        `NO`, `YES`, or `UNSURE` if atoms could be paired in several ways.
    """
    ratio = abs(determinant(target_cell)) / (factor * abs(determinant(source_cell)))
    ratio = ratio ** (1 / 6)
    cell, other = np.empty((3, 3)), np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            cell[i, j] = source_cell[i, j] * ratio
            other[i, j] = target_cell[i, j] / ratio
    lowest, highest = np.empty(3), np.empty(3)
    for k in range(3):
        between = math.acos(cosine(other, (k + 1) % 3, (k + 2) % 3))
        lowest[k] = math.cos(min(between + math.radians(angle), math.pi)) - 1e-15
        highest[k] = math.cos(max(between - math.radians(angle), 0.0)) + 1e-15
    wide = 1 + length
    a, b, c = length_of(other, 0), length_of(other, 1), length_of(other, 2)
    along_a = lattice_vectors(cell, a / wide, a * wide)
    along_b = lattice_vectors(cell, b / wide, b * wide)
    along_c = lattice_vectors(cell, c / wide, c * wide)
    scale, mapped, average = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    repeated = np.empty((len(target), 3))
    best = NO
    for i in range(len(along_a)):
        for j in range(len(along_b)):
            if not _angle_fits(along_a[i], along_b[j], lowest[2], highest[2]):
                continue
            for k in range(len(along_c)):
                if not _angle_fits(along_a[i], along_c[k], lowest[1], highest[1]):
                    continue
                if not _angle_fits(along_b[j], along_c[k], lowest[0], highest[0]):
                    continue
                for axis in range(3):
                    scale[0, axis], mapped[0, axis] = (
                        along_a[i, axis],
                        along_a[i, axis + 3],
                    )
                    scale[1, axis], mapped[1, axis] = (
                        along_b[j, axis],
                        along_b[j, axis + 3],
                    )
                    scale[2, axis], mapped[2, axis] = (
                        along_c[k, axis],
                        along_c[k, axis + 3],
                    )
                if abs(abs(determinant(scale)) - factor) > 0.5:
                    continue
                if not average_cell(mapped, other, average) or not _expand(
                    source, scale, factor, repeated
                ):
                    best = UNSURE
                    continue
                found = any_shift(
                    repeated, target, starts, anchor, factor, anchored, average, site
                )
                if found == YES:
                    return YES
                best = max(best, found)
    return best
