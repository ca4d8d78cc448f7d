"""Propose, by fingerprint, the pairs of crystals worth a closer look."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from crysdistill.overlap.facts import Facts
from crysdistill.overlap.proximity import alike, exchanges, pair_distances, part_means
from crysdistill.overlap.verdicts import Pairs
from crysdistill.store.fingerprints import distances
from crysdistill.workers import Workers

VOLUME_RATIO = 1.2
"""Of volumes per atom; one crystal relaxed with two functionals stays within 1.19."""

STRUCTURE_DISTANCE = 0.08
"""Between fingerprints. Moving atoms by 0.1 Å gives 0.03 to 0.07, 5 % strain 0.02."""

PROTOTYPE_DISTANCE = 0.05
"""Between fingerprints of one structure type in one space group. Among real crystals,
an anonymous match confirms 99 % of such pairs; beyond, it confirms fewer and fewer."""

_PAIRS_AT_ONCE = 2_000_000
_QUERIES_AT_ONCE = 256


@dataclass
class Nearest:
    """The nearest crystal of the corpus, by dataset row.

    Args:
        row: (dataset,) row of the corpus, -1 for none.
        distance: (dataset,) between the fingerprints, NaN for none.
        same: (dataset,) whether it has the same formula.
    """

    row: np.ndarray
    distance: np.ndarray
    same: np.ndarray

    @classmethod
    def of_none(cls, entries: int) -> Nearest:
        """Return the state before a search: no nearest crystal is known."""
        return cls(
            np.full(entries, -1, np.int64),
            np.full(entries, np.nan),
            np.zeros(entries, bool),
        )


def same_formula(
    corpus: Facts, dataset: Facts, nearest: Nearest, workers: Workers
) -> Iterator[Pairs]:
    """Yield all pairs with one reduced formula, sorted by formula, then dataset row.

    Args:
        corpus: the source of the first row of each pair.
        dataset: the source of the second row. If it is the corpus, each crystal is
            paired with earlier ones only.
        nearest: receives the nearest crystal of the same formula.
        workers: compute the missing fingerprints.
    """
    order = np.argsort(corpus.formula, kind="stable")
    sorted_formula = corpus.formula[order]
    begin = np.searchsorted(sorted_formula, dataset.formula, "left")
    counts = np.searchsorted(sorted_formula, dataset.formula, "right") - begin
    lonely = 1 if corpus is dataset else 0  # a crystal always finds itself
    entries = np.flatnonzero(counts > lonely)
    entries = entries[np.argsort(dataset.formula[entries], kind="stable")]
    if not len(entries):
        return
    corpus.find_profiles(
        np.flatnonzero(np.isin(corpus.formula, dataset.formula[entries])), workers
    )
    dataset.find_profiles(entries, workers)
    ends = np.cumsum(counts[entries])
    start = 0
    while start < len(entries):
        done = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, "right")))
        some = entries[start:end]
        first = np.cumsum(counts[some]) - counts[some]
        place = np.arange(counts[some].sum()) - np.repeat(first, counts[some])
        rows = order[np.repeat(begin[some], counts[some]) + place]
        others = np.repeat(some, counts[some])
        found = pair_distances(
            corpus.first_profile[rows],
            dataset.first_profile[others],
            dataset.species[others],
            corpus.profiles,
            dataset.profiles,
        )
        # By entry, then distance, then row: the first of each entry is the nearest.
        best = np.lexsort((rows, found, others))[
            np.searchsorted(np.sort(others), np.unique(others))
        ]
        nearest.row[others[best]] = rows[best]
        nearest.distance[others[best]] = found[best]
        nearest.same[others[best]] = True
        pairs = Pairs(rows, others, found)
        yield pairs.where(rows < others) if corpus is dataset else pairs
        start = end


def may_be_same(pairs: Pairs, corpus: Facts, dataset: Facts) -> np.ndarray:
    """Tell which pairs of one formula may be one crystal, (P,)."""
    ratio = dataset.volume[pairs.dataset] / corpus.volume[pairs.corpus]
    close = np.abs(np.log(ratio)) <= np.log(VOLUME_RATIO)
    return close & (pairs.distance <= STRUCTURE_DISTANCE)


def same_anonymous(
    corpus: Facts,
    dataset: Facts,
    nearest: Nearest,
    workers: Workers,
    threads: int,
) -> Iterator[tuple[int, Pairs]]:
    """Yield the pairs of each anonymised formula that have similar fingerprints.

    Species of equal amount are exchanged so that the fingerprints differ least.

    Args:
        corpus: the source of the first row of each pair.
        dataset: the source of the second row.
        nearest: receives the nearest crystal for dataset rows whose formula is not in
            the corpus.
        workers: compute the missing fingerprints.
        threads: number of threads of this process that compare fingerprints.

    Yields:
        How many crystals were compared, and their pairs.
    """
    both = np.intersect1d(corpus.anonymous, dataset.anonymous)
    if not len(both):
        return
    sides = []
    for facts in (corpus, dataset):
        rows = np.flatnonzero(np.isin(facts.anonymous, both))
        facts.find_profiles(rows, workers)
        rows = rows[np.argsort(facts.anonymous[rows], kind="stable")]
        cuts = np.searchsorted(facts.anonymous[rows], both[1:])
        sides.append(np.split(rows, cuts))
    with ThreadPoolExecutor(threads) as pool:
        for rows, entries in zip(*sides, strict=True):
            pairs = _block(corpus, dataset, rows, entries, nearest, pool)
            if corpus is dataset:
                pairs = pairs.where(pairs.corpus < pairs.dataset)
            yield len(rows) + len(entries), pairs


def _block(
    corpus: Facts,
    dataset: Facts,
    rows: np.ndarray,
    entries: np.ndarray,
    nearest: Nearest,
    threads: ThreadPoolExecutor,
) -> Pairs:
    """Return the similar pairs of one anonymised formula."""
    amounts = corpus.amounts_of(int(rows[0]))
    orders = exchanges(amounts)
    wanted = ~nearest.same[entries]
    if orders is None:
        return _by_assignment(corpus, dataset, rows, entries, nearest, amounts)
    first, second = corpus.first_profile[rows], dataset.first_profile[entries]
    means = part_means(first, len(amounts), corpus.profiles)
    query_means = part_means(second, len(amounts), dataset.profiles)
    by_level = np.argsort(means.mean(axis=1), kind="stable")

    def look(queries: np.ndarray) -> tuple[np.ndarray, ...]:
        return alike(
            queries,
            query_means,
            by_level,
            means,
            second,
            first,
            dataset.profiles,
            corpus.profiles,
            orders,
            PROTOTYPE_DISTANCE,
            wanted,
        )

    places = np.arange(len(entries))
    cuts = [places[i : i + _QUERIES_AT_ONCE] for i in places[::_QUERIES_AT_ONCE]]
    parts = []
    # Compiled code releases Python's lock, so threads suffice, without copies.
    found = threads.map(look, cuts) if len(cuts) > 1 else map(look, cuts)
    for cut, (who, whom, length, near, near_length) in zip(cuts, found, strict=True):
        parts.append(Pairs(rows[whom], entries[who], length))
        some = cut[near >= 0]
        nearest.row[entries[some]] = rows[near[near >= 0]]
        nearest.distance[entries[some]] = near_length[near >= 0]
    return Pairs.join(parts)


def _by_assignment(
    corpus: Facts,
    dataset: Facts,
    rows: np.ndarray,
    entries: np.ndarray,
    nearest: Nearest,
    amounts: tuple[int, ...],
) -> Pairs:
    """Do the same if there are too many species to try all their exchanges."""
    species = np.arange(len(amounts))
    profiles = corpus.profiles[corpus.first_profile[rows][:, None] + species]
    queries = dataset.profiles[dataset.first_profile[entries][:, None] + species]
    parts = []
    for part, _, exchanged in distances(queries, profiles, amounts):
        some = entries[part]
        best = exchanged.argmin(axis=1)
        new = ~nearest.same[some]
        nearest.row[some[new]] = rows[best[new]]
        nearest.distance[some[new]] = exchanged[np.arange(len(some)), best][new]
        i, j = np.nonzero(exchanged <= PROTOTYPE_DISTANCE)
        parts.append(Pairs(rows[j], some[i], exchanged[i, j]))
    return Pairs.join(parts)
