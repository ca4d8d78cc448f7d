"""Whether two crystals are the same one, or of the same structure type.

`pymatgen.analysis.structure_matcher.StructureMatcher` decides (S. P. Ong et al. (2013),
Comput. Mater. Sci. 68, 314-319, doi:10.1016/j.commatsci.2012.10.028). Its tolerances
are wide, and its search for a primitive cell moves atoms by up to 0.25 Å: left alone
it takes the phases of BaTiO3, and cubic and tilted SrTiO3, for one. Space groups
therefore decide how closely two crystals must agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crysdistill.structures.crystal import Crystal
from crysdistill.structures.symmetry import ANGLE_TOLERANCE, SYMPREC, space_group

if TYPE_CHECKING:
    from pymatgen.analysis.structure_matcher import StructureMatcher

MAX_ATOMS = 400
"""Atoms in the primitive cell up to which structures are matched atom by atom."""

Test = Literal["same", "supercell", "strained", "averaged", "anonymous"]
"""What may differ between two primitive cells, both taken at one volume. Displacements
are in units of the mean free length, the cube root of the volume per atom.

- `same`: atoms by 0.2 (about 0.5 Å), the cell by 10 % and 5 degrees.
- `supercell`: the same, where the search for one primitive cell stopped too early.
- `strained`: the cell alone, as in `same`; atoms by 0.02, since a homogeneous strain
  moves them no further. Primitive cells are found without averaging atoms.
- `averaged`: nothing, once the primitive cell of either was found by averaging atoms
  that nearly repeat: so pymatgen's `get_primitive_structure` changes a crystal.
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
        test: for which test; `strained` needs atoms that did not move.

    Returns:
        The crystal, or None where its primitive cell has more than `MAX_ATOMS` atoms
        or none can be found: such crystals are judged by their fingerprint.
    """
    import spglib

    structure: Any = (crystal.cell, crystal.frac_coords, crystal.atomic_numbers)
    try:
        # Exact and fast; what is left to pymatgen is the search for near repetition.
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
    if len(crystal.atomic_numbers) > MAX_ATOMS:
        return None
    try:
        reduced = crystal.to_pymatgen().get_reduced_structure(reduction_algo="niggli")
        reduced = reduced.get_primitive_structure(
            tolerance=_TOLERANCES[test].repetition
        )
    except Exception:  # cells on the edge of what its algorithms can reduce
        return None
    return replace(
        crystal,
        cell=reduced.lattice.matrix,
        frac_coords=reduced.frac_coords,
        atomic_numbers=np.array([site.specie.Z for site in reduced], np.uint8),
    )


def agree(first: Crystal, second: Crystal, test: Test) -> bool:
    """Tell whether two primitive crystals agree within the tolerances of `test`.

    Volumes are made equal first: compare them beforehand.

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
        return False  # what `same` has found already
    matcher = _matcher(test)
    fit = matcher.fit_anonymous if test == "anonymous" else matcher.fit
    one, other = first.to_pymatgen(), second.to_pymatgen()
    # A match found from one side is now and then missed from the other.
    return bool(
        fit(one, other, skip_structure_reduction=True)
        or fit(other, one, skip_structure_reduction=True)
    )


def judge(job: tuple[Crystal | None, Crystal | None, Test]) -> bool | None:
    """Call `agree` with a pair and a test; None where a primitive cell is missing."""
    first, second, test = job
    if first is None or second is None:
        return None
    return agree(first, second, test)


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
