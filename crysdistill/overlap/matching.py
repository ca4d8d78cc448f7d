"""Whether two crystals are the same one, or of the same structure type.

`pymatgen.analysis.structure_matcher.StructureMatcher` decides (S. P. Ong et al. (2013),
Comput. Mater. Sci. 68, 314-319, doi:10.1016/j.commatsci.2012.10.028). Its tolerances
are wide, and its search for a primitive cell moves atoms by up to 0.25 Å. Alone, it
would merge the phases of BaTiO3, and cubic and tilted SrTiO3. Space groups therefore
decide how closely two crystals must agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crysdistill.overlap.cells import may_repeat, niggli
from crysdistill.overlap.fitting import EDGE, fit
from crysdistill.overlap.pairing import NO, YES
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import symbols
from crysdistill.structures.symmetry import ANGLE_TOLERANCE, SYMPREC, space_group

if TYPE_CHECKING:
    from pymatgen.analysis.structure_matcher import StructureMatcher

MAX_ATOMS = 400
"""Atoms in the largest primitive cell that is matched atom by atom."""

Test = Literal["same", "supercell", "strained", "averaged", "anonymous"]
"""What may differ between two primitive cells, both scaled to one volume. Displacements
are in units of the mean free length, the cube root of the volume per atom.

- `same`: atoms by 0.2 (about 0.5 Å), the cell by 10 % and 5 degrees.
- `supercell`: as `same`, if the search for one primitive cell stopped too early.
- `strained`: the cell as in `same`; atoms by 0.02, since a homogeneous strain
  moves them no further. Primitive cells are found without averaging atoms.
- `averaged`: nothing, after averaging atoms that nearly repeat to find the primitive
  cells: pymatgen's `get_primitive_structure` changes a crystal in this way.
- `anonymous`: as `same`, with species exchanged for others one by one.
"""


@dataclass(frozen=True)
class _Tolerances:
    length: float = 0.1  # relative
    angle: float = 5.0  # degrees
    site: float = 0.2
    repetition: float = 0.25  # Å, in the search for a primitive cell
    supercell: bool = False


_TOLERANCES: dict[Test, _Tolerances] = {
    "same": _Tolerances(),
    "supercell": _Tolerances(supercell=True),
    "strained": _Tolerances(site=0.02, repetition=0.02),
    "averaged": _Tolerances(length=3e-4, angle=0.03, site=0.005),
    "anonymous": _Tolerances(),
}
_LARGEST_SUPERCELL = 8

# Left- and right-handed forms of one crystal: the higher number becomes the lower.
_MIRROR_IMAGES = {
    78: 76, 95: 91, 96: 92, 145: 144, 153: 151, 154: 152,
    170: 169, 172: 171, 179: 178, 181: 180, 213: 212,
}  # fmt: skip


def unhanded(space_groups: np.ndarray) -> np.ndarray:
    """Return space groups with each enantiomorphic pair under its lower number.

    Args:
        space_groups: any shape, 0-230.
    """
    table = np.arange(231, dtype=np.int64)
    table[list(_MIRROR_IMAGES)] = list(_MIRROR_IMAGES.values())
    return table[np.asarray(space_groups, dtype=np.int64)]


def space_groups(crystal: Crystal) -> tuple[int, ...]:
    """Return the space group at each tolerance of `SYMPREC`, without handedness."""
    groups = [space_group(crystal, symprec) for symprec in SYMPREC]
    return tuple(unhanded(np.array(groups)).tolist())


# ---------------------------------------------------------------------------- matching


def primitive(crystal: Crystal, test: Test = "same") -> Crystal | None:
    """Return the reduced primitive cell that `agree` compares.

    Args:
        crystal: any cell of a crystal.
        test: the test to prepare for; `strained` needs atoms that have not moved.

    Returns:
        The crystal, or None if its primitive cell has more than `MAX_ATOMS` atoms or
        none can be found: such crystals are judged by their fingerprint.
    """
    repetition = _TOLERANCES[test].repetition
    if (plain := primitive_already(crystal, repetition)) is not None:
        return plain if len(plain.atomic_numbers) <= MAX_ATOMS else None
    import spglib

    structure: Any = (crystal.cell, crystal.frac_coords, crystal.atomic_numbers)
    try:
        # Exact and fast; pymatgen then only searches for near repetition.
        found: Any = spglib.find_primitive(structure, 1e-3, ANGLE_TOLERANCE)
    except Exception:  # spglib's errors differ by version; none concerns the user
        found = None
    if found is not None and len(found[2]) < len(crystal.atomic_numbers):
        cell, frac, numbers = found
        crystal = replace(
            crystal,
            cell=cell,
            frac_coords=frac,
            atomic_numbers=numbers.astype(np.uint8),
        )
        if (plain := primitive_already(crystal, repetition)) is not None:
            return plain if len(plain.atomic_numbers) <= MAX_ATOMS else None
    if len(crystal.atomic_numbers) > MAX_ATOMS:
        return None
    try:
        reduced = crystal.to_pymatgen().get_reduced_structure(reduction_algo="niggli")
        reduced = reduced.get_primitive_structure(tolerance=repetition)
    except Exception:  # cells on the edge of what its algorithms can reduce
        return None
    return replace(
        crystal,
        cell=reduced.lattice.matrix,
        frac_coords=reduced.frac_coords,
        atomic_numbers=np.array([site.specie.Z for site in reduced], np.uint8),
    )


def primitive_for_all(crystal: Crystal) -> Crystal | None:
    """Return the cell that `primitive` finds for every test, None if they differ."""
    widest = max(tolerances.repetition for tolerances in _TOLERANCES.values())
    plain = primitive_already(crystal, widest)
    small = plain is not None and len(plain.atomic_numbers) <= MAX_ATOMS
    return plain if small else None


def primitive_already(crystal: Crystal, repetition: float) -> Crystal | None:
    """Return the Niggli cell of a crystal that no search could make smaller.

    Args:
        crystal: any cell.
        repetition: Å, how far nearly repeating atoms may be off.

    Returns:
        The crystal, or None if its cell may repeat or cannot be reduced.
    """
    numbers = crystal.atomic_numbers
    basis = niggli(np.ascontiguousarray(crystal.cell), crystal.volume)
    if not basis.any():
        return None
    cell = basis @ crystal.cell
    frac = crystal.frac_coords @ np.linalg.inv(basis)
    frac -= np.floor(frac)
    counts = np.bincount(numbers)
    # A smaller cell must divide the atoms of each species evenly.
    units = int(np.gcd.reduce(counts))
    if units > 1:
        present = np.flatnonzero(counts)
        fewest = present[counts[present] == counts[present].min()]
        # pymatgen takes the symbol that comes first in the alphabet.
        rarest = min(fewest.tolist(), key=lambda number: symbols()[number])
        first = np.flatnonzero(numbers == rarest)
        if may_repeat(frac, numbers, first, units, cell, repetition):
            return None
    return replace(crystal, cell=cell, frac_coords=frac)


def agree(first: Crystal, second: Crystal, test: Test) -> bool:
    """Tell whether two primitive crystals agree within the tolerances of `test`.

    This makes the volumes equal first, so compare them beforehand.

    Args:
        first: from `primitive`.
        second: from `primitive`.
        test: what may differ.
    """
    counts = len(first.atomic_numbers), len(second.atomic_numbers)
    most = _LARGEST_SUPERCELL if test == "supercell" else 1
    if max(counts) % min(counts) or max(counts) // min(counts) > most:
        return False
    if test == "supercell" and counts[0] == counts[1]:
        return False  # `same` has covered this already
    answer = compiled_answer(first, second, test)
    return agree_by_pymatgen(first, second, test) if answer is None else answer


def agree_by_pymatgen(first: Crystal, second: Crystal, test: Test) -> bool:
    """Let pymatgen's StructureMatcher decide; see `agree`."""
    matcher = _matcher(test)
    fit = matcher.fit_anonymous if test == "anonymous" else matcher.fit
    one, other = first.to_pymatgen(), second.to_pymatgen()
    # A match found in one direction is sometimes missed in the other.
    return bool(
        fit(one, other, skip_structure_reduction=True)
        or fit(other, one, skip_structure_reduction=True)
    )


def compiled_answer(first: Crystal, second: Crystal, test: Test) -> bool | None:
    """Tell whether two primitive crystals agree; None if that is not clear.

    Args:
        first: a crystal of at most `MAX_ATOMS` atoms.
        second: one with as many atoms, or a multiple or fraction of that number.
        test: what may differ.
    """
    small, large = sorted(
        (first, second), key=lambda crystal: len(crystal.atomic_numbers)
    )
    doubt = False
    for pairing in _pairings(small.atomic_numbers, large.atomic_numbers, test):
        one, other = _by_species(small, pairing[0]), _by_species(large, pairing[1])
        # A no is certain at slightly wider tolerances; a yes is certain at slightly
        # tighter ones.
        found = _fits(one, other, test, 1 + EDGE)
        if found == NO:
            continue
        if found == YES and _fits(one, other, test, 1 - EDGE) == YES:
            return True
        doubt = True
    return None if doubt else False


def compile_matcher() -> None:
    """Compile the code that judges a pair; other processes then load it from disk."""
    numbers = np.full(2, 26, np.uint8)
    places = np.array([[0.0, 0, 0], [0.4, 0.3, 0.2]])  # a cell that does not repeat
    pair = Crystal("", numbers, places, np.diag([3.0, 4.0, 5.0]))
    cell = primitive_for_all(pair)
    if cell is not None:
        compiled_answer(cell, cell, "same")


def judge(job: tuple[Crystal | None, Crystal | None, Test]) -> bool | None:
    """Call `agree` with a pair and a test; None if a primitive cell is missing."""
    first, second, test = job
    if first is None or second is None:
        return None
    return agree(first, second, test)


@dataclass(frozen=True)
class _Sorted:
    """The atoms of a crystal, species by species."""

    cell: np.ndarray
    frac: np.ndarray
    starts: np.ndarray
    anchor: int


def _pairings(
    first: np.ndarray, second: np.ndarray, test: Test
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield orders of the species of both crystals that pair them one by one.

    The rarest species come first: they tell two crystals apart soonest.
    """
    (species, counts), (others, amounts) = (
        np.unique(numbers, return_counts=True) for numbers in (first, second)
    )
    if len(species) != len(others):
        return
    factor = len(second) // len(first)
    if test != "anonymous":
        if (species == others).all() and (counts * factor == amounts).all():
            order = np.argsort(counts, kind="stable")
            yield species[order], others[order]
        return
    order = np.argsort(counts, kind="stable")
    species, counts = species[order], counts[order]
    for places in map(list, itertools.permutations(range(len(others)))):
        if (counts * factor == amounts[places]).all():
            yield species, others[places]


def _by_species(crystal: Crystal, order: np.ndarray) -> _Sorted:
    numbers = crystal.atomic_numbers
    groups = [np.flatnonzero(numbers == number) for number in order.tolist()]
    starts = np.cumsum([0, *map(len, groups)])
    # pymatgen's anchor is the first atom of a rarest species, in the given order.
    fewest = min(map(len, groups))
    _, anchor = min(
        (group[0], start)
        for group, start in zip(groups, starts, strict=False)
        if len(group) == fewest
    )
    frac = np.ascontiguousarray(crystal.frac_coords[np.concatenate(groups)])
    return _Sorted(np.ascontiguousarray(crystal.cell), frac, starts, int(anchor))


def _fits(small: _Sorted, large: _Sorted, test: Test, width: float) -> int:
    """Map either crystal onto the other, with tolerances scaled by `width`."""
    tolerances = _TOLERANCES[test]
    limits = (
        tolerances.length * width,
        tolerances.angle * width,
        tolerances.site * width,
    )
    factor = len(large.frac) // len(small.frac)
    ways = [(small, large, large.anchor, False)]
    if factor > 1:
        ways.append((small, large, small.anchor * factor, True))
    else:
        ways.append((large, small, small.anchor, False))
    best = NO
    for source, target, anchor, anchored in ways:
        found = fit(
            source.cell,
            source.frac,
            target.cell,
            target.frac,
            target.starts,
            anchor,
            factor,
            anchored,
            *limits,
        )
        if found == YES:
            return YES
        best = max(best, found)
    return best


@cache
def _matcher(test: Test) -> StructureMatcher:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    tolerances = _TOLERANCES[test]
    return StructureMatcher(
        ltol=tolerances.length,
        stol=tolerances.site,
        angle_tol=tolerances.angle,
        primitive_cell=False,  # `primitive` has done it, once per crystal
        scale=True,
        attempt_supercell=tolerances.supercell,
    )
