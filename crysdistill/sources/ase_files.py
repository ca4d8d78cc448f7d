"""What ASE reads: its databases, and files of one frame or many.

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
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from crysdistill.errors import BadStructure, InputError
from crysdistill.sources.records import Record, Source
from crysdistill.sources.tables import (
    ID_KEYS,
    entry_id,
    label_values,
    open_plain,
    table_source,
)
from crysdistill.structures.readers import crystal_of_atoms

if TYPE_CHECKING:
    from ase import Atoms

DATABASES = {".db": "db", ".aselmdb": "aselmdb"}
"""Suffixes of ASE's databases, and what ASE calls them."""

_FRAMES = {".extxyz": "extxyz", ".xyz": "extxyz", ".traj": "traj", ".xsf": "xsf"}
_ROWS_AT_ONCE = 500  # ASE fetches all rows of a query before it hands out the first
_NO_LABELS = {*ID_KEYS, "unique_id", "occupancy"}


@dataclass(frozen=True)
class Frame:
    """One structure of a file, before it is checked.

    Args:
        content: what ASE has read, or the text of a frame of extended XYZ.
        info: what stands beside it: its id, its labels.
        problem: why there is no content; nothing follows such a frame.
    """

    content: Atoms | bytes | None
    info: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def frames_format(name: str) -> str | None:
    """Return ASE's name for a format of many frames by the name of a file, or None."""
    return _FRAMES.get(PurePosixPath(name.removesuffix(".gz")).suffix.lower())


def guess_format(path: Path) -> str | None:
    """Return ASE's name for the format of any other file; None if it reads none.

    ASE goes by the suffix, and takes a `README.md` for a run of CASTEP; so the first
    frame is read.
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
    """Open a file of frames, with `properties.csv` beside it if it is there.

    Args:
        path: of the file.
        layout: ASE's name for its format.
        keep_unlabelled: as `open_source`.
        labels: as `open_source`; if so, the file is read once to learn their names.
    """
    count, names = survey(path, layout) if labels else (None, ())

    def records() -> Iterator[Record]:
        return frame_records(frames(path, layout), str(path), frames_stem(path), names)

    return table_source(path, records, count, names, keep_unlabelled, labels)


def open_ase_database(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open an ASE database, `.db` or `.aselmdb`.

    Raises:
        InputError: it is none, of a version that ASE does not read, or a package is
            missing.
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
    """Return what the ids of the frames of a file begin with."""
    return PurePosixPath(path.name.removesuffix(".gz")).stem or path.name


def frame_records(
    found: Iterator[Frame],
    source: str,
    stem: str,
    names: tuple[str, ...] = (),
    place: str = "",
) -> Iterator[Record]:
    """Yield the records of frames.

    Ids are those beside the frames; else `STEM-0`, `STEM-1`, ..., or the stem alone if
    there is but one.

    Args:
        found: the frames.
        source: its name.
        stem: of the file.
        names: the labels to take.
        place: the name of the file in the source.
    """
    first, second = next(found, None), next(found, None)
    if first is None:
        reason = "no frames in it; get it again or leave it out"
        yield Record(source, stem, place=place).refuse(reason)
        return
    single = second is None
    together = chain([first], [] if second is None else [second], found)
    for number, frame in enumerate(together):
        name = stem if single else f"{stem}-{number}"
        where = place if single else f"{place}, frame {number}".removeprefix(", ")
        record = Record(
            source, entry_id(_plain(frame.info, ID_KEYS)) or name, place=where
        )
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
    """Read a file once: how many frames it has, and the names of their labels."""
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
    """Yield the frames of a file; where it breaks, the last one says why."""
    if layout == "extxyz":
        return _extxyz_frames(path)
    return _guarded(_ase_frames(path, layout))


def frames_of_zip(archive: zipfile.ZipFile, name: str, layout: str) -> Iterator[Frame]:
    """Yield the frames of a file in a zip, by way of a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PurePosixPath(name).name
        try:
            with archive.open(name) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            yield Frame(None, problem=f"damaged in the zip ({error}); get it again")
            return
        yield from frames(path, layout)


def _guarded(found: Iterator[Frame]) -> Iterator[Frame]:
    """Yield frames up to where reading fails, then the reason."""
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
    """Yield what ASE reads, with the energy that it keeps apart."""
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


def _extxyz_frames(path: Path) -> Iterator[Frame]:
    """Cut extended XYZ into frames; they are parsed where there is time.

    ASE looks at all frames before it hands out the first, so that a damaged last one
    would cost all the others.
    """
    from ase.io.extxyz import key_val_str_to_dict

    line_number = 0
    with open_plain(path) as file:
        try:
            for line in file:
                line_number += 1
                if not line.strip():
                    continue
                if not line.strip().isdigit():
                    start = line.strip()[:40].decode("utf-8", "replace")
                    yield Frame(
                        None,
                        problem=f"line {line_number} is `{start}`, not the number of "
                        "atoms of a frame; mend it from there on",
                    )
                    return
                atoms = int(line)
                lines = [line]
                for _ in range(atoms + 1):
                    lines.append(file.readline())
                    if not lines[-1]:
                        raise EOFError
                line_number += atoms + 1
                comment = lines[1].decode("utf-8", "replace").strip()
                try:
                    info = key_val_str_to_dict(comment) if comment else {}
                except Exception:  # told when the frame is parsed
                    info = {}
                yield Frame(b"".join(lines), info)
        except (OSError, EOFError):
            yield Frame(
                None,
                problem=f"ends early, in the frame at line {line_number}; get the file "
                "again",
            )


def _connect(path: Path) -> Any:
    """Return ASE's connection to a database that is one."""
    import ase.db

    kind = DATABASES[path.suffix.lower()]
    if kind == "db":
        # ASE would make its tables in whatever SQLite file it is given.
        try:
            with closing(
                sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            ) as file:
                file.execute("SELECT id FROM systems LIMIT 1").fetchall()
        except sqlite3.Error as error:
            raise InputError(
                f"{path}: not an ASE database ({error}); give {_KINDS}"
            ) from None
    # LMDB makes a file where there is none, and a lock beside one that it may write.
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
