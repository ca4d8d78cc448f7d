"""Symmetry operations: read, looked up by name, and applied to sites."""

from __future__ import annotations

import re
from functools import lru_cache

import gemmi
import numpy as np

from crysdistill.errors import BadStructure

SAME_SITE = 0.1
"""Å. Images of one site closer than this are one atom on a special position, written
with too few digits; no two atoms come as close."""

METRIC_TOLERANCE = 0.05
"""How far a cell may be from the symmetry that its file states, relative to it."""

_AMOUNT = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_EXPRESSION = re.compile(
    rf"([+-]?({_AMOUNT}(/[1-9][0-9]*)?\*?[xyz]?|[xyz])(?=[+-]|$))+"
)
_TERM = re.compile(rf"([+-]?)(?=[0-9.xyz])({_AMOUNT}?)(?:/([0-9]+))?\*?([xyz]?)")
_ORIGIN = re.compile(r"\s*:?([SZ])$")


@lru_cache(maxsize=512)
def operations(triplets: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Turn `x, y, z+1/2` and the like into arrays.

    Any fraction is read: files hold 499/999 where a table of groups knows 1/2.

    Args:
        triplets: M operations.

    Returns:
        Rotations (M, 3, 3) and translations (M, 3), for fractional columns.

    Raises:
        BadStructure: one is not an operation.
    """
    arrays = np.zeros((len(triplets), 3, 4))
    for array, triplet in zip(arrays, triplets, strict=True):
        parts = triplet.lower().replace(" ", "").split(",")
        if len(parts) != 3 or not all(map(_EXPRESSION.fullmatch, parts)):
            raise BadStructure(
                f"the symmetry operation `{triplet}` cannot be read; mend the file"
            )
        for row, part in zip(array, parts, strict=True):
            for sign, over, under, letter in _TERM.findall(part):
                value = float(over or 1) / float(under or 1)
                column = "xyz".find(letter) if letter else 3
                row[column] += -value if sign == "-" else value
    return arrays[:, :, :3].copy(), arrays[:, :, 3].copy()


def group_operations(
    hall: str | None, symbol: str | None, number: str | None, alpha: float, gamma: float
) -> tuple[str, ...]:
    """Return the operations of a space group by its name; of P1 where it has none.

    Args:
        hall: the Hall symbol, which alone tells everything.
        symbol: the Hermann-Mauguin symbol; origin 1 where two are possible, as in
            pymatgen and gemmi.
        number: 1-230, as written.
        alpha: degrees; tells rhombohedral from hexagonal axes, with `gamma`.
        gamma: degrees.

    Raises:
        BadStructure: the name is not known.
    """
    if hall is not None:
        try:
            return tuple(op.triplet() for op in gemmi.symops_from_hall(hall))
        except RuntimeError:
            symbol = symbol or hall  # refused below if it has no other name
    if symbol is None and number is not None:
        try:
            symbol = gemmi.find_spacegroup_by_number(int(number)).hm
        except (ValueError, AttributeError):
            raise BadStructure(
                f"no space group has number `{number}`; mend it"
            ) from None
    if symbol is None:
        return ("x,y,z",)
    # P2_1/c is pymatgen's way to write P21/c; S and Z are ICSD's origins 1 and 2.
    plain = _ORIGIN.sub(lambda m: ":1" if m.group(1) == "S" else ":2", symbol)
    group = gemmi.find_spacegroup_by_name(plain.replace("_", ""), alpha, gamma)
    if group is None:
        raise BadStructure(
            f"the space group `{symbol}` is not known and no symmetry operations are "
            "listed; add `_space_group_symop_operation_xyz`"
        )
    return tuple(op.triplet() for op in group.operations())


def check_setting(rotations: np.ndarray, cell: np.ndarray) -> None:
    """Refuse operations (M, 3, 3) that change the lengths or angles of the cell.

    Raises:
        BadStructure: they belong to another cell or to another setting.
    """
    metric = cell @ cell.T
    moved = rotations.transpose(0, 2, 1) @ metric @ rotations  # (M, 3, 3)
    scale = np.sqrt(np.outer(metric.diagonal(), metric.diagonal()))
    if (np.abs(moved - metric) > METRIC_TOLERANCE * scale).any():
        raise BadStructure(
            "its symmetry does not fit its cell (another setting?); mend either"
        )


def expand(
    frac: np.ndarray, rotations: np.ndarray, translations: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Apply symmetry operations to sites.

    Images of a site that coincide, because it lies on a symmetry element, become one
    atom: the first of them, as in pymatgen.

    Args:
        frac: the sites (S, 3).
        rotations: (M, 3, 3).
        translations: (M, 3).
        cell: (3, 3) in Å.

    Returns:
        All atoms of the cell (N, 3), and the site (N,) that each comes from.
    """

    def coincide(delta: np.ndarray) -> np.ndarray:
        delta = (delta - np.rint(delta)) @ cell
        return np.einsum("...i,...i->...", delta, delta) < SAME_SITE**2

    images = np.einsum("mij,sj->smi", rotations, frac) + translations  # (S, M, 3)
    keep = np.ones(images.shape[:2], bool)
    # A site that only the identity leaves in place has as many images as operations.
    special = coincide(images - frac[:, None]).sum(axis=1) > 1
    for site in np.flatnonzero(special):
        rest = np.arange(len(rotations))
        keep[site] = False
        while len(rest):
            keep[site, rest[0]] = True
            rest = rest[~coincide(images[site, rest] - images[site, rest[0]])]
    return images[keep], np.nonzero(keep)[0]
