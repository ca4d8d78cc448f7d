"""The sides of a comparison: a store as it is, or a source read into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich
from rich.markup import escape
from rich.progress import Progress

from crysdistill.errors import BadStructure, InputError
from crysdistill.overlap.facts import Collection
from crysdistill.overlap.in_memory import CrystalList
from crysdistill.sources import Record, open_source, parse
from crysdistill.structures.crystal import Crystal
from crysdistill.workers import engine

_WORTH_A_POOL = 4_000  # records; below, starting processes takes longer


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        path: as the user named it.
        crystals: the crystals that can be compared.
        quarantined: id and reason of every entry that cannot be compared.
    """

    path: Path
    crystals: Collection
    quarantined: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last part of the path, in characters that can be written anywhere.

        Many files are called `structures.jsonl`; their folder tells them apart.
        """
        name = self.path.name or self.path.resolve().name
        if name.startswith("structures.") and self.path.parent.name:
            name = f"{self.path.parent.name}/{name}"
        return name.encode("utf-8", "backslashreplace").decode()

    @property
    def remark(self) -> str:
        """How many entries cannot be compared, and why the first cannot; "" if none."""
        if not self.quarantined:
            return ""
        name, reason = self.quarantined[0]
        refused = len(self.quarantined)
        return (
            f"{self.path}: {refused:,} of {len(self.crystals) + refused:,} entries "
            f"quarantined, not compared (the first: {name}: {reason})"
        )


def open_side(
    path: str | Path, *, workers: int | None = None, progress: bool = False
) -> Side:
    """Open a store, or read and check the structures of any other source.

    As in a build, structures without a label are set aside if others have one, and so
    are those that repeat an id. So a store of the same source has the same crystals.

    Args:
        path: anything that `build` reads.
        workers: processes; if None, all cores for a large source.
        progress: whether to show a progress bar.

    Raises:
        InputError: it cannot be opened, or the store is corrupted.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in (".h5", ".hdf5"):
        from crysdistill.store.store import Store  # needs torch; sources do not

        store = Store.open(path)
        store.verify()
        return Side(path, store)
    source = open_source(path)
    for remark in source.remarks:
        print(remark)
    if workers is None:
        large = source.count is not None and source.count > _WORTH_A_POOL
        workers = (os.cpu_count() or 1) if large else 1
    crystals: list[Crystal] = []
    made_up: list[bool] = []
    quarantined: list[tuple[str, str]] = []
    seen: set[str] = set()
    with engine(workers) as pool, Progress(disable=not progress) as bar:
        task = bar.add_task(f"reading {escape(path.name)}", total=source.count)
        for found in pool.map(_parse, source.records(), chunk=64):
            bar.advance(task)
            if found.crystal is not None and found.material_id in seen:
                reason = "duplicate id; the first one is kept"
                found = _Parsed(found.material_id, reason=reason)
            if found.crystal is not None:
                seen.add(found.material_id)
                crystals.append(found.crystal)
                made_up.append(found.made_up)
            else:
                quarantined.append((found.material_id, found.reason))
    held = CrystalList(crystals, made_up=np.array(made_up, bool))
    return Side(path, held, quarantined)


def open_sides(
    paths: Sequence[str | Path], *, workers: int | None = None, progress: bool = False
) -> list[Side]:
    """Open the datasets to exclude, and print what cannot be compared.

    Args:
        paths: anything that `build` reads.
        workers: processes; if None, all cores for a large source.
        progress: whether to show progress bars.

    Raises:
        InputError: one cannot be opened, or holds no crystal at all.
    """
    sides = [open_side(path, workers=workers, progress=progress) for path in paths]
    for side in sides:
        if not len(side.crystals):
            why = f"; {side.remark}" if side.remark else ""
            raise InputError(f"{side.path} holds no crystals to exclude{why}")
        if side.remark:
            rich.print(escape(side.remark))
    return sides


class _Parsed(NamedTuple):
    """What became of a record: a crystal, or the reason why there is none."""

    material_id: str
    crystal: Crystal | None = None
    reason: str = ""
    made_up: bool = False


def _parse(record: Record) -> _Parsed:
    """Return the crystal of a record, or its id and why there is none."""
    try:
        if not _printable(record.material_id):
            raise BadStructure("its name is not valid UTF-8; rename it")
        return _Parsed(record.material_id, parse(record), made_up=record.made_up)
    except BadStructure as error:
        name = record.material_id.encode("utf-8", "backslashreplace").decode()
        return _Parsed(name, reason=str(error))


def _printable(text: str) -> bool:
    return text.encode("utf-8", "ignore").decode() == text
