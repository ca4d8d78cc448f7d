"""A split: the subset of each material, as a file and as a hash."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crysdistill.errors import InputError
from crysdistill.splits.groups import Groups

SUBSETS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Rows of a store for training, validation and testing.

    Args:
        train: rows to train on.
        val: rows that choose the best epoch.
        test: rows that are used once, at the end.
        made_by: how it was made, in words; not part of the hash.

    Raises:
        InputError: a row is in two subsets, or train or val is empty.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    made_by: str = ""

    def __post_init__(self) -> None:
        rows = np.concatenate([self.train, self.val, self.test])
        if len(np.unique(rows)) != len(rows):
            raise InputError("the split puts a crystal into two subsets")
        for name in ("train", "val"):
            if not len(getattr(self, name)):
                raise InputError(f"the split leaves no crystal for `{name}`")

    def hash(self, material_ids: Sequence[str]) -> str:
        """Return a SHA-256 of the materials of each subset."""
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

    def check_groups(self, groups: Groups, material_ids: Sequence[str]) -> None:
        """Refuse a split that divides a group.

        Args:
            groups: the groups of all its rows, or of more rows.
            material_ids: the names of all crystals of the store, for the message.

        Raises:
            InputError: two subsets share a group; the text names the group and a
                crystal of each subset.
        """
        name_of = groups.name_of
        first: dict[str, tuple[str, int]] = {}
        for subset in SUBSETS:
            for row in getattr(self, subset).tolist():
                other, member = first.setdefault(name_of[row], (subset, row))
                if other != subset:
                    raise InputError(
                        f"`{other}` and `{subset}` share the {groups.word} "
                        f"{name_of[row]} ({material_ids[member]} and "
                        f"{material_ids[row]}); split again with "
                        f"`split.by={groups.by}`"
                    )


def read_split(path: Path, material_ids: Sequence[str], rows: np.ndarray) -> Split:
    """Read a split from a CSV with `material_id` and `subset` (train, val, test).

    Args:
        path: the CSV.
        material_ids: the names of all crystals of the store.
        rows: the usable rows (those with a label); others are left out.

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
    train, val, test = (np.array(subsets[name], np.int64) for name in SUBSETS)
    return Split(train, val, test, f"read from {path.name}")
