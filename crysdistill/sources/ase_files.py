"""Files that ASE reads: its databases, and files of one frame or many.

Frames are read one after the other, so that memory stays flat however many there are. A
number beside a frame - in `info`, the comment line or the key-value pairs - is a label.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from crysdistill.errors import BadStructure, InputError
from crysdistill.sources.entries import label_values
from crysdistill.sources.identity import (
    ID_KEYS,
    entry_id,
    is_id_key,
    made_up_remark,
)
from crysdistill.sources.records import Record, Source
from crysdistill.sources.tables import table_source
from crysdistill.sources.xyz import Frame, extxyz_frames
from crysdistill.structures.readers import crystal_of_atoms

if TYPE_CHECKING:
    from ase import Atoms

DATABASES = {".db": "db", ".aselmdb": "aselmdb"}
"""Suffixes of ASE's databases, and what ASE calls them."""

_FRAMES = {".extxyz": "extxyz", ".xyz": "extxyz", ".traj": "traj", ".xsf": "xsf"}
_ROWS_AT_ONCE = 500  # ASE fetches all rows of a query before it hands out the first
_NO_LABELS = {*ID_KEYS, "unique_id", "occupancy"}


def frames_format(name: str) -> str | None:
    """Return ASE's name for a format of many frames, by the file name, or None."""
    return _FRAMES.get(PurePosixPath(name.removesuffix(".gz")).suffix.lower())


def guess_format(path: Path) -> str | None:
    """Return ASE's name for the format of any other file; None if ASE cannot read it.

    ASE trusts the suffix and takes a `README.md` for a run of CASTEP, so this function
    reads the first frame.
    """
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        found = filetype(str(path))
    except (UnknownFileTypeError, OSError, ValueError):
        return None
    if found not in ioformats or not ioformats[found].can_read:
        return None
    first = next(frames(path, found), None)
    return found if first is not None and first.content is not None else None


def open_ase_file(
    path: Path, layout: str, keep_unlabelled: bool, labels: bool
) -> Source:
    """Open a file of frames, and `properties.csv` beside it if there is one.

    Args:
        path: the file.
        layout: ASE's name for its format.
        keep_unlabelled: as in `open_source`.
        labels: as in `open_source`; if true, the file is read once to find their names.
    """
    count, names = survey(path, layout) if labels else (None, ())

    stem = frames_stem(path)

    def records() -> Iterator[Record]:
        return frame_records(frames(path, layout), str(path), stem, names)

    first = [r for r in islice(records(), 2) if r.made_up]
    remarks = [made_up_remark(path, first[0].material_id)] if len(first) > 1 else []
    return table_source(path, records, count, names, keep_unlabelled, labels, remarks)


def open_ase_database(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open an ASE database, `.db` or `.aselmdb`.

    Raises:
        InputError: the file is no ASE database, ASE cannot read its version, or a
            package is missing.
    """
    try:
        database = _connect(path)
        count = database.count()
        names = label_names(_rows(database, False))
    except InputError:
        raise
    except Exception as error:  # sqlite's, lmdb's and ASE's own
        raise InputError(
            f"{path}: cannot be read as an ASE database ({_first_line(error)}); get it "
            "again, or write it with a newer ASE"
        ) from None

    def records() -> Iterator[Record]:
        rows = _guarded(_rows(_connect(path), True))
        return frame_records(rows, str(path), path.stem, names if labels else ())

    names = names if labels else ()
    return table_source(path, records, count, names, keep_unlabelled, labels)


def frames_stem(path: Path | PurePosixPath) -> str:
    """Return the stem with which the ids of a file's frames begin."""
    return PurePosixPath(path.name.removesuffix(".gz")).stem or path.name


def frame_records(
    found: Iterator[Frame],
    source: str,
    stem: str,
    names: tuple[str, ...] = (),
    place: str = "",
) -> Iterator[Record]:
    """Yield the records of frames.

    Frames keep the ids beside them. Frames without ids are called `STEM-0`, `STEM-1`,
    ..., or `STEM` if there is only one.

    Args:
        found: the frames.
        source: the name of the source.
        stem: the stem of the file.
        names: the labels to read.
        place: the name of the file in the source.
    """
    first, second = next(found, None), next(found, None)
    keys = id_keys(first)
    if first is None:
        reason = "no frames in it; get it again or leave it out"
        yield Record(source, stem, place=place).refuse(reason)
        return
    single = second is None
    together = chain([first], [] if second is None else [second], found)
    for number, frame in enumerate(together):
        name = stem if single else f"{stem}-{number}"
        where = place if single else f"{place}, frame {number}".removeprefix(", ")
        own = entry_id(_plain(frame.info, keys), keys)
        made_up = not own and not single
        record = Record(source, own or name, place=where, made_up=made_up)
        if frame.content is None:
            yield record.refuse(frame.problem)
            continue
        try:
            values = label_values(_plain(frame.info, names), names)
            if isinstance(frame.content, bytes):
                record = replace(record, format="extxyz", payload=frame.content)
            else:
                crystal = crystal_of_atoms(frame.content, name)
                record = replace(record, format="crystal", payload=crystal)
        except BadStructure as error:
            yield record.refuse(str(error))
        else:
            yield replace(record, properties=values)


def _plain(info: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return labels with Python's numbers in place of NumPy's."""
    values = {name: info.get(name) for name in names}
    return {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in values.items()
    }


def survey(path: Path, layout: str) -> tuple[int, tuple[str, ...]]:
    """Read a file once; return the number of frames and the names of their labels."""
    count = 0

    def counted() -> Iterator[Frame]:
        nonlocal count
        for frame in frames(path, layout):
            count += 1
            yield frame

    names = label_names(counted())
    return max(count, 1), names


def label_names(found: Iterable[Frame]) -> tuple[str, ...]:
    """Return the keys that hold a number beside any frame."""
    names: dict[str, None] = {}
    for frame in found:
        for key, value in frame.info.items():
            if isinstance(value, int | float | np.number | np.bool_):
                names[key] = None
    return tuple(str(name) for name in names if name not in _NO_LABELS)


def frames(path: Path, layout: str) -> Iterator[Frame]:
    """Yield the frames of a file; if reading fails, the last frame holds the reason."""
    if layout == "extxyz":
        return extxyz_frames(path)
    return _guarded(_ase_frames(path, layout))


def frames_of_zip(archive: zipfile.ZipFile, name: str, layout: str) -> Iterator[Frame]:
    """Yield the frames of a zipped file, which is unpacked to a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PurePosixPath(name).name
        try:
            with archive.open(name) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except Exception as error:  # each way of packing has its own
            reason = f"damaged in the zip ({_first_line(error)}); get it again"
            yield Frame(None, problem=reason)
            return
        yield from frames(path, layout)


def _guarded(found: Iterator[Frame]) -> Iterator[Frame]:
    """Yield frames until reading fails, then a frame with the reason."""
    try:
        yield from found
    except Exception as error:  # each format of ASE has its own
        yield Frame(
            None,
            problem=f"cannot be read from here on ({_first_line(error)}): damaged or "
            "cut short; get the file again",
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _ase_frames(path: Path, layout: str) -> Iterator[Frame]:
    """Yield the frames that ASE reads, with the energy that ASE keeps apart."""
    import ase.io

    if not path.stat().st_size:
        return
    for atoms in ase.io.iread(
        str(path), index=":", format=layout, do_not_split_by_at_sign=True
    ):
        results = getattr(atoms.calc, "results", {})
        yield Frame(atoms, {**atoms.info, **_energy(results.get("energy"))})


def _energy(value: Any) -> dict[str, Any]:
    return {} if value is None else {"energy": value}


def id_keys(frame: Frame | None) -> tuple[str, ...]:
    """Return the keys that may hold the ids of frames, judged by the first frame."""
    others = [key for key in (frame.info if frame else ()) if is_id_key(str(key))]
    return tuple(dict.fromkeys((*ID_KEYS, *others)))


def _connect(path: Path) -> Any:
    """Return ASE's connection to a file, once it is known to be an ASE database."""
    import ase.db

    kind = DATABASES[path.suffix.lower()]
    if kind == "db":
        # ASE would add its tables to any SQLite file.
        try:
            with closing(
                sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            ) as file:
                file.execute("SELECT id FROM systems LIMIT 1").fetchall()
        except sqlite3.Error as error:
            raise InputError(
                f"{path}: not an ASE database ({error}); give {_KINDS}"
            ) from None
    # LMDB creates a missing file, and a lock beside a file that it may write.
    options = {"readonly": True} if kind == "aselmdb" else {}
    try:
        return ase.db.connect(path, type=kind, use_lock_file=False, **options)
    except ImportError:
        raise InputError(
            f"{path}: `ase-db-backends` is not installed; `pip install "
            "crysdistill[ase]`"
        ) from None


_KINDS = "a `.db` or `.aselmdb` that `ase.db` has written"


def _rows(database: Any, whole: bool) -> Iterator[Frame]:
    """Yield the rows of a database in the order of their numbers.

    Args:
        database: ASE's connection.
        whole: whether to read the atoms as well.
    """
    for row in _by_number(database, whole):
        info = {"id": row.unique_id, **row.key_value_pairs}
        info.update(_energy(row.get("energy")))
        yield Frame(_atoms_of_row(row) if whole else None, info)


def _by_number(database: Any, whole: bool) -> Iterator[Any]:
    if not hasattr(database, "get_all_key_names"):  # LMDB hands out one row at a time
        yield from database.select(include_data=whole)
        return
    last = 0
    while True:
        before = last
        for row in database.select(
            [("id", ">", last)], sort="id", limit=_ROWS_AT_ONCE, include_data=whole
        ):
            last = row.id
            yield row
        if last == before:
            return


def _atoms_of_row(row: Any) -> Atoms:
    from ase import Atoms

    data = row.data if isinstance(row.data, Mapping) else {}
    info = {key: data[key] for key in ("occupancy",) if key in data}
    return Atoms(row.numbers, row.positions, cell=row.cell, pbc=row.pbc, info=info)
