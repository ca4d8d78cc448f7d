"""Symmetry operations: read them, check that they form a group, apply them to sites."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from crysdistill.errors import BadStructure

SAME_SITE = 0.1
"""Å. Images of one site closer than this are one atom on a special position, written
with too few digits. No two atoms come this close."""

METRIC_TOLERANCE = 0.05
"""How far a cell may deviate from the symmetry that its file states, relative to it."""

_AMOUNT = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_EXPRESSION = re.compile(
    rf"([+-]?({_AMOUNT}(/[1-9][0-9]*)?\*?[xyz]?|[xyz])(?=[+-]|$))+"
)
_TERM = re.compile(rf"([+-]?)(?=[0-9.xyz])({_AMOUNT}?)(?:/([0-9]+))?\*?([xyz]?)")
_TRANSLATION = 0.02  # how far 0.33 may be from a third, after three of them

Operations = tuple[np.ndarray, np.ndarray]
"""Rotations (M, 3, 3) and translations (M, 3), for fractional columns."""


@lru_cache(maxsize=512)
def operations(triplets: tuple[str, ...]) -> Operations:
    """Turn `x, y, z+1/2` and the like into arrays.

    Any fraction is read, because files may hold 499/999 instead of 1/2.

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


def check_group(listed: Operations) -> Operations:
    """Return each operation of a list once, or refuse a list that is not a group.

    A list that was cut, or that has a damaged operation, is not a group: the product of
    two of its operations is missing from it.

    Raises:
        BadStructure: it is not a group.
    """
    return _group_of(*(array.tobytes() for array in listed))


@lru_cache(maxsize=512)
def _group_of(rotation_bytes: bytes, translation_bytes: bytes) -> Operations:
    rotations = np.frombuffer(rotation_bytes).reshape(-1, 3, 3)
    translations = np.frombuffer(translation_bytes).reshape(-1, 3)
    keep: list[int] = []
    for n in range(len(rotations)):
        same = _same(rotations[keep], translations[keep], rotations[n], translations[n])
        if not same.any():
            keep.append(n)
    rotations, translations = rotations[keep], translations[keep]
    identity = _same(rotations, translations, np.eye(3), np.zeros(3))
    closed = identity.any() and all(
        _same(
            rotations[None],
            translations[None],
            (rotations[n] @ rotations)[:, None],
            (translations @ rotations[n].T + translations[n])[:, None],
        )
        .any(axis=1)
        .all()
        for n in range(len(rotations))
    )
    if not closed:
        count = f"{len(keep)} symmetry operation{'s' * (len(keep) != 1)}"
        raise BadStructure(
            f"its {count} do not form a group: one is missing or damaged; complete "
            "the list"
        )
    return rotations, translations


def _same(
    rotations: np.ndarray,
    translations: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
) -> np.ndarray:
    """Return which operations are the same up to lattice translations."""
    delta = translations - translation
    close = np.abs(delta - np.rint(delta)).max(axis=-1, initial=0) <= _TRANSLATION
    return close & (np.abs(rotations - rotation).max(axis=(-2, -1), initial=0) < 1e-6)


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
    # A site that only the identity leaves in place has one image for each operation.
    special = coincide(images - frac[:, None]).sum(axis=1) > 1
    for site in np.flatnonzero(special):
        rest = np.arange(len(rotations))
        keep[site] = False
        while len(rest):
            keep[site, rest[0]] = True
            rest = rest[~coincide(images[site, rest] - images[site, rest[0]])]
    return images[keep], np.nonzero(keep)[0]
