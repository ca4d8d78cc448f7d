"""Choose the crystals to leave out so that a corpus is clean of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crysdistill.overlap.facts import Collection
from crysdistill.overlap.finding import find_overlaps
from crysdistill.overlap.report import Overlap, check_kinds
from crysdistill.overlap.search import KINDS
from crysdistill.overlap.sides import Side
from crysdistill.store.checks import DatasetCheck

SAME = ("id", "structure")
"""Pairs of these kinds are one crystal; they decide whether a corpus is clean."""

Rows = Mapping[int, str]
"""Rows of a corpus, and why each is left out."""


@dataclass(frozen=True)
class Exclusion:
    """The rows to leave out, and the check of each dataset afterwards.

    Args:
        rows: rows of the corpus in rising order, each with its reason.
        checks: one for each dataset, in their order.
    """

    rows: Rows
    checks: list[DatasetCheck]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "rows": [[row, reason] for row, reason in self.rows.items()],
            "checks": [check.to_dict() for check in self.checks],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Exclusion:
        """Return what `to_dict` wrote."""
        return cls(
            dict(values["rows"]),
            [DatasetCheck(**check) for check in values["checks"]],
        )


def find_exclusion(
    corpus: Collection,
    datasets: Sequence[Side],
    *,
    kinds: Iterable[str] = SAME,
    workers: int | None = None,
    cluster: str | None = None,
    progress: bool = False,
) -> Exclusion:
    """Compare a corpus with datasets and say which of its crystals to leave out.

    The search always covers pairs of kind `id` and `structure`. Those that are kept
    are counted, and they make a corpus transductive.

    Args:
        corpus: the crystals to learn from.
        datasets: the datasets for evaluation.
        kinds: leave out corpus crystals with a pair of one of these kinds. If empty,
            leave out none and only count.
        workers: processes; if None, all cores for a large task.
        cluster: Dask workers instead; see `find_overlap`.
        progress: whether to show a progress bar, one for all datasets.

    Raises:
        InputError: a kind is unknown, or a side is empty.
    """
    wanted = check_exclude_kinds(kinds)
    searched = check_kinds({*SAME, *wanted})
    overlaps = find_overlaps(
        corpus,
        [(side.name, side.crystals) for side in datasets],
        kinds=searched,
        workers=workers,
        cluster=cluster,
        progress=progress,
    )
    reasons: dict[int, str] = {}
    left_out = []
    for side, overlap in zip(datasets, overlaps, strict=True):
        rows = overlap.corpus_rows(wanted).tolist() if wanted else []
        left_out.append(len(rows))
        known = dict(_reasons(overlap, wanted, side.name))
        for row in rows:
            unnamed = f"excluded: like a structure of {side.name}"
            reasons.setdefault(row, known.get(row, unnamed))
    dropped = np.zeros(len(corpus), bool)
    dropped[list(reasons)] = True
    checks = [
        DatasetCheck(
            name=side.name,
            dataset=side.crystals.structures_hash,
            overlap=overlap.hash,
            kinds=wanted,
            structures=len(side.crystals),
            shared=len(_shared(overlap, np.zeros(len(corpus), bool))),
            left_out=count,
            kept=len(_shared(overlap, dropped)),
        )
        for side, overlap, count in zip(datasets, overlaps, left_out, strict=True)
    ]
    return Exclusion(dict(sorted(reasons.items())), checks)


def find_duplicates(
    corpus: Collection,
    *,
    without: Rows | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    progress: bool = False,
) -> dict[int, str]:
    """Return the rows that repeat the crystal of an earlier row, with reasons.

    Args:
        corpus: the crystals.
        without: rows that are already left out; a row is no duplicate of these.
        workers: processes; if None, all cores for a large task.
        cluster: Dask workers instead; see `engine`.
        progress: whether to show a progress bar.
    """
    [overlap] = find_overlaps(
        corpus,
        [("the corpus with itself", corpus)],
        kinds=("structure",),
        pairs_per_entry=max(len(corpus), 1),  # all: each may name the row to keep
        workers=workers,
        cluster=cluster,
        progress=progress,
    )
    gone: dict[int, str] = dict(without or {})
    pairs = overlap.found.pairs[:, :2]
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]  # by later, then earlier row
    duplicates: dict[int, str] = {}
    for earlier, later in pairs.tolist():
        if earlier in gone or later in gone:
            continue
        name = corpus.material_ids[earlier]
        duplicates[later] = gone[later] = f"filtered: same as {name} (`duplicates`)"
    return duplicates


def check_exclude_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return known kinds from the strongest to the weakest; there may be none.

    Raises:
        InputError: a kind is unknown.
    """
    given = [kinds] if isinstance(kinds, str) else list(kinds)
    return check_kinds(given) if given else ()


def _reasons(
    overlap: Overlap, kinds: Sequence[str], dataset: str
) -> Iterator[tuple[int, str]]:
    """Yield each corpus row to leave out, with its strongest pair as the reason."""
    numbers = [KINDS.index(kind) for kind in kinds]
    pairs = overlap.found.pairs[np.isin(overlap.found.pairs[:, 2], numbers)]
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 2], pairs[:, 0]))]
    _, first = np.unique(pairs[:, 0], return_index=True)
    for row, entry, kind in pairs[first].tolist():
        name = overlap.dataset_ids[entry]
        yield row, f"excluded: same {KINDS[kind]} as {name} of {dataset}"


def _shared(overlap: Overlap, dropped: np.ndarray) -> np.ndarray:
    """Return the dataset rows whose crystal is still in the rest of the corpus."""
    same = [KINDS.index(kind) for kind in SAME]
    corpus, dataset, kind = overlap.found.pairs.T
    return np.unique(dataset[np.isin(kind, same) & ~dropped[corpus]])
