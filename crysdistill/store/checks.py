"""Checks: whether a corpus was compared with a dataset, and which crystals were kept.

A check is made when a corpus is built or used for training. It is copied into the
store, the weights, the results and the report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

STRUCTURES = (
    "structures/atom_offsets",
    "structures/atomic_numbers",
    "structures/cells",
    "structures/frac_coords",
    "structures/material_id_offsets",
    "structures/material_ids",
)
"""The arrays of a store that define its crystals, without their graphs."""


def structures_hash(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 for names, species, cells and coordinates.

    Stores of the same structures have the same hash, whatever their graphs and labels.

    Args:
        hashes: the SHA-256 of each of the arrays `STRUCTURES`.
    """
    text = json.dumps({name: hashes[name] for name in STRUCTURES}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class DatasetCheck:
    """A dataset that a corpus was compared with.

    Args:
        name: the name of its file or folder.
        dataset: the `structures_hash` of the dataset.
        overlap: the hash of the overlap that was found.
        kinds: corpus crystals with a pair of one of these kinds were left out.
        structures: the number of structures in the dataset.
        shared: the number of them that the corpus held, by id or by structure.
        left_out: the number of corpus crystals left out for this dataset.
        kept: the number of structures of the dataset that the corpus still holds.
    """

    name: str
    dataset: str
    overlap: str
    kinds: tuple[str, ...]
    structures: int
    shared: int
    left_out: int
    kept: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))  # a list, from JSON

    @property
    def status(self) -> Literal["clean", "transductive"]:
        """`clean` if the remaining corpus holds no structure of the dataset."""
        return "transductive" if self.kept else "clean"

    @property
    def statement(self) -> str:
        """The status and its numbers, in words."""
        return self.say(labels=False)

    def say(self, labels: bool) -> str:
        """Return the status and its numbers, in words.

        Args:
            labels: whether labels of corpus crystals may have been learned too.
        """
        if self.kept:
            word, end = "transductive", ""
            if labels:
                word, end = "unknown", ", perhaps with their labels"
            return (
                f"{word} ({self.kept:,} of {self.structures:,} structures of "
                f"{self.name} are also in the corpus{end})"
            )
        return f"clean of {self.name} ({self.left_out:,} corpus crystals left out)"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "kinds": list(self.kinds)}


def read_checks(facts: Mapping[str, Any]) -> list[DatasetCheck]:
    """Return the checks that a store or a run has noted."""
    return [DatasetCheck(**check) for check in facts.get("checks", ())]


def find_check(checks: Iterable[DatasetCheck], dataset: str) -> DatasetCheck | None:
    """Return the check of a dataset, by its `structures_hash`, if there is one."""
    return next((check for check in checks if check.dataset == dataset), None)


def join_checks(
    earlier: Iterable[DatasetCheck], later: Iterable[DatasetCheck]
) -> list[DatasetCheck]:
    """Return the checks of a corpus and of its part; per dataset, the later counts."""
    known = {check.dataset: check for check in earlier}
    known |= {check.dataset: check for check in later}
    return list(known.values())


def status(
    checks: Sequence[DatasetCheck],
) -> Literal["clean", "transductive", "unknown"]:
    """Return one status for several datasets, the worst of them."""
    if not checks:
        return "unknown"
    kept = any(check.kept for check in checks)
    return "transductive" if kept else "clean"


def statement(checks: Sequence[DatasetCheck], labels: bool = False) -> str:
    """Return, in words, the datasets of which a corpus is clean and not clean.

    Args:
        checks: of the corpus.
        labels: whether labels of corpus crystals may have been learned too.
    """
    if not checks:
        return "unknown (compared with no dataset)"
    kept = [check for check in checks if check.kept]
    clean = [check for check in checks if not check.kept]
    said = [check.say(labels) for check in kept]
    if clean:
        names = ", ".join(check.name for check in clean)
        left_out = sum(check.left_out for check in clean)
        said.append(f"clean of {names} ({left_out:,} corpus crystals left out)")
    return "; ".join(said)
