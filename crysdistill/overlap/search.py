"""Which crystals of a corpus are also in datasets: the search.

Crystals are compared only within one anonymised formula. Fingerprints propose; the
matcher and the symmetry labels decide. One search covers all datasets: the verdicts,
which are slow, form one stream of jobs, so that no worker waits for another dataset.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.markup import escape
from rich.progress import Progress

from crysdistill.overlap.candidates import (
    PROTOTYPE_DISTANCE,
    STRUCTURE_DISTANCE,
    VOLUME_RATIO,
    Nearest,
    may_be_same,
    same_anonymous,
    same_formula,
)
from crysdistill.overlap.facts import Collection, Facts, Numbers
from crysdistill.overlap.matching import compile_matcher
from crysdistill.overlap.verdicts import (
    ALONE,
    DIFFERENT,
    FINGERPRINT_ONLY,
    SAME,
    STRAIN_DISTANCE,
    Job,
    Judge,
    Pairs,
    jobs,
    lost,
    same_crystals,
    same_types,
    share,
)
from crysdistill.workers import Workers, engine

__all__ = [
    "FINGERPRINT_ONLY",
    "KINDS",
    "PROTOTYPE_DISTANCE",
    "STRAIN_DISTANCE",
    "STRUCTURE_DISTANCE",
    "TWIN_DISTANCE",
    "VOLUME_RATIO",
    "Found",
    "search",
]

KINDS = ("id", "structure", "prototype", "formula")
"""From the strongest to the weakest; a pair has the strongest that holds."""

TWIN_DISTANCE = 0.015
"""Between fingerprints of one structure type, even if noise hides the symmetry."""

_WORTH_A_POOL = 4_000  # crystals; below, starting processes takes longer
_PAIRS_AT_ONCE = 4_000_000  # prototypes; keeps memory flat


@dataclass
class Found:
    """What a search found, by row.

    Args:
        pairs: (P, 3) int64, corpus row, dataset row and number of the kind.
        totals: (4,) pairs of each kind, including those left out.
        left_out: (4,) pairs of each kind that are not in `pairs`.
        in_corpus: (4, corpus) whether a crystal has a pair of a kind.
        in_dataset: (4, dataset) the same for the dataset.
        nearest_row: (dataset,) corpus row with the nearest fingerprint, -1 for none.
        nearest_distance: (dataset,) its distance, NaN for none.
        nearest_same: (dataset,) whether it has the same formula.
        id_clashes: `id` pairs whose formulas differ.
        by_fingerprint: `structure` pairs that no matcher has confirmed.
    """

    pairs: np.ndarray
    totals: np.ndarray
    left_out: np.ndarray
    in_corpus: np.ndarray
    in_dataset: np.ndarray
    nearest_row: np.ndarray
    nearest_distance: np.ndarray
    nearest_same: np.ndarray
    id_clashes: int = 0
    by_fingerprint: int = 0


def search(
    corpus: Collection,
    datasets: Sequence[Collection],
    names: Sequence[str],
    kinds: Sequence[str],
    pairs_per_entry: int,
    workers: int | None,
    cluster: str | None,
    progress: bool,
) -> list[Found]:
    """Search all pairs; the arguments are those of `find_overlaps`, checked."""
    numbers = Numbers()
    first = Facts(corpus, numbers)
    # Within one collection each pair counts once, the earlier row first.
    others = [first if d is corpus else Facts(d, numbers) for d in datasets]
    total = sum(_crystals_to_compare(first, other) for other in others)
    if workers is None and cluster is None and total <= _WORTH_A_POOL:
        workers = 1
    with engine(workers, cluster) as pool, Progress(disable=not progress) as bar:
        state = _Search(kinds, pool, bar, threads=workers or os.cpu_count() or 1)
        sets = [
            _Set(name, first, other, kinds, pairs_per_entry)
            for name, other in zip(names, others, strict=True)
        ]
        for one in sets:
            one.same_ids()
        if set(kinds) != {"id"}:
            state.structures(sets)
        if "prototype" in kinds:
            state.prototypes(sets)
        if "formula" in kinds:
            for one in sets:
                one.keep("formula", one.formula)
    return [one.result() for one in sets]


class _Set:
    """One dataset, and what was found in it."""

    def __init__(
        self, name: str, corpus: Facts, dataset: Facts, kinds: Sequence[str], limit: int
    ) -> None:
        self.name = escape(name)
        self.corpus = corpus
        self.dataset = dataset
        self.limit = limit
        self.corpus_id, self.dataset_id = _id_numbers(corpus, dataset)
        if "id" not in kinds:
            self.dataset_id[:] = -1  # matches no crystal
        self.nearest = Nearest.of_none(len(dataset))
        self.formula = Pairs.join([])
        """Pairs of one formula for which nothing stronger was found yet."""
        self.structure = Pairs.join([])
        """Pairs that are one crystal; before the verdicts, those that may be."""
        self.kept: list[np.ndarray] = []
        width, entries = len(corpus), len(dataset)
        self.found = Found(
            pairs=np.empty((0, 3), np.int64),
            totals=np.zeros(len(KINDS), np.int64),
            left_out=np.zeros(len(KINDS), np.int64),
            in_corpus=np.zeros((len(KINDS), width), bool),
            in_dataset=np.zeros((len(KINDS), entries), bool),
            nearest_row=self.nearest.row,
            nearest_distance=self.nearest.distance,
            nearest_same=self.nearest.same,
        )

    def result(self) -> Found:
        """Return all that was found."""
        self.found.pairs = np.concatenate([self.found.pairs, *self.kept])
        return self.found

    def same_ids(self) -> None:
        """Keep the pairs that share an id."""
        rows_of = defaultdict(list)
        for row in np.flatnonzero(np.isin(self.corpus_id, self.dataset_id)).tolist():
            rows_of[int(self.corpus_id[row])].append(row)
        pairs = [
            (row, entry)
            for entry, number in enumerate(self.dataset_id.tolist())
            for row in rows_of.get(number, ())
        ]
        corpus, dataset = np.array(pairs, np.int64).reshape(-1, 2).T
        self.keep("id", Pairs(corpus, dataset, np.zeros(len(corpus))))
        differs = self.corpus.formula[corpus] != self.dataset.formula[dataset]
        self.found.id_clashes = int(differs.sum())

    def propose(self, kinds: Sequence[str], workers: Workers) -> None:
        """Find the pairs of one formula, and those that may be one crystal."""
        every, alike = [], []
        for pairs in same_formula(self.corpus, self.dataset, self.nearest, workers):
            new = pairs.where(self.new(pairs))
            if "formula" in kinds:
                every.append(new)
            if "structure" in kinds:
                alike.append(new.where(may_be_same(new, self.corpus, self.dataset)))
        self.formula, self.structure = Pairs.join(every), Pairs.join(alike)

    def new(self, pairs: Pairs) -> np.ndarray:
        """Tell which pairs do not share an id, (P,)."""
        return self.dataset_id[pairs.dataset] != self.corpus_id[pairs.corpus]

    def judged(self, verdicts: np.ndarray) -> None:
        """Keep the pairs that are one crystal."""
        self.structure = self.structure.where(verdicts != DIFFERENT)
        self.found.by_fingerprint += int((verdicts == ALONE).sum())
        self.keep("structure", self.structure)
        self.formula = self.formula.without(self.structure, len(self.corpus))

    def keep(self, kind: str, pairs: Pairs) -> None:
        """Count all pairs of a kind and list the nearest of each dataset entry."""
        number = KINDS.index(kind)
        self.found.totals[number] += len(pairs)
        self.found.in_corpus[number, pairs.corpus] = True
        self.found.in_dataset[number, pairs.dataset] = True
        _, entry, counts = np.unique(
            pairs.dataset, return_inverse=True, return_counts=True
        )
        if len(counts) and counts.max() > self.limit:
            rows, of_row = np.unique(pairs.corpus, return_inverse=True)
            names = [self.corpus.crystals.material_ids[row] for row in rows.tolist()]
            rank = np.unique(names, return_inverse=True)[1][of_row]
            # Distances are rounded, so that names decide among equals, not noise.
            order = np.lexsort((rank, pairs.distance.round(4), entry))
            place = np.arange(len(order)) - (np.cumsum(counts) - counts)[entry[order]]
            chosen = np.sort(order[place < self.limit])
            self.found.left_out[number] += len(pairs) - len(chosen)
            pairs = pairs.where(chosen)
        kinds = np.full(len(pairs), number)
        self.kept.append(np.stack([pairs.corpus, pairs.dataset, kinds], axis=1))


class _Search:
    """What the datasets of a search share: the workers and the progress bar."""

    def __init__(
        self, kinds: Sequence[str], workers: Workers, bar: Progress, threads: int
    ) -> None:
        self.kinds = kinds
        self.threads = threads
        self.workers = workers
        self.bar = bar
        self.task = bar.add_task("comparing", total=None)

    def structures(self, sets: Sequence[_Set]) -> None:
        """Find the pairs that are one crystal."""
        self.bar.reset(self.task, total=sum(len(one.dataset) for one in sets))
        for one in sets:
            self.bar.update(self.task, description=f"candidates of {one.name}")
            one.propose(self.kinds, self.workers)
            self.bar.update(self.task, advance=len(one.dataset))
        if "structure" not in self.kinds:
            return
        work = [(one, one.structure) for one in sets]
        if any(len(pairs) for _, pairs in work):
            compile_matcher()  # before the workers need it, so that they find it ready
        for one, verdicts in self._judge(work, same_crystals):
            one.judged(verdicts)

    def prototypes(self, sets: Sequence[_Set]) -> None:
        """Find the pairs of one structure type."""
        for one in sets:
            total = _crystals_to_compare(one.corpus, one.dataset)
            text = f"structure types of {one.name}"
            self.bar.reset(self.task, description=text, total=total)
            pending: list[Pairs] = []
            alike = same_anonymous(
                one.corpus, one.dataset, one.nearest, self.workers, self.threads
            )
            for size, pairs in alike:
                pending.append(pairs.where(one.new(pairs)))
                if sum(map(len, pending)) >= _PAIRS_AT_ONCE:
                    self._prototypes(one, Pairs.join(pending))
                    pending = []
                self.bar.update(self.task, advance=size)
            self._prototypes(one, Pairs.join(pending))

    def _prototypes(self, one: _Set, pairs: Pairs) -> None:
        """Keep the proposed pairs that are of one structure type."""
        corpus, dataset = one.corpus, one.dataset
        pairs = pairs.without(one.structure, len(corpus))
        corpus.find_space_groups(pairs.corpus, self.workers)
        dataset.find_space_groups(pairs.dataset, self.workers)
        first, second = corpus.groups[pairs.corpus], dataset.groups[pairs.dataset]
        equal = share(first, second)
        formula = corpus.formula[pairs.corpus] == dataset.formula[pairs.dataset]
        # Doubtful: within a formula, pairs may be polymorphs or stackings; without a
        # common group, noise may look like a structure; triclinic groups prove little.
        twins = ~equal & (pairs.distance <= TWIN_DISTANCE)
        twins &= ~formula | lost(first) | lost(second)
        triclinic = np.maximum(first, second).max(axis=1, initial=0) <= 2
        doubtful = (equal & (formula | triclinic)) | twins
        sure = equal & ~formula
        [(_, verdicts)] = self._judge([(one, pairs.where(doubtful))], same_types, None)
        sure[doubtful] = verdicts == SAME
        found = pairs.where(sure)
        one.keep("prototype", found)
        one.formula = one.formula.without(found, len(corpus))

    def _judge(
        self,
        work: Sequence[tuple[_Set, Pairs]],
        judge: Judge,
        count: bool | None = True,
    ) -> Iterator[tuple[_Set, np.ndarray]]:
        """Yield each dataset and the verdicts on its pairs, from one stream of jobs."""
        if count:
            total = sum(len(pairs) for _, pairs in work)
            self.bar.reset(self.task, total=total)

        def stream() -> Iterator[Job]:
            for one, pairs in work:
                yield from jobs(pairs, one.corpus, one.dataset)

        answers = self.workers.map(judge, stream())
        for one, pairs in work:
            if count:
                self.bar.update(self.task, description=f"comparing {one.name}")
            parts = [np.empty(0, np.int8)]
            missing = len(pairs)
            while missing:
                parts.append(next(answers))
                missing -= len(parts[-1])
                if count:
                    self.bar.update(self.task, advance=len(parts[-1]))
            yield one, np.concatenate(parts)


def _id_numbers(corpus: Facts, dataset: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers that are equal where ids are, (corpus,) and (dataset,) int64.

    Row numbers would not do: a collection may have a name twice.
    """
    numbers: dict[str, int] = {}
    corpus_id, dataset_id = (
        np.array(
            [numbers.setdefault(n, len(numbers)) for n in side.crystals.material_ids]
        )
        for side in (corpus, dataset)
    )
    return corpus_id, dataset_id


def _crystals_to_compare(corpus: Facts, dataset: Facts) -> int:
    """Count the crystals whose anonymised formula both collections have."""
    return sum(
        int(np.isin(one.anonymous, other.anonymous).sum())
        for one, other in ((corpus, dataset), (dataset, corpus))
    )
