"""The report on what a corpus and a dataset have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table

from crysdistill.errors import InputError, did_you_mean
from crysdistill.overlap.listing import pair_digest, pair_table
from crysdistill.overlap.search import (
    FINGERPRINT_ONLY,
    KINDS,
    PROTOTYPE_DISTANCE,
    STRAIN_DISTANCE,
    STRUCTURE_DISTANCE,
    TWIN_DISTANCE,
    VOLUME_RATIO,
    Found,
)

METHOD = {
    "version": 1,
    "structure_distance": STRUCTURE_DISTANCE,
    "strain_distance": STRAIN_DISTANCE,
    "prototype_distance": PROTOTYPE_DISTANCE,
    "twin_distance": TWIN_DISTANCE,
    "fingerprint_only": FINGERPRINT_ONLY,
    "volume_ratio": VOLUME_RATIO,
}
"""All that decides besides the input; part of the hash of a report."""

DISTANCE_EDGES = (0.0, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, np.inf)
"""Edges of the histogram of nearest distances. For scale: 1 % of shear or elongation
gives 0.004, moving atoms by 0.1 Å gives 0.03, and polymorphs are 0.02 to 0.15 apart."""


@dataclass(frozen=True)
class Overlap:
    """What a corpus and a dataset have in common.

    Args:
        corpus_ids: names of all crystals of the corpus.
        dataset_ids: names of all structures of the dataset.
        hashes: the hashes of the corpus and of the dataset.
        found: the result of the search, by row.
        kinds: the kinds that were looked for.
        pairs_per_entry: how many pairs of a kind were kept for one dataset entry.
    """

    corpus_ids: Sequence[str]
    dataset_ids: Sequence[str]
    hashes: tuple[str, str]
    found: Found = field(repr=False)
    kinds: tuple[str, ...]
    pairs_per_entry: int

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per pair: `corpus_id`, `dataset_id` and the strongest `kind`."""
        return pair_table(self.found.pairs, self.corpus_ids, self.dataset_ids, KINDS)

    def write(self, path: str | Path) -> None:
        """Write the pairs as CSV: `corpus_id,dataset_id,kind`."""
        self.pairs.to_csv(path, index=False, lineterminator="\n")

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Per kind: the number of pairs, and of dataset and corpus entries with one.

        `strongest` counts each dataset entry once, by its strongest pair; entries
        without a pair make up the rest of the dataset. `left_out` pairs were counted
        but are not in `pairs`.
        """
        strongest = self._strongest
        return {
            kind: {
                "pairs": int(self.found.totals[number]),
                "dataset": int(self.found.in_dataset[number].sum()),
                "strongest": int((strongest == number).sum()),
                "corpus": int(self.found.in_corpus[number].sum()),
                "left_out": int(self.found.left_out[number]),
            }
            for number, kind in enumerate(KINDS)
            if kind in self.kinds
        }

    @property
    def _strongest(self) -> np.ndarray:
        """Number of the strongest kind of each dataset entry, len(KINDS) for none."""
        has = self.found.in_dataset  # (kinds, B)
        return np.where(has.any(axis=0), has.argmax(axis=0), len(KINDS))

    @property
    def statement(self) -> str:
        """`clean`, or `transductive` with the number of structures in both.

        `unknown` if none is, but `id` or `structure` pairs were not looked for.
        """
        both = int(self.found.in_dataset[:2].any(axis=0).sum())
        missing = [kind for kind in KINDS[:2] if kind not in self.kinds]
        if not both and missing:
            names = " and ".join(f"`{kind}`" for kind in missing)
            return f"unknown ({names} pairs were not looked for)"
        if not both:
            return "clean"
        return (
            f"transductive ({both:,} of {len(self.dataset_ids):,} dataset structures "
            "are also in the corpus)"
        )

    @cached_property
    def hash(self) -> str:
        """A SHA-256 of the method, the contents of both sides and the sorted pairs."""
        head = {**METHOD, "inputs": self.hashes, "kinds": self.kinds}
        head["pairs_per_entry"] = self.pairs_per_entry
        return pair_digest(head, self.pairs)

    def corpus_rows(
        self,
        kinds: Iterable[str] = ("id", "structure"),
        dataset_rows: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the rows of the corpus to leave out, sorted, int64.

        Args:
            kinds: leave out entries that have a pair of one of these kinds.
            dataset_rows: count only pairs with these rows of the dataset, such as those
                of the test set; all rows if None.

        Raises:
            InputError: a kind is unknown or was not looked for, or pairs of it were
                left out and single dataset rows are asked for.
        """
        wanted = check_kinds(kinds)
        for kind in wanted:
            if kind not in self.kinds:
                raise InputError(
                    f"`{kind}` pairs were not looked for; search with it in `kinds`"
                )
        numbers = [KINDS.index(kind) for kind in wanted]
        if dataset_rows is None:
            return np.flatnonzero(self.found.in_corpus[numbers].any(axis=0))
        for number in numbers:
            if left_out := int(self.found.left_out[number]):
                raise InputError(
                    f"{left_out:,} `{KINDS[number]}` pairs were left out, so those of "
                    "single dataset rows are not known; search with a larger "
                    "`pairs_per_entry`"
                )
        corpus, dataset, kind_number = self.found.pairs.T
        chosen = np.isin(kind_number, numbers) & np.isin(dataset, dataset_rows)
        return np.unique(corpus[chosen]).astype(np.int64)

    @cached_property
    def nearest(self) -> pd.DataFrame:
        """The nearest corpus entry of each dataset entry, with its distance.

        Columns: `dataset_id`, `corpus_id`, `distance` (of fingerprints; shape only,
        density aside) and `formula`: `same`, or `other` where the corpus has only the
        anonymised formula. If it lacks that too, the entry is absent. Only a search for
        `prototype` looks at other chemistries.
        """
        rows = np.flatnonzero(self.found.nearest_row >= 0)
        same = self.found.nearest_same[rows]
        return pd.DataFrame(
            {
                "dataset_id": [self.dataset_ids[row] for row in rows.tolist()],
                "corpus_id": [
                    self.corpus_ids[r] for r in self.found.nearest_row[rows].tolist()
                ],
                "distance": self.found.nearest_distance[rows],
                "formula": np.where(same, "same", "other"),
            }
        )

    def histogram(self, edges: Sequence[float] = DISTANCE_EDGES) -> pd.DataFrame:
        """Count dataset entries by the distance of their nearest corpus entry.

        Args:
            edges: of the bins.

        Returns:
            One row per bin: `from`, `to`, `same` and `other` (formula).
        """
        counts = {
            name: np.histogram(
                self.nearest["distance"][self.nearest["formula"] == name], edges
            )[0]
            for name in ("same", "other")
        }
        return pd.DataFrame({"from": edges[:-1], "to": edges[1:], **counts})

    def table(self) -> Table:
        """Return the counts as a table for the terminal."""
        table = Table(title=f"Overlap: {self.statement}", title_justify="left")
        table.add_column("kind")
        for name in ("pairs", "dataset entries", "strongest here", "corpus entries"):
            table.add_column(name, justify="right")
        for kind, count in self.counts.items():
            names = ("pairs", "dataset", "strongest", "corpus")
            table.add_row(kind, *(f"{count[name]:,}" for name in names))
        none = int((self._strongest == len(KINDS)).sum())
        table.add_row("none", "", "", f"{none:,}", "")
        table.caption = "; ".join(self._remarks()) or None
        table.caption_justify = "left"
        return table

    def histogram_table(self) -> Table:
        """Return the histogram of nearest distances as a table for the terminal."""
        title = "Distance from dataset entries to the nearest corpus entry"
        table = Table(title=title, title_justify="left")
        for name in ("distance", "of the same formula", "of another chemistry"):
            table.add_column(name, justify="right")
        for low, high, same, other in self.histogram().itertuples(index=False):
            table.add_row(f"{low:g} - {high:g}", f"{same:,}", f"{other:,}")
        return table

    def _remarks(self) -> list[str]:
        """Return remarks on what the counts do not show."""
        remarks = []
        for kind, count in self.counts.items():
            if count["left_out"]:
                remarks.append(
                    f"{count['left_out']:,} `{kind}` pairs counted but not listed "
                    f"(more than {self.pairs_per_entry:,} for a dataset entry)"
                )
        if self.found.id_clashes:
            remarks.append(
                f"{self.found.id_clashes:,} pairs share an id but not the formula "
                "(check that the ids come from one database)"
            )
        if self.found.by_fingerprint:
            remarks.append(
                f"{self.found.by_fingerprint:,} `structure` pairs of large cells rest "
                "on the fingerprint alone"
            )
        return remarks


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return known kinds from the strongest to the weakest.

    Raises:
        InputError: a kind is unknown, or there is none.
    """
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in wanted:
        if kind not in KINDS:
            raise InputError(
                f"unknown kind `{kind}`{did_you_mean(kind, KINDS)}; there are: "
                f"{', '.join(KINDS)}"
            )
    if not wanted:
        raise InputError(f"`kinds` is empty; give some of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in wanted)
