"""Compiled distances between the fingerprints of many pairs of crystals at once.

The distance is that of `store.fingerprints.distances`, the root mean square difference
over all entries. Legend of shapes: P pairs, S species, F numbers per species.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numba import njit

from crysdistill.machine_code import machine_code

PARTS = 8
"""Stretches of a profile; their means tell fingerprints apart at low cost."""

MOST_EXCHANGES = 120
"""Largest number of species orders tried one by one; beyond, see `distances`."""


@machine_code
def pair_distances(
    first: np.ndarray,
    second: np.ndarray,
    sizes: np.ndarray,
    profiles: np.ndarray,
    others: np.ndarray,
) -> np.ndarray:
    """Return the distances of pairs of crystals, (P,); each pair has one formula.

    Args:
        first: (P,) where the fingerprint of one starts in `profiles`.
        second: (P,) where that of the other starts in `others`.
        sizes: (P,) numbers of species.
        profiles: (all species, F) float32.
        others: the same.
    """
    out = np.empty(len(first))
    width = profiles.shape[1]
    for pair in range(len(first)):
        total = 0.0
        for species in range(sizes[pair]):
            one, other = profiles[first[pair] + species], others[second[pair] + species]
            for k in range(width):
                off = np.float64(one[k]) - np.float64(other[k])
                total += off * off
        out[pair] = math.sqrt(total / (sizes[pair] * width))
    return out


@machine_code
def part_means(starts: np.ndarray, size: int, profiles: np.ndarray) -> np.ndarray:
    """Return the mean over all species of each fingerprint stretch, (B, PARTS).

    Exchanging species does not change these means. After any exchange, the root of
    their mean squared difference is at most the distance of two fingerprints: the
    square of a mean is at most the mean of the squares.

    Args:
        starts: (B,) where fingerprints start in `profiles`.
        size: S, the same for all.
        profiles: (all species, F) float32.
    """
    out = np.zeros((len(starts), PARTS))
    step = profiles.shape[1] // PARTS
    for row in range(len(starts)):
        for species in range(size):
            for k in range(step * PARTS):
                out[row, k // step] += profiles[starts[row] + species, k]
    return out / (size * step)


def exchanges(amounts: tuple[int, ...]) -> np.ndarray | None:
    """Return all orders that exchange species of equal amount, (orders, S).

    Return None if species of one amount have more than `MOST_EXCHANGES` orders.
    """
    groups = [
        list(members)
        for _, members in itertools.groupby(
            range(len(amounts)), key=amounts.__getitem__
        )
    ]
    if any(math.factorial(len(group)) > MOST_EXCHANGES for group in groups):
        return None
    orders = itertools.product(*map(itertools.permutations, groups))
    return np.array([list(itertools.chain(*order)) for order in orders], np.int64)


@njit
def _exchanged(
    one: np.ndarray, other: np.ndarray, orders: np.ndarray, most: float
) -> float:
    """Return the least mean square over all orders; inexact if above `most`."""
    size, width = one.shape
    squares = np.zeros((size, size))
    known = np.zeros((size, size), np.bool_)
    limit = most * size * width
    best = np.inf
    for place in range(len(orders)):
        total = 0.0
        for i in range(size):
            j = orders[place, i]
            if not known[i, j]:
                known[i, j] = True
                for k in range(width):
                    off = np.float64(one[i, k]) - np.float64(other[j, k])
                    squares[i, j] += off * off
            total += squares[i, j]
            if total > limit:
                break
        best = min(best, total)
    return best / (size * width)


@machine_code
def alike(
    queries: np.ndarray,
    query_means: np.ndarray,
    others: np.ndarray,
    other_means: np.ndarray,
    starts: np.ndarray,
    other_starts: np.ndarray,
    profiles: np.ndarray,
    other_profiles: np.ndarray,
    orders: np.ndarray,
    within: float,
    nearest: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the pairs of one anonymised formula whose fingerprints are alike.

    Args:
        queries: some of the A crystals.
        query_means: (A, PARTS) from `part_means`.
        others: (B,) rows sorted by the mean of all parts.
        other_means: (B, PARTS).
        starts: (A,) where their fingerprints start in `profiles`.
        other_starts: (B,) the same.
        profiles: (all species, F) float32.
        other_profiles: the same.
        orders: (orders, S) from `exchanges`.
        within: how far apart a pair may be.
        nearest: (A,) whether the nearest crystal is wanted, however far.

    Returns:
        (P,) rows of the A, (P,) rows of the B and (P,) distances. For each query also
        the nearest of the B and its distance; -1 and infinity if not wanted.
    """
    size = orders.shape[1]
    level = np.empty(len(others))
    for place in range(len(others)):
        level[place] = other_means[others[place]].mean()
    count = 0
    rows = np.empty(1024, np.int64)
    partners = np.empty(1024, np.int64)
    lengths = np.empty(1024)
    near = np.full(len(queries), -1)
    near_length = np.full(len(queries), np.inf)
    for turn in range(len(queries)):
        query = queries[turn]
        own = profiles[starts[query] : starts[query] + size]
        middle = query_means[query].mean()
        begin = np.searchsorted(level, middle)
        for direction in (-1, 1):
            place = begin - 1 if direction < 0 else begin
            while 0 <= place < len(others):
                limit = within
                if nearest[query]:
                    limit = max(limit, near_length[turn])
                # The mean of all is the coarsest bound, and it only rises from here on.
                if abs(level[place] - middle) > limit:
                    break
                other = others[place]
                place += direction
                bound = 0.0
                for part in range(PARTS):
                    off = query_means[query, part] - other_means[other, part]
                    bound += off * off
                if bound / PARTS > limit * limit * (1 + 1e-9) + 1e-12:
                    continue
                start = other_starts[other]
                there = other_profiles[start : start + size]
                length = math.sqrt(
                    _exchanged(own, there, orders, limit * limit * (1 + 1e-9))
                )
                if length <= within:
                    if count == len(rows):
                        rows = np.concatenate((rows, np.empty_like(rows)))
                        partners = np.concatenate((partners, np.empty_like(partners)))
                        lengths = np.concatenate((lengths, np.empty_like(lengths)))
                    rows[count], partners[count] = query, other
                    lengths[count] = length
                    count += 1
                if nearest[query] and (
                    length < near_length[turn]
                    or (length == near_length[turn] and other < near[turn])
                ):
                    near[turn], near_length[turn] = other, length
    return rows[:count], partners[:count], lengths[:count], near, near_length
