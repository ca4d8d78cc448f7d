"""Splits as files: made once, written, and shown as a table."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich
from rich.markup import escape
from rich.table import Table

from crysdistill.errors import InputError
from crysdistill.files import writable
from crysdistill.splits.groups import GROUPINGS, Groups, find_groups
from crysdistill.splits.settings import (
    SplitSettings,
    fold_file,
    make_folds,
    make_split,
)
from crysdistill.splits.split import SUBSETS, Split
from crysdistill.store.store import Store


@dataclass(frozen=True)
class WrittenSplits:
    """Splits and where they were written.

    Args:
        paths: the files.
        splits: the split in each file.
        material_ids: the names of all crystals of the store.
        groups: the groups to count: formulas, and the groups that were kept whole.
        rows: all usable rows.
        missing: crystals without the target.
    """

    paths: list[Path]
    splits: list[Split]
    material_ids: Sequence[str]
    groups: list[Groups]
    rows: np.ndarray
    missing: int = 0

    def print(self) -> None:
        """Print the table, and a line on each file."""
        rich.print(self.table())
        for line in self.lines():
            print(line)

    def table(self) -> Table:
        """Return crystals and groups of each subset as a table for the terminal."""
        table = Table(title="Splits" if len(self.splits) > 1 else "Split")
        table.title_justify = "left"
        table.add_column("file", overflow="fold")
        table.add_column("subset")
        for name in ("crystals", "share", *(groups.plural for groups in self.groups)):
            table.add_column(escape(name), justify="right")
        for path, split in zip(self.paths, self.splits, strict=True):
            file = escape(path.name)
            for subset, rows in self._subsets(split):
                share = len(rows) / len(self.rows)
                counts = [len(set(g.of(rows).names)) for g in self.groups]
                table.add_row(
                    file,
                    subset,
                    f"{len(rows):,}",
                    f"{share:.1%}",
                    *(f"{count:,}" for count in counts),
                )
                file = ""
        return table

    def lines(self) -> Iterator[str]:
        """Yield how each split was made, its hash, and formulas shared with `train`."""
        if self.missing:
            yield f"{self.missing:,} crystals have no label and are in no subset"
        for path, split in zip(self.paths, self.splits, strict=True):
            yield f"{path}: {split.made_by}; hash {split.hash(self.material_ids)}"
            formulas = self.groups[0]
            known = set(formulas.of(split.train).names)
            tested = set(formulas.of(split.test).names)
            if shared := len(tested & known):
                yield (
                    f"  {shared:,} of the {len(tested):,} formulas of `test` are "
                    "also in `train`"
                )

    def _subsets(self, split: Split) -> Iterator[tuple[str, np.ndarray]]:
        """Yield names and rows of the subsets, and of the unused rows."""
        used = [getattr(split, name) for name in SUBSETS]
        yield from zip(SUBSETS, used, strict=True)
        unused = np.setdiff1d(self.rows, np.concatenate(used))
        if len(unused):
            yield "none", unused


def write_splits(
    dataset: str | Path,
    out: str | Path,
    settings: SplitSettings,
    target: str | None = None,
    overwrite: bool = False,
) -> WrittenSplits:
    """Make a split, or the splits of all folds, and write them for `split.file`.

    Args:
        dataset: a store.
        out: the CSV. Folds go to `fold_file(out, 0)` and so on, unless one is chosen.
        settings: the settings of the split.
        target: a property; crystals without it are left out.
        overwrite: replace other splits of those names.

    Raises:
        InputError: the split cannot be made, or would overwrite another.
    """
    out = writable(out, [dataset])  # before the work, not after it
    store = Store.open(dataset)
    labels = None if target is None else store.property(target)
    if labels is None and (settings.stratify or settings.by == "matbench"):
        asked = "--stratify" if settings.stratify else "--by matbench"
        raise InputError(f"`{asked}` needs a property, such as `--target NAME`")
    if settings.folds is not None and settings.fold is None:
        splits = make_folds(store, settings, labels)
        paths = [fold_file(out, fold) for fold in range(settings.folds)]
    else:
        splits, paths = [make_split(store, settings, labels)], [out]
    for path, split in zip(paths, splits, strict=True):
        if path.exists() and not overwrite and not _holds(path, split, store):
            raise InputError(
                f"{path} holds another split; give `--overwrite` or another name"
            )
    for path, split in zip(paths, splits, strict=True):
        split.write(path, store.material_ids)
    known = np.ones(len(store), bool) if labels is None else ~np.isnan(labels)
    rows = np.flatnonzero(known)
    kinds = ["formula"]
    if settings.by in GROUPINGS and settings.by != "formula":
        kinds.append(settings.by)
    return WrittenSplits(
        paths,
        splits,
        store.material_ids,
        [find_groups(store, rows, kind, settings.clusters) for kind in kinds],
        rows,
        int((~known).sum()),
    )


def _holds(path: Path, split: Split, store: Store) -> bool:
    """Return whether a file already holds the split, byte for byte."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "split.csv"
        split.write(fresh, store.material_ids)
        return fresh.read_bytes() == path.read_bytes()
