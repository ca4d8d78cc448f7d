"""Fingerprints of crystals for any choice of cell: composition and distances.

Legend of shapes: B crystals, S species of a crystal, F numbers per species.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from crysdistill.machine_code import machine_code
from crysdistill.structures.crystal import Crystal

NEIGHBORS = 32
"""Distances per profile: enough to reach the third shell of close packings, where
stackings first differ."""

_MAX_PERMUTATIONS = 120  # beyond, an assignment problem per pair is cheaper
_PAIRS_AT_ONCE = 4_000_000  # 32 MB of distances


def fingerprint(crystal: Crystal) -> np.ndarray:
    """Return the mean distances around the atoms of each species.

    Each species has two profiles: the mean distance from its atoms to their 1st,
    2nd, ... nearest neighbour, once among all atoms, once among those of the same
    species. The first is in units of the cube root of the volume per atom, the second
    of that per atom of the species, so that a uniform expansion changes nothing.
    Rotation, reflection, choice of cell and origin, and order of atoms change nothing
    either. If atoms move by at most d, no distance changes by more than 2 d.

    Different crystals can have the same fingerprint (long stackings of the same layers
    do). So a fingerprint can rule out a match, but can only propose one.

    The profile is the average minimum distance of D. Widdowson, M. M. Mosca, A.
    Pulido, A. I. Cooper and V. Kurlin (2022), MATCH 87, 529-559,
    doi:10.46793/match.87-3.529W.

    Differs from the paper: distances are divided by a length of the crystal, and there
    is a profile per species, so that exchanging two species is seen.

    Args:
        crystal: any crystal; its cell need not be primitive.

    Returns:
        (S, 2 `NEIGHBORS`) float32. Species stand in the order of `composition`.
    """
    species, _ = composition(crystal.atomic_numbers)
    inverse = np.linalg.inv(crystal.cell)
    per_plane = np.sqrt((inverse * inverse).sum(axis=0))  # 1 / plane spacing, 1 / Å
    return _profiles(
        crystal.frac_coords,
        crystal.cell,
        crystal.atomic_numbers,
        species,
        per_plane,
        crystal.volume,
    )


@machine_code
def _nearest_within(
    frac: np.ndarray, cell: np.ndarray, margin: np.ndarray, most: float
) -> np.ndarray:
    """Return the smallest squared distances up to `most`, (N, K) Å²; else infinity.

    Args:
        frac: (N, 3), wrapped into [0, 1).
        cell: (3, 3) in Å.
        margin: (3,), how far the sphere reaches in fractional coordinates.
        most: Å², the square of the sphere's radius.
    """
    points = len(frac)
    found = np.full((points, NEIGHBORS), np.inf)
    last = NEIGHBORS - 1
    for i in range(points):
        nearest = found[i]
        for j in range(points):
            # The images of j that may lie within the sphere around i.
            x = frac[j, 0] - frac[i, 0]
            y = frac[j, 1] - frac[i, 1]
            z = frac[j, 2] - frac[i, 2]
            first_a, end_a = math.ceil(-margin[0] - x), math.floor(margin[0] - x) + 1
            first_b, end_b = math.ceil(-margin[1] - y), math.floor(margin[1] - y) + 1
            first_c, end_c = math.ceil(-margin[2] - z), math.floor(margin[2] - z) + 1
            for a in range(first_a, end_a):
                u0 = (x + a) * cell[0, 0]
                u1 = (x + a) * cell[0, 1]
                u2 = (x + a) * cell[0, 2]
                for b in range(first_b, end_b):
                    v0 = u0 + (y + b) * cell[1, 0]
                    v1 = u1 + (y + b) * cell[1, 1]
                    v2 = u2 + (y + b) * cell[1, 2]
                    for c in range(first_c, end_c):
                        w0 = v0 + (z + c) * cell[2, 0]
                        w1 = v1 + (z + c) * cell[2, 1]
                        w2 = v2 + (z + c) * cell[2, 2]
                        squared = w0 * w0 + w1 * w1 + w2 * w2
                        if squared > most or squared >= nearest[last]:
                            continue
                        if i == j and a == 0 and b == 0 and c == 0:
                            continue
                        place = last
                        while place > 0 and nearest[place - 1] > squared:
                            nearest[place] = nearest[place - 1]
                            place -= 1
                        nearest[place] = squared
    return found


@machine_code
def _nearest(
    frac: np.ndarray, cell: np.ndarray, per_plane: np.ndarray, volume: float
) -> np.ndarray:
    """Return the distances from each point to its nearest periodic ones, (N, K), Å."""
    free_length = np.cbrt(volume / len(frac))
    sphere = np.cbrt(3 * NEIGHBORS / (4 * math.pi))  # holds NEIGHBORS on average
    radius = (sphere + 0.8) * free_length
    while True:
        found = _nearest_within(frac, cell, radius * per_plane, radius * radius)
        if np.isfinite(found[:, -1]).all():
            return np.sqrt(found)
        radius *= 1.25


@machine_code
def _profiles(
    frac: np.ndarray,
    cell: np.ndarray,
    atomic_numbers: np.ndarray,
    species: np.ndarray,
    per_plane: np.ndarray,
    volume: float,
) -> np.ndarray:
    """Return the two profiles of each species, (S, F) float32."""
    atoms = len(frac)
    profiles = np.zeros((len(species), 2 * NEIGHBORS), np.float32)  # (S, F)
    among_all = _nearest(frac, cell, per_plane, volume)  # (N, K)
    for row in range(len(species)):
        own = atomic_numbers == species[row]
        count = own.sum()
        around = np.zeros(NEIGHBORS)
        for atom in range(atoms):
            if own[atom]:
                around += among_all[atom]
        profiles[row, :NEIGHBORS] = around / count / np.cbrt(volume / atoms)
        if count < atoms:
            around[:] = 0.0
            among_own = _nearest(frac[own], cell, per_plane, volume)
            for atom in range(count):
                around += among_own[atom]
        profiles[row, NEIGHBORS:] = around / count / np.cbrt(volume / count)
    return profiles


_STEPS = 1 << 13  # of a packed distance per unit of length


def pack(profiles: np.ndarray) -> np.ndarray:
    """Return fingerprints as stores keep them: uint16, in steps of 1/8192.

    Rounding changes a distance between fingerprints by less than 1e-4. Lengths above 8,
    which occur only in rods of vacuum, become 8.
    """
    return np.minimum(np.rint(profiles * _STEPS), 65535).astype(np.uint16)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return packed fingerprints as float32."""
    return packed.astype(np.float32) / np.float32(_STEPS)


# ------------------------------------------------------------------------ compositions


def composition(atomic_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return species and reduced amounts, by rising amount, then by atomic number.

    In this order the amounts are the anonymised formula: NaCl and MgO are both (1, 1),
    and the rows of their fingerprints can be compared one by one.

    Args:
        atomic_numbers: (N,) uint8.

    Returns:
        (S,) uint8 atomic numbers and (S,) int64 amounts.
    """
    species, amounts = np.unique(atomic_numbers, return_counts=True)
    amounts //= np.gcd.reduce(amounts)
    order = np.lexsort((species, amounts))
    return species[order], amounts[order]


def formulas(
    atom_offsets: np.ndarray, atomic_numbers: np.ndarray
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield species and amounts of many crystals, in the order of `composition`.

    Args:
        atom_offsets: (B + 1,) first atom of each crystal.
        atomic_numbers: (N,) uint8, of all atoms.
    """
    for start, end in itertools.pairwise(atom_offsets.tolist()):
        species, amounts = composition(atomic_numbers[start:end])
        yield tuple(species.tolist()), tuple(amounts.tolist())


def compositions(
    atom_offsets: np.ndarray, atomic_numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the reduced compositions of many crystals, in the order of `composition`.

    Args:
        atom_offsets: (B + 1,) first atom of each crystal.
        atomic_numbers: (N,) uint8, those of all crystals.

    Returns:
        (B + 1,) where the species of each crystal start, and their atomic numbers and
        reduced amounts, int64.
    """
    sizes = np.diff(atom_offsets)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    keys, amounts = np.unique(owner * 256 + atomic_numbers, return_counts=True)
    owner, species = np.divmod(keys, 256)
    order = np.lexsort((species, amounts, owner))
    species, amounts = species[order], amounts[order]  # `owner` rises already
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(sizes)))])
    if len(amounts):
        amounts //= np.gcd.reduceat(amounts, offsets[:-1])[owner]
    return offsets.astype(np.int64), species, amounts


# --------------------------------------------------------------------------- distances


def distances(
    first: np.ndarray, second: np.ndarray, amounts: Sequence[int]
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield the distances between the fingerprints of one anonymised formula.

    The distance is the root mean square difference over all entries. It is computed
    twice: species by species in the given order, and for the exchange of species of
    equal amount that minimises it.

    Args:
        first: (A, S, F).
        second: (B, S, F).
        amounts: (S,) amounts of the formula; species of equal amount may be exchanged.

    Yields:
        Rows of `first`, and the distances (rows, B) in order and after the exchange.
    """
    sizes = len(amounts)
    places = [
        (i, j) for i in range(sizes) for j in range(sizes) if amounts[i] == amounts[j]
    ]
    step = max(1, _PAIRS_AT_ONCE // (len(second) * len(places)))
    for start in range(0, len(first), step):
        rows = slice(start, min(start + step, len(first)))
        squares = {
            (i, j): cdist(first[rows, i], second[:, j], "sqeuclidean")
            for i, j in places
        }
        ordered = sum(squares[i, i] for i in range(sizes))
        exchanged = _best_exchange(squares, amounts)
        scale = first.shape[1] * first.shape[2]
        yield rows, np.sqrt(ordered / scale), np.sqrt(exchanged / scale)


def _best_exchange(
    squares: dict[tuple[int, int], np.ndarray], amounts: Sequence[int]
) -> np.ndarray:
    """Return the smallest sum over pairings of species of equal amount."""
    total: np.ndarray | float = 0.0
    for _, members in itertools.groupby(range(len(amounts)), key=lambda s: amounts[s]):
        group = list(members)
        if math.factorial(len(group)) <= _MAX_PERMUTATIONS:
            best = np.full_like(squares[group[0], group[0]], np.inf)
            for order in itertools.permutations(group):
                pairing = [squares[pair] for pair in zip(group, order, strict=True)]
                np.minimum(best, sum(pairing), out=best)
        else:
            table = np.array([[squares[i, j] for j in group] for i in group])
            best = np.empty(table.shape[2:])
            for pair in np.ndindex(best.shape):
                cost = table[:, :, *pair]
                best[pair] = cost[linear_sum_assignment(cost)].sum()
        total = total + best
    return np.asarray(total)
