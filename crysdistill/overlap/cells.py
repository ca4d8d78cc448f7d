"""Compiled routines for one cell: Niggli reduction and a test for near repetition.

Sources: I. Krivy and B. Gruber (1976), Acta Cryst. A32, 297-298,
doi:10.1107/S0567739476000636; with tolerances after R. W. Grosse-Kunstleve, N. K.
Sauter and P. D. Adams (2004), Acta Cryst. A60, 1-6, doi:10.1107/S010876730302186X.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from crysdistill.machine_code import machine_code

_TOLERANCE = 1e-5
"""Relative to a length of the cell; pymatgen uses the same for this reduction."""

_MOST_STEPS = 1000
"""No crystal's cell needs so many; on a flat one, the reduction could run for ever."""

_SLACK = 1 + 1e-6  # a refusal must hold despite rounding


@njit
def _metric(cell: np.ndarray, basis: np.ndarray) -> tuple:
    """Return a·a, b·b, c·c, 2 b·c, 2 a·c and 2 a·b of a basis of the lattice."""
    rows = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            for k in range(3):
                rows[i, k] += basis[i, j] * cell[j, k]
    dots = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            for k in range(3):
                dots[i, j] += rows[i, k] * rows[j, k]
    return (
        dots[0, 0],
        dots[1, 1],
        dots[2, 2],
        2 * dots[1, 2],
        2 * dots[0, 2],
        2 * dots[0, 1],
    )


@njit
def _swap(basis: np.ndarray, i: int, j: int) -> None:
    for k in range(3):
        basis[i, k], basis[j, k] = basis[j, k], basis[i, k]


@njit
def _add(basis: np.ndarray, i: int, j: int, times: float) -> None:
    for k in range(3):
        basis[i, k] += times * basis[j, k]


@njit
def _sign(value: float, e: float) -> int:
    return 0 if abs(value) <= e else (1 if value > 0 else -1)


@njit
def _turn(basis: np.ndarray, xi: float, eta: float, zeta: float, e: float) -> None:
    """Reverse vectors so that all angles are acute, or none is."""
    signs = (_sign(xi, e), _sign(eta, e), _sign(zeta, e))
    wanted = 1 if signs[0] * signs[1] * signs[2] == 1 else -1
    turned = 1
    free = -1
    for axis in range(3):
        if signs[axis] == -wanted:
            _add(basis, axis, axis, -2.0)
            turned = -turned
        elif signs[axis] == 0:
            free = axis
    if turned == -1 and free >= 0:  # a right angle takes either sign
        _add(basis, free, free, -2.0)


@machine_code
def niggli(cell: np.ndarray, volume: float) -> np.ndarray:
    """Return the basis of the Niggli cell, (3, 3) whole numbers as floats.

    Args:
        cell: (3, 3) in Å, rows are lattice vectors.
        volume: Å³.

    Returns:
        The matrix that multiplies the cell from the left; zeros if the reduction did
        not end.
    """
    basis = np.zeros((3, 3))
    for k in range(3):
        basis[k, k] = 1.0
    e = _TOLERANCE * volume ** (1 / 3)
    for _ in range(_MOST_STEPS):
        aa, bb, cc, xi, eta, zeta = _metric(cell, basis)
        if bb + e < aa or (abs(aa - bb) < e and abs(xi) > abs(eta) + e):
            _swap(basis, 0, 1)
            aa, bb, cc, xi, eta, zeta = _metric(cell, basis)
        if cc + e < bb or (abs(bb - cc) < e and abs(eta) > abs(zeta) + e):
            _swap(basis, 1, 2)
            continue
        _turn(basis, xi, eta, zeta, e)
        aa, bb, cc, xi, eta, zeta = _metric(cell, basis)
        if (
            abs(xi) > bb + e
            or (abs(xi - bb) < e and 2 * eta < zeta - e)
            or (abs(xi + bb) < e and zeta < -e)
        ):
            _add(basis, 2, 1, -math.copysign(1.0, xi))
        elif (
            abs(eta) > aa + e
            or (abs(eta - aa) < e and 2 * xi < zeta - e)
            or (abs(eta + aa) < e and zeta < -e)
        ):
            _add(basis, 2, 0, -math.copysign(1.0, eta))
        elif (
            abs(zeta) > aa + e
            or (abs(zeta - aa) < e and 2 * xi < eta - e)
            or (abs(zeta + aa) < e and eta < -e)
        ):
            _add(basis, 1, 0, -math.copysign(1.0, zeta))
        elif xi + eta + zeta + aa + bb < -e or (
            abs(xi + eta + zeta + aa + bb) < e and 2 * (aa + eta) + zeta > e
        ):
            _add(basis, 2, 0, 1.0)
            _add(basis, 2, 1, 1.0)
        else:
            return basis
    return np.zeros((3, 3))


@njit
def _maps(
    frac: np.ndarray,
    species: np.ndarray,
    shift: np.ndarray,
    tolerance: np.ndarray,
) -> bool:
    """Tell whether a translation brings every atom near an atom of its species."""
    for i in range(len(frac)):
        met = False
        for j in range(len(frac)):
            if species[i] != species[j]:
                continue
            near = True
            for axis in range(3):
                off = frac[j, axis] - frac[i, axis] - shift[axis]
                if abs(off - math.floor(off + 0.5)) > tolerance[axis]:
                    near = False
                    break
            if near:
                met = True
                break
        if not met:
            return False
    return True


@njit
def _divides(shift: np.ndarray, units: int, tolerance: np.ndarray) -> bool:
    """Tell whether a translation is near a whole part of the cell."""
    for parts in range(2, units + 1):
        if units % parts:
            continue
        near = True
        for axis in range(3):
            off = shift[axis] * parts
            if abs(off - math.floor(off + 0.5)) > tolerance[axis] * parts:
                near = False
                break
        if near:
            return True
    return False


@machine_code
def may_repeat(
    frac: np.ndarray,
    species: np.ndarray,
    first: np.ndarray,
    units: int,
    cell: np.ndarray,
    tolerance: float,
) -> bool:
    """Tell whether a cell may be the multiple of a smaller one, within a tolerance.

    If not, neither spglib's nor pymatgen's search for a primitive cell can find a
    smaller one. pymatgen starts from these translations, with twice its tolerance
    along each axis. One of them must lie within the tolerance of a vector of the
    smaller cell. The coordinates of such a vector are whole numbers over the number of
    repetitions. spglib's own tolerance is far smaller.

    Args:
        frac: (N, 3).
        species: (N,) any numbers.
        first: all atoms of a rarest species. Any translation that repeats the cell
            brings the first of them near another.
        units: the greatest common divisor of the numbers of atoms of each species.
        cell: (3, 3) in Å.
        tolerance: Å, that of pymatgen's search.
    """
    once, twice, shift = np.empty(3), np.empty(3), np.empty(3)
    for k in range(3):
        a, b, c = cell[k, 0], cell[k, 1], cell[k, 2]
        once[k] = tolerance * _SLACK / math.sqrt(a * a + b * b + c * c)
        twice[k] = 2 * once[k]
    for place in range(1, len(first)):
        for k in range(3):
            shift[k] = frac[first[place], k] - frac[first[0], k]
        if _divides(shift, units, once) and _maps(frac, species, shift, twice):
            return True
    return False
