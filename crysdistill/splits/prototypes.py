"""Structure types of crystals, so wide that similar crystals share a group."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from crysdistill.overlap.facts import Collection
from crysdistill.overlap.matching import unhanded
from crysdistill.overlap.search import (
    PROTOTYPE_DISTANCE,
    STRUCTURE_DISTANCE,
    TWIN_DISTANCE,
)
from crysdistill.store.fingerprints import composition, distances, fingerprint


def prototype_names(crystals: Collection, rows: np.ndarray) -> list[str]:
    """Return the structure type of each crystal, such as `AB2 like mp-149`.

    Two crystals share a group if an overlap search would propose them as one prototype
    or as the same crystal. They have the same anonymised formula, and fingerprints that
    are alike within one space group, or almost equal whatever the symmetry, or alike
    for the same elements. Crystals connected through others share a group, too. The
    search then asks a matcher. A split need not, since a group that is too wide leaks
    nothing. So two groups never hold a pair of kind `structure` or `prototype`.

    A group is named after its formula and the first of its ids.

    Args:
        crystals: a store. An unknown space group matches any other.
        rows: the rows of the crystals.
    """
    blocks: dict[tuple[int, ...], list[int]] = defaultdict(list)
    species: list[tuple[int, ...]] = []
    start = crystals.atom_offsets
    for place, row in enumerate(rows.tolist()):
        numbers = crystals.atomic_numbers[start[row] : start[row + 1]]
        elements, counts = composition(numbers)
        species.append(tuple(elements.tolist()))
        blocks[tuple(counts.tolist())].append(place)
    known = np.asarray(crystals.space_groups)
    spaces = unhanded(known[rows, :2]) if known.size else np.zeros((len(rows), 2), int)
    names = [""] * len(rows)
    for amounts, places in blocks.items():
        members = rows[places]
        types = np.zeros(1, np.int64)
        if len(places) > 1:
            seen: dict[tuple[int, ...], int] = {}
            kinds = [seen.setdefault(species[p], len(seen)) for p in places]
            types = _types(
                fingerprints(crystals, members),
                amounts,
                np.array(kinds),
                spaces[places],
            )
        first: dict[int, str] = {}
        for row, kind in zip(members.tolist(), types.tolist(), strict=True):
            name = crystals.material_ids[row]
            first[kind] = min(first.get(kind, name), name)
        for place, kind in zip(places, types.tolist(), strict=True):
            names[place] = f"{anonymous(amounts)} like {first[kind]}"
    return names


def fingerprints(crystals: Collection, rows: np.ndarray) -> np.ndarray:
    """Return the fingerprints of crystals of one anonymised formula, (rows, S, F)."""
    known = crystals.fingerprints(rows)
    if known is not None:
        return known
    return np.stack([fingerprint(crystals.crystal(row)) for row in rows.tolist()])


def anonymous(amounts: tuple[int, ...]) -> str:
    """Return an anonymised formula, such as `AB2`, of rising amounts."""
    letters = (chr(ord("A") + place % 26) for place in range(len(amounts)))
    return "".join(
        f"{letter}{n if n > 1 else ''}"
        for letter, n in zip(letters, amounts, strict=True)
    )


def _types(
    profiles: np.ndarray,
    amounts: tuple[int, ...],
    species: np.ndarray,
    spaces: np.ndarray,
) -> np.ndarray:
    """Number the structure types within one anonymised formula.

    Each crystal is compared once with the crystals that have no type yet. So the work
    for a type of many crystals grows with their number, not with its square.

    Args:
        profiles: (B, S, F) fingerprints.
        amounts: (S,) amounts of the formula.
        species: (B,) numbers that are equal for equal elements.
        spaces: (B, 2) space groups, 0 if not known.

    Returns:
        (B,) int64.
    """
    types = np.full(len(profiles), -1, np.int64)
    free = np.arange(len(profiles))
    number = 0
    while len(free):
        edge, free = free[:1], free[1:]
        types[edge] = number
        while len(edge) and len(free):
            near = np.zeros(len(free), bool)
            for part, ordered, exchanged in distances(
                profiles[edge], profiles[free], amounts
            ):
                some = edge[part]
                alike = exchanged <= TWIN_DISTANCE
                alike |= (exchanged <= PROTOTYPE_DISTANCE) & _may_share(
                    spaces[some], spaces[free]
                )
                alike |= (ordered <= STRUCTURE_DISTANCE) & (
                    species[some, None] == species[free]
                )
                near |= np.any(alike, axis=0)
            edge, free = free[near], free[~near]
            types[edge] = number
        number += 1
    return types


def _may_share(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return whether the known space groups agree, (A, B)."""
    shared = np.zeros((len(first), len(second)), bool)
    for one in first.T:
        for other in second.T:
            shared |= (one[:, None] == other) & (other > 0)
    lost, missing = ~np.any(first, axis=1), ~np.any(second, axis=1)
    return shared | lost[:, None] | missing
