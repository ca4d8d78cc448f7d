"""Which proposed pairs are the same crystal, or of one structure type.

A job holds pairs and everything a worker needs to know about their crystals. The
worker then runs all tests, from cheap to costly, without asking back. Space groups are
found only if the verdict depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from crysdistill.overlap.facts import Facts
from crysdistill.overlap.matching import (
    Test,
    judge,
    primitive,
    primitive_for_all,
    space_groups,
)
from crysdistill.structures.crystal import Crystal

STRAIN_DISTANCE = 0.03
"""Between fingerprints of crystals of different symmetry, separated only by strain."""

FINGERPRINT_ONLY = 0.01
"""Between fingerprints of one crystal that is too large for the matcher."""

DIFFERENT, SAME, ALONE = 0, 1, 2
"""Verdicts; `ALONE` is the same crystal, judged by its fingerprint alone."""

PAIRS_PER_JOB = 400
"""Up to a second of work: worth sending, yet small enough for an even finish."""


@dataclass
class Pairs:
    """Pairs of rows with the distance of their fingerprints; parallel arrays.

    Args:
        corpus: (P,) rows.
        dataset: (P,) rows.
        distance: (P,).
    """

    corpus: np.ndarray
    dataset: np.ndarray
    distance: np.ndarray

    @classmethod
    def join(cls, parts: list[Pairs]) -> Pairs:
        """Return the pairs of all parts."""
        none = np.empty(0, np.int64)
        return cls(
            np.concatenate([none, *(part.corpus for part in parts)]),
            np.concatenate([none, *(part.dataset for part in parts)]),
            np.concatenate([np.empty(0), *(part.distance for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.corpus)

    def where(self, keep: np.ndarray | slice) -> Pairs:
        """Return some of the pairs."""
        return Pairs(self.corpus[keep], self.dataset[keep], self.distance[keep])

    def without(self, other: Pairs, width: int) -> Pairs:
        """Return the pairs that are not in `other`; the corpus has `width` rows."""
        mine = self.dataset * width + self.corpus
        return self.where(~np.isin(mine, other.dataset * width + other.corpus))


@dataclass
class Job:
    """Pairs to be judged.

    Args:
        crystals: the crystals of the pairs.
        groups: (crystals, 2) their space groups without handedness, 0 if not known.
        pairs: (P, 2) places among the crystals.
        distance: (P,) between fingerprints.
    """

    crystals: list[Crystal]
    groups: np.ndarray
    pairs: np.ndarray
    distance: np.ndarray


def jobs(pairs: Pairs, corpus: Facts, dataset: Facts) -> Iterator[Job]:
    """Cut pairs into jobs; those of one formula should follow one another."""
    start = 0
    while start < len(pairs):
        end = min(start + PAIRS_PER_JOB, len(pairs))
        part = pairs.where(slice(start, end))
        sides = [(corpus, part.corpus), (dataset, part.dataset)]
        crystals: list[Crystal] = []
        groups, places = [], []
        for facts, rows in sides:
            unique, inverse = np.unique(rows, return_inverse=True)
            places.append(inverse + len(crystals))
            groups.append(facts.groups[unique])
            crystals += [
                replace(facts.crystals.crystal(row), properties={})
                for row in unique.tolist()
            ]
        yield Job(crystals, np.concatenate(groups), np.stack(places, 1), part.distance)
        start = end


def same_crystals(job: Job) -> np.ndarray:
    """Return the verdict on each pair of one formula, (P,) int8."""
    bench = _Bench(job)
    return np.array(
        [
            bench.same_crystal(i, j, distance)
            for (i, j), distance in zip(
                job.pairs.tolist(), job.distance.tolist(), strict=True
            )
        ],
        np.int8,
    )


def same_types(job: Job) -> np.ndarray:
    """Return whether the crystals of each pair are of one structure type, (P,) int8."""
    bench = _Bench(job)
    return np.array(
        [bench.agree(i, j, "anonymous") is True for i, j in job.pairs.tolist()], np.int8
    )


Judge = Callable[[Job], np.ndarray]


class _Bench:
    """The crystals of a job, and the facts found about them."""

    def __init__(self, job: Job) -> None:
        self.crystals = job.crystals
        self.groups = job.groups.copy()
        # A cell that does not even nearly repeat is the same for every test.
        self.plain: dict[int, Crystal | None] = {}
        self.cells: dict[tuple[int, bool], Crystal | None] = {}

    def same_crystal(self, i: int, j: int, distance: float) -> int:
        """Return the verdict on a pair."""
        if_alike = DIFFERENT
        same = self.agree(i, j, "same")
        if same is None:
            if_alike = ALONE if distance <= FINGERPRINT_ONLY else DIFFERENT
        elif same or (distance <= STRAIN_DISTANCE and self.agree(i, j, "supercell")):
            if_alike = SAME
        elif self._plain(i) and self._plain(j):
            return DIFFERENT  # on the same two cells, the other tests are stricter
        # If the symmetry differs, only strain or only averaging may separate them.
        strained = distance <= STRAIN_DISTANCE and self.agree(i, j, "strained")
        if_not = SAME if strained or self.agree(i, j, "averaged") else DIFFERENT
        if if_alike == if_not:
            return if_alike
        return if_alike if self._alike(i, j) else if_not

    def agree(self, i: int, j: int, test: Test) -> bool | None:
        """Match two crystals atom by atom; None if the matcher cannot judge."""
        return judge((self._cell(i, test), self._cell(j, test), test))

    def _plain(self, i: int) -> Crystal | None:
        if i not in self.plain:
            self.plain[i] = primitive_for_all(self.crystals[i])
        return self.plain[i]

    def _cell(self, i: int, test: Test) -> Crystal | None:
        if (plain := self._plain(i)) is not None:
            return plain
        key = i, test == "strained"
        if key not in self.cells:
            self.cells[key] = primitive(self.crystals[i], test)
        return self.cells[key]

    def _alike(self, i: int, j: int) -> bool:
        """Tell whether the symmetry of two crystals does not set them apart."""
        first, second = (self._groups(place)[None] for place in (i, j))
        found = share(first, second) | lost(first) | lost(second)
        return bool(found[0])

    def _groups(self, i: int) -> np.ndarray:
        if not self.groups[i].any():
            self.groups[i] = space_groups(self.crystals[i])
        return self.groups[i]


def share(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Tell whether two rows (P, 2) have a number above 0 in common."""
    equal = first[:, :, None] == second[:, None, :]  # (P, 2, 2)
    return np.any(equal & (first[:, :, None] > 0), axis=(1, 2))


def lost(groups: np.ndarray) -> np.ndarray:
    """Tell whether a crystal has no symmetry at the tighter tolerance, (P,)."""
    return np.asarray(groups[:, 0] <= 1)
