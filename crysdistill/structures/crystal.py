"""One crystal: its arrays and its checks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.elements import (
    MAX_ATOMIC_NUMBER,
    atomic_numbers_by_symbol,
    symbols,
)

if TYPE_CHECKING:
    from pymatgen.core import Structure

MIN_DISTANCE = 0.5
"""Å. Two atoms closer than this are an error: the shortest of all bonds, in H2,
measures 0.74 Å. pymatgen's `Structure.is_valid` has the same limit. It refuses 3 of
154,925 entries of the Materials Project, all with a hydrogen inside another atom."""

MIN_VOLUME = 1.0
"""Å³ per atom; the densest crystals of the Materials Project have 4.4."""

MAX_LENGTH = 1000.0
"""Å; the longest lattice vector of the Materials Project measures 275."""

FULL_OCCUPANCY = 1e-3
"""How far the written occupancy of a full site may be from 1."""

_ALL_PAIRS = 40  # atoms; up to this size comparing all pairs is faster
_SPECIES = re.compile(r"([A-Za-z]+)[0-9]*\.?[0-9]*[+-]?[0-9]*\.?[0-9]*")


@dataclass(frozen=True, slots=True)
class Crystal:
    """One ordered periodic structure as flat arrays, without a graph.

    Args:
        material_id: its name in tables and error messages.
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

    @property
    def volume(self) -> float:
        """The volume of the cell in Å³."""
        return abs(float(np.linalg.det(self.cell)))

    @property
    def formula(self) -> str:
        """The reduced formula as pymatgen writes it, such as `LiFePO4`."""
        return reduced_formula(self.atomic_numbers)

    def to_pymatgen(self) -> Structure:
        """Return the same structure for pymatgen."""
        from pymatgen.core import Lattice, Structure

        species = [symbols()[z] for z in self.atomic_numbers.tolist()]
        return Structure(Lattice(self.cell), species, self.frac_coords)

    @classmethod
    def from_pymatgen(
        cls,
        structure: Structure,
        material_id: str,
        properties: Mapping[str, float] | None = None,
    ) -> Crystal:
        """Take the arrays of a pymatgen structure and check them.

        Args:
            structure: ordered and periodic in three directions; oxidation states are
                dropped.
            material_id: its name.
            properties: its labels.

        Raises:
            BadStructure: it is disordered, holds a dummy species, or cannot be a
                crystal.
        """
        from pymatgen.core import DummySpecies

        check_periodic(structure.pbc)
        numbers = []
        for number, site in enumerate(structure):
            if not site.is_ordered:
                raise BadStructure(disordered(f"{number}", site.species_string))
            if isinstance(site.specie, DummySpecies):
                raise BadStructure(unknown_element(f"site {number}", str(site.specie)))
            numbers.append(site.specie.Z)
        return validate(
            cls(
                material_id,
                np.array(numbers, np.int64),
                structure.frac_coords,
                structure.lattice.matrix,
                properties or {},
            )
        )


def reduced_formula(atomic_numbers: np.ndarray) -> str:
    """Return the formula of some atoms as pymatgen writes it, such as `LiFePO4`."""
    numbers, counts = np.unique(atomic_numbers, return_counts=True)
    counts //= np.gcd.reduce(counts)
    return _formula(tuple(numbers.tolist()), tuple(counts.tolist()))


@lru_cache(maxsize=4096)
def _formula(numbers: tuple[int, ...], counts: tuple[int, ...]) -> str:
    from pymatgen.core import Composition

    amounts = {symbols()[z]: n for z, n in zip(numbers, counts, strict=True)}
    return Composition(amounts).reduced_formula


# ------------------------------------------------------------------ reasons, elements


def disordered(site: str, holds: str) -> str:
    """Return the reason for refusing a site that is not filled by one atom."""
    return (
        f"site {site} is disordered ({holds}); use an ordered approximant, with one "
        "atom on every site"
    )


def unknown_element(place: str, name: str) -> str:
    """Return the reason for refusing a species that is not an element of the tables."""
    return (
        f"{place} holds `{name}`, not an element between H and "
        f"{symbols()[MAX_ATOMIC_NUMBER]}; name a real element or remove it"
    )


@lru_cache(maxsize=4096)
def species_number(species: str) -> int:
    """Return the atomic number of an element or an ion, or 0 if it is neither.

    `Fe`, `FE`, `Fe3+`, `Fe+3` and `Fe12` are iron; D and T are hydrogen. All letters
    must belong to the element: `Vac` is not vanadium, `Fe,Mn` not iron.
    """
    match = _SPECIES.fullmatch(species)
    return _symbol_number(match.group(1)) if match else 0


@lru_cache(maxsize=4096)
def label_number(label: str) -> int:
    """Return the atomic number that the label of a site begins with, or 0.

    `Fe12A` and `Fe(1)` are iron; `OW1` and `Vac1` are not elements, since no letter may
    follow a symbol.
    """
    match = _SPECIES.match(label)
    return _symbol_number(match.group(1)) if match else 0


def _symbol_number(symbol: str) -> int:
    symbol = symbol.capitalize()
    return 1 if symbol in ("D", "T") else atomic_numbers_by_symbol().get(symbol, 0)


# ------------------------------------------------------------------------------ checks


def validate(crystal: Crystal) -> Crystal:
    """Return the crystal with clean arrays, or refuse it.

    Coordinates are wrapped into [0, 1) and the dtypes are those of `Crystal`.

    Raises:
        BadStructure: no atoms; an element outside 1-100; a coordinate or a cell that is
            not finite; a missing, flat or absurd cell; two atoms on one point.
    """
    numbers = np.asarray(crystal.atomic_numbers)
    frac = np.asarray(crystal.frac_coords, dtype=np.float64)
    cell = np.ascontiguousarray(crystal.cell, dtype=np.float64)
    if numbers.size == 0:
        raise BadStructure("no atoms; add the atom sites or remove the entry")
    if cell.shape != (3, 3):
        raise BadStructure(
            f"its cell has shape {cell.shape}; give three lattice vectors, (3, 3) in Å"
        )
    if frac.shape != (numbers.size, 3):
        raise BadStructure(
            f"{numbers.size} atoms but coordinates of shape {frac.shape}; give three "
            "fractional coordinates per atom"
        )
    if not (numbers.min() >= 1 and numbers.max() <= MAX_ATOMIC_NUMBER):
        atom = int(np.argmax((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)))
        raise BadStructure(unknown_element(f"site {atom}", f"Z = {numbers[atom]}"))
    if not np.isfinite(frac).all():
        atom = int(np.argmin(np.isfinite(frac).all(axis=1)))
        raise BadStructure(
            f"a coordinate of atom {atom} ({symbols()[int(numbers[atom])]}) is not a "
            "number; complete it or remove the entry"
        )
    spacing = _check_cell(cell, numbers.size)
    frac = frac - np.floor(frac)
    frac[frac >= 1.0] = 0.0  # where -1e-17 became 1 by rounding
    _check_distances(numbers, frac, cell, spacing)
    numbers = numbers.astype(np.uint8)
    return Crystal(crystal.material_id, numbers, frac, cell, crystal.properties)


def check_periodic(pbc: Any) -> None:
    """Refuse a structure that is not periodic in three directions.

    Args:
        pbc: one flag or three; None if not stated.

    Raises:
        BadStructure: a flag is false, or `pbc` does not hold flags.
    """
    if pbc is None:
        return
    flags = np.atleast_1d(np.asarray(pbc, dtype=object)).ravel().tolist()
    if len(flags) not in (1, 3) or any(flag not in (0, 1) for flag in flags):
        raise BadStructure(f"`pbc` is {pbc!r}, not three times true or false; mend it")
    if not all(flags):
        flags = flags * (3 // len(flags))
        shown = " ".join("FT"[int(flag)] for flag in flags)
        raise BadStructure(
            f"periodic in {sum(map(bool, flags))} of 3 directions (pbc = {shown}); "
            "only crystals are read, set `pbc` if it is one"
        )


def _check_cell(cell: np.ndarray, atoms: int) -> tuple[float, float, float]:
    """Refuse a cell that no crystal can have.

    Plain arithmetic: on nine numbers it is ten times faster than array functions.

    Returns:
        The spacing of the lattice planes along a, b and c, in Å.
    """
    vectors = cell.tolist()
    lengths = [math.hypot(*vector) for vector in vectors]
    for name, length in zip("abc", lengths, strict=True):
        if not math.isfinite(length):
            raise BadStructure(
                f"lattice vector {name} is not three numbers; mend the cell"
            )
        if not MIN_DISTANCE <= length <= MAX_LENGTH:
            raise BadStructure(
                f"lattice vector {name} is {length:.4g} Å long, which no crystal has; "
                "mend the cell (lengths are in Å)"
            )
    a, b, c = vectors
    faces = [_cross(b, c), _cross(c, a), _cross(a, b)]
    volume = abs(sum(x * y for x, y in zip(a, faces[0], strict=True)))
    if volume < MIN_VOLUME * atoms:
        raise BadStructure(
            f"its cell of {volume:.4g} Å³ is too small for {atoms} atoms (impossible "
            "cell); mend its lengths and angles"
        )
    x, y, z = (volume / math.hypot(*face) for face in faces)
    return x, y, z


def _cross(u: list[float], v: list[float]) -> tuple[float, float, float]:
    return (
        u[1] * v[2] - u[2] * v[1],
        u[2] * v[0] - u[0] * v[2],
        u[0] * v[1] - u[1] * v[0],
    )


def _check_distances(
    numbers: np.ndarray,
    frac: np.ndarray,
    cell: np.ndarray,
    spacing: tuple[float, float, float],
) -> None:
    """Refuse two atoms, or an atom and its image, closer than `MIN_DISTANCE`."""
    if min(spacing) > 2 * MIN_DISTANCE:
        i, j, distance = _closest_pair(frac, cell, spacing)
    else:
        i, j, distance = _closest_pair_in_thin_cell(frac, cell)
    if distance >= MIN_DISTANCE:
        return
    if i == j:
        raise BadStructure(
            f"atom {i} lies {distance:.2f} Å from its own image (impossible cell); "
            "mend the lengths and angles of the cell"
        )
    first, second = sorted((i, j))
    pair = f"{symbols()[int(numbers[first])]} and {symbols()[int(numbers[second])]}"
    raise BadStructure(
        f"two atoms on one point: atoms {first} and {second} ({pair}) are "
        f"{distance:.2f} Å apart; remove one of them or mend the coordinates"
    )


def _closest_pair(
    frac: np.ndarray, cell: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[int, int, float]:
    """Return the two closest atoms; exact if they are within `MIN_DISTANCE`.

    Rounding to the nearest lattice translation is exact here, because the lattice
    planes are more than two such distances apart.
    """
    found = (-1, -1, math.inf)
    for i, j in _candidates(frac, spacing):
        delta = frac[i] - frac[j]
        delta = (delta - np.rint(delta)) @ cell
        squared = np.einsum("ij,ij->i", delta, delta)
        least = squared.argmin()
        if squared[least] < found[2] ** 2:
            found = (int(i[least]), int(j[least]), math.sqrt(squared[least]))
    return found


def _candidates(
    frac: np.ndarray, spacing: tuple[float, float, float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of atoms, including all that are closer than `MIN_DISTANCE`.

    In a large cell, atoms are sorted along its longest direction. Each is paired with
    the next ones until these are too far along it. That makes hardly more than N pairs,
    not N².
    """
    atoms = len(frac)
    if atoms <= _ALL_PAIRS:
        if atoms > 1:
            yield _all_pairs(atoms)
        return
    axis = int(np.argmax(spacing))
    order = np.argsort(frac[:, axis])
    along = frac[order, axis]
    reach = along + MIN_DISTANCE / spacing[axis]
    order, along = np.tile(order, 2), np.concatenate((along, along + 1.0))
    for step in range(1, atoms):
        near = np.flatnonzero(along[step : step + atoms] < reach)
        if not len(near):
            return
        yield order[near], order[near + step]


@cache
def _all_pairs(atoms: int) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.triu_indices(atoms, 1)
    return i, j


def _closest_pair_in_thin_cell(
    frac: np.ndarray, cell: np.ndarray
) -> tuple[int, int, float]:
    """Return the same for a cell so skewed that many images lie within reach."""
    from pymatgen.optimization.neighbors import find_points_in_spheres

    coords = np.ascontiguousarray(frac @ cell)
    periodic = np.ones(3, dtype=np.int64)
    i, j, shift, distance = find_points_in_spheres(
        coords, coords, MIN_DISTANCE, periodic, cell, 1e-8
    )
    pairs = np.flatnonzero((i != j) | shift.any(axis=1))
    if not len(pairs):
        return -1, -1, math.inf
    least = pairs[distance[pairs].argmin()]
    return int(i[least]), int(j[least]), float(distance[least])
