"""Train, validation and test: drawn once, written, hashed, never overlapping."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crysdistill.errors import InputError

SUBSETS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Rows of a store for training, validation and testing.

    Args:
        train: rows to learn from.
        val: rows on which the best epoch is chosen.
        test: rows that are looked at once, at the end.

    Raises:
        InputError: a row stands in two subsets, or train or val is empty.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def __post_init__(self) -> None:
        rows = np.concatenate([self.train, self.val, self.test])
        if len(np.unique(rows)) != len(rows):
            raise InputError("the split puts a crystal into two subsets")
        for name in ("train", "val"):
            if not len(getattr(self, name)):
                raise InputError(f"the split leaves no crystal for `{name}`")

    def hash(self, material_ids: Sequence[str]) -> str:
        """Return a SHA-256 of which materials stand in which subset."""
        digest = hashlib.sha256()
        for name in SUBSETS:
            names = sorted(material_ids[row] for row in getattr(self, name))
            digest.update(f"{name}\n{chr(10).join(names)}\n".encode())
        return digest.hexdigest()

    def write(self, path: Path, material_ids: Sequence[str]) -> None:
        """Write `material_id, subset` rows that `read_split` reads back."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["material_id", "subset"])
            for name in SUBSETS:
                writer.writerows((material_ids[r], name) for r in getattr(self, name))


def random_split(
    rows: np.ndarray,
    train: float,
    val: float,
    test: float,
    seed: int,
    train_subset: int | None = None,
) -> Split:
    """Split rows at random.

    Args:
        rows: what to split.
        train: a fraction (at most 1) or a number of crystals.
        val: the same; drawn after the test set.
        test: the same; drawn first, so that it stays when the others change.
        seed: of the draw.
        train_subset: keep only this many of the training rows (learning curves: each
            smaller set is part of every larger one).

    Raises:
        InputError: more is asked for than there is.
    """
    order = np.random.default_rng(seed).permutation(np.sort(rows))
    sizes = {
        name: _count(name, share, len(rows))
        for name, share in (("test", test), ("val", val), ("train", train))
    }
    if sum(sizes.values()) > len(rows):
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"the split asks for {asked}, but only {len(rows)} crystals have a label; "
            "lower `split.train`, `split.val` or `split.test`"
        )
    ends = np.cumsum(list(sizes.values()))
    tests, vals, trains = np.split(order[: ends[-1]], ends[:-1])
    if train_subset is not None:
        trains = trains[:train_subset]
    return Split(trains, vals, tests)


def _count(name: str, share: float, total: int) -> int:
    """Return how many of `total` a fraction or a number means."""
    if share < 0 or (share > 1 and share != int(share)):
        raise InputError(
            f"`split.{name}` is {share} but must be a fraction up to 1 or a whole "
            "number"
        )
    return int(share) if share > 1 else int(share * total + 1e-9)


def read_split(path: Path, material_ids: Sequence[str], rows: np.ndarray) -> Split:
    """Read a split from a CSV with `material_id` and `subset` (train, val, test).

    Args:
        path: the CSV.
        material_ids: the names of all crystals of the store.
        rows: the rows that may be used (those with a label); others are left out.

    Raises:
        InputError: the file is not such a table or names an unknown material.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such split file")
    row_of = {name: row for row, name in enumerate(material_ids)}
    usable = set(rows.tolist())
    subsets: dict[str, list[int]] = {name: [] for name in SUBSETS}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"material_id", "subset"} <= set(reader.fieldnames or ()):
            raise InputError(f"{path}: needs the columns material_id and subset")
        for line in reader:
            name, subset = line["material_id"], line["subset"]
            if name not in row_of:
                raise InputError(f"{path}: {name} is not in the dataset")
            if subset not in subsets:
                raise InputError(
                    f"{path}: {name} has subset {subset!r}, which must be one of "
                    f"{', '.join(SUBSETS)}"
                )
            if row_of[name] in usable:
                subsets[subset].append(row_of[name])
    return Split(*(np.array(subsets[name], np.int64) for name in SUBSETS))
