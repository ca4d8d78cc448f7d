"""Compiled test of whether two crystals in one cell agree after a shift.

Legend of shapes: N atoms, S species.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from crysdistill.overlap.lattices import determinant, plane_densities

NO, YES, UNSURE = 0, 1, 2

TIE = 1 + 1e-5
"""Ratio of squared distances; within it, rounding decides which one is shorter."""


@njit
def _nearest_image(
    x: float, y: float, z: float, cell: np.ndarray, out: np.ndarray
) -> tuple[float, float]:
    """Write the shortest of 27 images of a fractional vector to `out`, in Å.

    Returns:
        Its squared length and that of the second shortest, Å².
    """
    least = second = np.inf
    for a in range(-1, 2):
        for b in range(-1, 2):
            for c in range(-1, 2):
                u, v, w = x + a, y + b, z + c
                i = u * cell[0, 0] + v * cell[1, 0] + w * cell[2, 0]
                j = u * cell[0, 1] + v * cell[1, 1] + w * cell[2, 1]
                k = u * cell[0, 2] + v * cell[1, 2] + w * cell[2, 2]
                squared = i * i + j * j + k * k
                if squared < least:
                    second = least
                    least = squared
                    out[0], out[1], out[2] = i, j, k
                elif squared < second:
                    second = squared
    return least, second


@njit
def _round(value: float) -> float:
    return math.floor(value + 0.5)


@njit
def _meets(
    first: np.ndarray,
    second: np.ndarray,
    shift: np.ndarray,
    i: int,
    begin: int,
    end: int,
    within: np.ndarray,
) -> bool:
    """Tell whether a shifted atom is in the box around an atom of its species."""
    for j in range(begin, end):
        x = second[i, 0] + shift[0] - first[j, 0]
        if abs(x - _round(x)) > within[0]:
            continue
        y = second[i, 1] + shift[1] - first[j, 1]
        if abs(y - _round(y)) > within[1]:
            continue
        z = second[i, 2] + shift[2] - first[j, 2]
        if abs(z - _round(z)) <= within[2]:
            return True
    return False


@njit
def _pair_up(
    first: np.ndarray,
    second: np.ndarray,
    shift: np.ndarray,
    starts: np.ndarray,
    within: np.ndarray,
    average: np.ndarray,
    radius: float,
    alone: np.ndarray,
) -> int:
    """Tell whether atoms agree after `shift` of the second and a small correction.

    Args:
        first: (N, 3) fractional.
        second: (N, 3) fractional.
        shift: (3,) fractional.
        starts: (S + 1,) first atom of each species, on both sides.
        within: (3,) fractional: how far atoms may be apart along each axis. This box
            holds the sphere of two radii.
        average: (3, 3) in Å.
        radius: Å, how far an atom may be from its place.
        alone: (2,) the atom that found no partner in the last try, and its species.
            The next try tests it first.
    """
    atoms = len(first)
    last, kind = alone[0], alone[1]
    if not _meets(first, second, shift, last, starts[kind], starts[kind + 1], within):
        return NO
    for species in range(len(starts) - 1):
        begin, end = starts[species], starts[species + 1]
        for i in range(begin, end):
            if not _meets(first, second, shift, i, begin, end, within):
                alone[0], alone[1] = i, species
                return NO
    vectors = np.zeros((atoms, 3))
    taken = np.zeros(atoms, np.bool_)
    vector = np.zeros(3)
    several = far = False
    mean_x = mean_y = mean_z = 0.0
    for species in range(len(starts) - 1):
        begin, end = starts[species], starts[species + 1]
        for i in range(begin, end):
            least = second_least = np.inf
            partner = begin
            for j in range(begin, end):
                x = first[j, 0] - second[i, 0] - shift[0]
                x -= _round(x)
                y = first[j, 1] - second[i, 1] - shift[1]
                y -= _round(y)
                z = first[j, 2] - second[i, 2] - shift[2]
                z -= _round(z)
                if abs(x) > within[0] or abs(y) > within[1] or abs(z) > within[2]:
                    continue
                squared, other_image = _nearest_image(x, y, z, average, vector)
                if squared < least:
                    second_least = min(least, other_image)
                    least = squared
                    partner = j
                    for axis in range(3):
                        vectors[i, axis] = vector[axis]
                else:
                    second_least = min(second_least, squared)
            # Two atoms that agree are each within a radius of a common place. They are
            # at most two radii apart, since the shift has put one pair at one place.
            if least > 4 * radius * radius:
                far = True
            elif second_least < least * TIE:
                several = True
            several = several or taken[partner]
            taken[partner] = True
            mean_x += vectors[i, 0] / atoms
            mean_y += vectors[i, 1] / atoms
            mean_z += vectors[i, 2] / atoms
    if several:  # nearest partners are not one to one; the best pairing is unclear
        return UNSURE
    if far:
        return NO
    for i in range(atoms):
        x, y, z = vectors[i, 0] - mean_x, vectors[i, 1] - mean_y, vectors[i, 2] - mean_z
        if x * x + y * y + z * z >= radius * radius:
            return NO
    return YES


@njit
def any_shift(
    source: np.ndarray,
    target: np.ndarray,
    starts: np.ndarray,
    anchor: int,
    factor: int,
    anchored: bool,
    average: np.ndarray,
    site: float,
) -> int:
    """Put atoms of the source onto an anchor of the target, or the other way round."""
    radius = site * (abs(determinant(average)) / len(target)) ** (1 / 3)
    within = np.empty(3)
    plane_densities(average, np.empty((3, 3)), within)
    for axis in range(3):
        within[axis] *= 2 * radius
    species = 0
    while starts[species + 1] <= anchor:
        species += 1
    # The first image of each source atom is moved, or every atom of the target.
    still, moved = (source, target) if anchored else (target, source)
    step = 1 if anchored else factor
    alone = np.zeros(2, np.int64)
    shift = np.empty(3)
    best = NO
    for i in range(starts[species], starts[species + 1], step):
        for axis in range(3):
            shift[axis] = moved[i, axis] - still[anchor, axis]
        found = _pair_up(moved, still, shift, starts, within, average, radius, alone)
        if found == YES:
            return YES
        best = max(best, found)
    return best
