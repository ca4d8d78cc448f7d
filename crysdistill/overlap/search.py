"""Which crystals of a corpus also stand in a dataset: the search.

Crystals are compared only within one anonymised formula. Fingerprints propose; the
matcher and the symmetry labels decide.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import Progress

from crysdistill.overlap.facts import CHUNK, Collection, Facts, Formula
from crysdistill.overlap.matching import Test, judge
from crysdistill.store.fingerprints import distances
from crysdistill.workers import Workers, engine

KINDS = ("id", "structure", "prototype", "formula")
"""From the strongest to the weakest; a pair has the strongest that holds."""

VOLUME_RATIO = 1.2
"""Per atom; the same crystal relaxed with two functionals stays within 1.19."""

STRUCTURE_DISTANCE = 0.08
"""Of fingerprints; atoms displaced by 0.1 Å make 0.03 to 0.07, 5 % of strain 0.02."""

STRAIN_DISTANCE = 0.03
"""The same for crystals of different symmetry, which only a strain may separate."""

PROTOTYPE_DISTANCE = 0.05
"""Of fingerprints of one structure type in one space group. Among real crystals an
anonymous match confirms 99 % of such pairs, and fewer and fewer beyond."""

TWIN_DISTANCE = 0.015
"""Of fingerprints of one structure type whatever the symmetry: noise may hide it."""

FINGERPRINT_ONLY = 0.01
"""Of fingerprints of the same crystal where it is too large for the matcher."""

_CRYSTALS_AT_ONCE = 20_000  # keeps memory flat: 18 MB of fingerprints
_WORTH_A_POOL = 4_000  # crystals; below, starting processes takes longer
_NONE = np.empty(0, np.int64)

Block = tuple[tuple[int, ...], np.ndarray, np.ndarray]
"""An anonymised formula, and the rows of corpus and dataset that have it."""


@dataclass
class Found:
    """What a search found, by row.

    Args:
        pairs: (P, 3) int64, corpus row, dataset row and number of the kind.
        totals: (4,) pairs of each kind, with those left out.
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


@dataclass
class _Pairs:
    """Pairs of rows with the distance of their fingerprints; parallel arrays."""

    corpus: np.ndarray
    dataset: np.ndarray
    distance: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[_Pairs]) -> _Pairs:
        return cls(
            np.concatenate([_NONE, *(part.corpus for part in parts)]),
            np.concatenate([_NONE, *(part.dataset for part in parts)]),
            np.concatenate([np.empty(0), *(part.distance for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.corpus)

    def where(self, keep: np.ndarray) -> _Pairs:
        return _Pairs(self.corpus[keep], self.dataset[keep], self.distance[keep])

    def without(self, other: _Pairs, width: int) -> _Pairs:
        """Return the pairs that `other`, of a corpus of `width` rows, lacks."""
        mine = self.dataset * width + self.corpus
        return self.where(~np.isin(mine, other.dataset * width + other.corpus))


def search(
    corpus: Collection,
    dataset: Collection,
    kinds: Sequence[str],
    pairs_per_entry: int,
    workers: int | None,
    cluster: str | None,
    progress: bool,
) -> Found:
    """Search all pairs; the arguments are those of `find_overlap`, checked."""
    numbers: dict[Formula, int] = {}
    first = Facts(corpus, numbers)
    # Within one collection each pair counts once, the earlier row first.
    sides = first, first if dataset is corpus else Facts(dataset, numbers)
    blocks = _blocks(*sides, across="prototype" in kinds)
    total = sum(len(rows) + len(entries) for _, rows, entries in blocks)
    if workers is None and cluster is None and total <= _WORTH_A_POOL:
        workers = 1
    with engine(workers, cluster) as pool, Progress(disable=not progress) as bar:
        task = bar.add_task("comparing", total=total)
        state = _Search(*sides, kinds, pairs_per_entry, pool, bar)
        state.same_ids()
        if set(kinds) != {"id"}:
            for portion in _portions(blocks):
                state.compare(portion)
                size = sum(len(rows) + len(entries) for _, rows, entries in portion)
                bar.update(task, advance=size)
    return state.result()


class _Search:
    def __init__(
        self,
        corpus: Facts,
        dataset: Facts,
        kinds: Sequence[str],
        pairs_per_entry: int,
        workers: Workers,
        bar: Progress,
    ) -> None:
        self.bar = bar
        self.corpus = corpus
        self.dataset = dataset
        self.kinds = kinds
        self.limit = pairs_per_entry
        self.workers = workers
        self.corpus_id, self.dataset_id = _id_numbers(corpus, dataset)
        if "id" not in kinds:
            self.dataset_id[:] = -1  # no crystal has it
        self.kept: list[np.ndarray] = []
        width, entries = len(corpus), len(dataset)
        self.found = Found(
            pairs=np.empty((0, 3), np.int64),
            totals=np.zeros(len(KINDS), np.int64),
            left_out=np.zeros(len(KINDS), np.int64),
            in_corpus=np.zeros((len(KINDS), width), bool),
            in_dataset=np.zeros((len(KINDS), entries), bool),
            nearest_row=np.full(entries, -1, np.int64),
            nearest_distance=np.full(entries, np.nan),
            nearest_same=np.zeros(entries, bool),
        )

    def result(self) -> Found:
        """Return all that was found."""
        self.found.pairs = np.concatenate([self.found.pairs, *self.kept])
        return self.found

    # --------------------------------------------------------------------- by kind

    def same_ids(self) -> None:
        """Keep the pairs of one id."""
        rows_of = defaultdict(list)
        for row in np.flatnonzero(np.isin(self.corpus_id, self.dataset_id)).tolist():
            rows_of[int(self.corpus_id[row])].append(row)
        pairs = [
            (row, entry)
            for entry, number in enumerate(self.dataset_id.tolist())
            for row in rows_of.get(number, ())
        ]
        corpus, dataset = np.array(pairs, np.int64).reshape(-1, 2).T
        self._keep("id", _Pairs(corpus, dataset, np.zeros(len(corpus))))
        differs = self.corpus.formula[corpus] != self.dataset.formula[dataset]
        self.found.id_clashes = int(differs.sum())

    def compare(self, portion: Sequence[Block]) -> None:
        """Find and keep the pairs of some anonymised formulas."""
        proposed = [self._propose(block) for block in portion]
        formula, structure, prototype = map(_Pairs.join, zip(*proposed, strict=True))
        if "structure" in self.kinds:
            structure = self._confirm_structures(structure)
            self._keep("structure", structure)
            formula = formula.without(structure, len(self.corpus))
            prototype = prototype.without(structure, len(self.corpus))
        if "prototype" in self.kinds:
            prototype = self._confirm_prototypes(prototype)
            self._keep("prototype", prototype)
            formula = formula.without(prototype, len(self.corpus))
        if "formula" in self.kinds:
            self._keep("formula", formula)
        self.corpus.forget()
        self.dataset.forget()

    def _propose(self, block: Block) -> tuple[_Pairs, _Pairs, _Pairs]:
        """Return pairs that may be of kind `formula`, `structure` and `prototype`."""
        amounts, rows, entries = block
        across = "prototype" in self.kinds
        if not across:  # no species stands for another
            amounts = tuple(range(len(amounts)))
        profiles = self.corpus.fingerprints(rows, self.workers)  # (B, S, F)
        queries = self.dataset.fingerprints(entries, self.workers)  # (A, S, F)
        parts: list[tuple[_Pairs, ...]] = []
        for part, ordered, exchanged in distances(queries, profiles, amounts):
            some = entries[part, None]  # (A, 1), to stand against rows (B,)
            same = self.dataset.formula[some] == self.corpus.formula[rows]  # (A, B)
            self._note_nearest(entries[part], rows, same, ordered, exchanged)
            new = self.dataset_id[some] != self.corpus_id[rows]
            if self.corpus is self.dataset:
                new &= rows < some
            same &= new
            ratio = np.abs(np.log(self.dataset.volume[some] / self.corpus.volume[rows]))
            alike = (
                same & (ordered <= STRUCTURE_DISTANCE) & (ratio <= np.log(VOLUME_RATIO))
            )
            typical = new & (exchanged <= PROTOTYPE_DISTANCE) & across
            i, j = np.nonzero(typical)
            typical[i, j] = self._may_share_group(rows[j], some[i, 0])
            typical |= new & (exchanged <= TWIN_DISTANCE) & across
            parts.append(
                tuple(
                    _Pairs(rows[j], some[i, 0], distance[i, j])
                    for (i, j), distance in (
                        (np.nonzero(same), ordered),
                        (np.nonzero(alike), ordered),
                        (np.nonzero(typical), exchanged),
                    )
                )
            )
        formula, structure, prototype = map(_Pairs.join, zip(*parts, strict=True))
        return formula, structure, prototype

    def _may_share_group(self, rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Tell whether space groups agree as far as they are known."""
        first, second = self.corpus.groups[rows], self.dataset.groups[entries]
        unknown = ~first.any(axis=1) | ~second.any(axis=1)
        return unknown | _share(first, second)

    def _confirm_structures(self, pairs: _Pairs) -> _Pairs:
        """Return the pairs that are the same crystal."""
        first = self.corpus.space_groups(pairs.corpus, self.workers)
        second = self.dataset.space_groups(pairs.dataset, self.workers)
        alike = _share(first, second) | _lost(first) | _lost(second)
        same = np.zeros(len(pairs), bool)
        same[alike] = self._confirm_alike(pairs.where(alike))
        # Of other symmetry: either nothing but strain, or nothing but averaging.
        strained = ~alike & (pairs.distance <= STRAIN_DISTANCE)
        same[strained] = self._agree(pairs.where(strained), "strained")[0]
        averaged = ~alike & ~same
        same[averaged] = self._agree(pairs.where(averaged), "averaged")[0]
        return pairs.where(same)

    def _confirm_alike(self, pairs: _Pairs) -> np.ndarray:
        """Tell which pairs of the same symmetry are the same crystal, (P,)."""
        agrees, judged = self._agree(pairs, "same")
        again = ~agrees & judged & (pairs.distance <= STRAIN_DISTANCE)
        agrees[again] = self._agree(pairs.where(again), "supercell")[0]
        alone = ~judged & (pairs.distance <= FINGERPRINT_ONLY)
        self.found.by_fingerprint += int(alone.sum())
        return agrees | alone

    def _confirm_prototypes(self, pairs: _Pairs) -> _Pairs:
        """Return the pairs that are of one structure type."""
        first = self.corpus.space_groups(pairs.corpus, self.workers)
        second = self.dataset.space_groups(pairs.dataset, self.workers)
        equal = _share(first, second)
        formula = (
            self.corpus.formula[pairs.corpus] == self.dataset.formula[pairs.dataset]
        )
        # Within a formula, polymorphs and stackings are at stake; without a common
        # group, noise may pass for a structure; triclinic groups say little of it.
        twins = ~equal & (pairs.distance <= TWIN_DISTANCE)
        twins &= ~formula | _lost(first) | _lost(second)
        triclinic = np.maximum(first, second).max(axis=1, initial=0) <= 2
        doubtful = (equal & (formula | triclinic)) | twins
        sure = equal & ~formula
        sure[doubtful] = self._agree(pairs.where(doubtful), "anonymous")[0]
        return pairs.where(sure)

    def _agree(self, pairs: _Pairs, test: Test) -> tuple[np.ndarray, np.ndarray]:
        """Match pairs of crystals atom by atom.

        Returns:
            Per pair, whether they agree, and whether the matcher could judge.
        """
        first = self.corpus.primitives(pairs.corpus, test, self.workers)
        second = self.dataset.primitives(pairs.dataset, test, self.workers)
        jobs = ((a, b, test) for a, b in zip(first, second, strict=True))
        task = self.bar.add_task(f"matching ({test})", total=len(pairs))
        answers = []
        for answer in self.workers.map(judge, jobs, CHUNK):
            answers.append(answer)
            self.bar.advance(task)
        self.bar.remove_task(task)
        agrees = np.array([answer is True for answer in answers], bool)
        return agrees, np.array([answer is not None for answer in answers], bool)

    # --------------------------------------------------------------------- results

    def _keep(self, kind: str, pairs: _Pairs) -> None:
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
            # Rounded, so that noise does not choose among equals; then by name.
            order = np.lexsort((rank, pairs.distance.round(4), entry))
            place = np.arange(len(order)) - (np.cumsum(counts) - counts)[entry[order]]
            chosen = np.sort(order[place < self.limit])
            self.found.left_out[number] += len(pairs) - len(chosen)
            pairs = pairs.where(chosen)
        kinds = np.full(len(pairs), number)
        self.kept.append(np.stack([pairs.corpus, pairs.dataset, kinds], axis=1))

    def _note_nearest(
        self,
        entries: np.ndarray,
        rows: np.ndarray,
        same: np.ndarray,
        ordered: np.ndarray,
        exchanged: np.ndarray,
    ) -> None:
        """Enter the nearest crystal of the same formula, else of any chemistry."""
        has = np.asarray(same.any(axis=1))  # (A,)
        best = np.where(has[:, None], np.where(same, ordered, np.inf), exchanged)
        nearest = best.argmin(axis=1)
        self.found.nearest_row[entries] = rows[nearest]
        self.found.nearest_distance[entries] = best[np.arange(len(best)), nearest]
        self.found.nearest_same[entries] = has


def _id_numbers(corpus: Facts, dataset: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers that are equal where ids are, (corpus,) and (dataset,) int64.

    Rows would not do: a name may stand twice in a collection.
    """
    numbers: dict[str, int] = {}
    corpus_id, dataset_id = (
        np.array(
            [numbers.setdefault(n, len(numbers)) for n in side.crystals.material_ids]
        )
        for side in (corpus, dataset)
    )
    return corpus_id, dataset_id


def _blocks(corpus: Facts, dataset: Facts, across: bool) -> list[Block]:
    """Return the anonymised formulas that both collections have.

    Args:
        corpus: one side.
        dataset: the other.
        across: whether crystals of other chemistry matter; where not, each reduced
            formula that both have is a block of its own.
    """
    blocks = []
    for amounts in sorted(corpus.rows_of.keys() & dataset.rows_of.keys()):
        rows = np.array(corpus.rows_of[amounts])
        entries = np.array(dataset.rows_of[amounts])
        if across:
            blocks.append((amounts, rows, entries))
            continue
        formulas = [corpus.formula[rows], dataset.formula[entries]]
        for formula in np.intersect1d(*formulas).tolist():
            some, others = rows[formulas[0] == formula], entries[formulas[1] == formula]
            if corpus is not dataset or len(some) > 1:
                blocks.append((amounts, some, others))
    return blocks


def _portions(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Group small blocks so that all processes have enough to do at once."""
    portion: list[Block] = []
    size = 0
    for block in blocks:
        portion.append(block)
        size += len(block[1]) + len(block[2])
        if size >= _CRYSTALS_AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _share(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Tell whether two rows (P, 2) have a number above 0 in common."""
    equal = first[:, :, None] == second[:, None, :]  # (P, 2, 2)
    return np.any(equal & (first[:, :, None] > 0), axis=(1, 2))


def _lost(groups: np.ndarray) -> np.ndarray:
    """Tell whether a crystal has no symmetry at the tighter tolerance, (P,)."""
    return np.asarray(groups[:, 0] <= 1)
