"""Space groups and crystal systems, at two tolerances, by two engines.

Near a tolerance the space group of a relaxed crystal depends on a few thousandths of an
Ångström, and engines differ there. The literature uses the labels of `spglib`; `moyopy`
is five times as fast. The engine `fast` accepts moyopy's answer if it is the same group
at both tolerances, and asks spglib otherwise.

Sources: A. Togo, K. Shinohara and I. Tanaka, Sci. Technol. Adv. Mater. Meth. 4, 2384822
(2024), doi:10.1080/27660400.2024.2384822 (spglib); K. Shinohara, moyo (2024),
https://github.com/spglib/moyo.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from crysdistill.structures.crystal import Crystal

SYMPREC = (0.01, 0.1)
"""Å. The tolerances of the space groups in stores: pymatgen's default for relaxed
structures, and the looser one with which the Materials Project labels its entries."""

ANGLE_TOLERANCE = 5.0
"""Degrees, for spglib. This is pymatgen's default (spglib's own is -1), so that labels
are comparable with the literature. moyopy judges angles by `symprec`."""

CRYSTAL_SYSTEMS = (
    "triclinic",
    "monoclinic",
    "orthorhombic",
    "tetragonal",
    "trigonal",
    "hexagonal",
    "cubic",
)
"""The crystal systems, by the number that `crystal_system` returns."""

Engine = Literal["fast", "spglib"]
ENGINES: tuple[Engine, ...] = ("fast", "spglib")

_FIRST_GROUPS = np.array([1, 3, 16, 75, 143, 168, 195])  # of each crystal system

# Both engines report each doubtful search on stderr, which breaks progress bars.
os.environ.setdefault("SPGLIB_WARNING", "OFF")  # spglib reads it before every line
logging.getLogger("moyo").setLevel(logging.ERROR)


def space_groups(crystal: Crystal, engine: Engine = "fast") -> tuple[int, ...]:
    """Return the space group number at each tolerance of `SYMPREC`; 0 for none.

    Args:
        crystal: checked; spglib crashes on coordinates that are not finite.
        engine: `spglib`, or `fast` (moyopy where its tolerances agree, else spglib).
    """
    if engine == "fast":
        found = moyopy_groups(crystal, SYMPREC)
        if found[0] == found[1] > 0:
            return found
    return tuple(space_group(crystal, symprec) for symprec in SYMPREC)


def engine_versions(engine: Engine) -> str:
    """Return the engines and their versions, for the record of a store."""
    import moyopy
    import spglib

    label = f"spglib {spglib.__version__}"
    if engine == "spglib":
        return label
    return f"moyopy {moyopy.__version__}, {label} where its tolerances disagree"


def space_group(
    crystal: Crystal, symprec: float, angle_tolerance: float = ANGLE_TOLERANCE
) -> int:
    """Return spglib's number of the space group, 1-230; 0 if it finds none.

    Args:
        crystal: checked; spglib crashes on coordinates that are not finite.
        symprec: Å, how far an atom may lie from its image.
        angle_tolerance: degrees, the same for the angles of the cell.
    """
    import spglib

    cell: Any = (crystal.cell, crystal.frac_coords, crystal.atomic_numbers)
    try:
        found = spglib.get_spacegroup(cell, symprec, angle_tolerance)
    except Exception:  # spglib's errors differ by version; none concerns the user
        return 0
    return int(found.rpartition("(")[2].rstrip(")")) if found else 0


def moyopy_groups(crystal: Crystal, tolerances: Sequence[float]) -> tuple[int, ...]:
    """Return moyopy's space group at each tolerance; 0 where it finds none."""
    import moyopy

    cell = moyopy.Cell(
        basis=crystal.cell.tolist(),
        positions=crystal.frac_coords.tolist(),
        numbers=crystal.atomic_numbers.tolist(),
    )
    groups = []
    for symprec in tolerances:
        try:
            # With a separate angle tolerance the search can take hours.
            found = moyopy.MoyoDataset(cell, symprec=symprec, rotate_basis=False)
            groups.append(int(found.number))
        except BaseException as error:  # a panic in Rust is not an `Exception`
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            groups.append(0)
    return tuple(groups)


def crystal_system(space_groups: np.ndarray) -> np.ndarray:
    """Return the crystal system of each space group as a number into `CRYSTAL_SYSTEMS`.

    Args:
        space_groups: any shape, 1-230, or 0 if unknown.

    Returns:
        The same shape, int64, 0-6; -1 where unknown.
    """
    groups = np.asarray(space_groups)
    return np.searchsorted(_FIRST_GROUPS, groups, side="right").astype(np.int64) - 1
