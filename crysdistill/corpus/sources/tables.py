"""Many structures in one JSON file: JSON lines, and the layouts of pymatgen users.

A structure is pymatgen's `Structure.as_dict`, or a flat `{"id", "lattice", "species",
"frac"}`; an entry is a dictionary that holds one as `structure`, its id, its labels.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from crysdistill.corpus.sources.labels import PROPERTIES, LabelTable, read_labels
from crysdistill.corpus.sources.records import (
    Record,
    Source,
    fingerprint,
    load_json,
    stamp,
)
from crysdistill.errors import BadStructure
from crysdistill.readers import read_bytes

ID_KEYS = ("material_id", "id", "entry_id", "task_id", "mp_id", "jid")
"""Where an entry may keep its id; the first that is there counts."""

_ENDS_EARLY = (EOFError, zlib.error, gzip.BadGzipFile)


def open_lines(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open `structures.jsonl[.gz]`, with `properties.csv` beside it if it is there.

    Lines are handed on as they are, and read again where they are parsed: memory stays
    flat however long the file is.
    """
    count, names = _survey(path, labels)

    def entries() -> Iterator[Record]:
        stem, number, found = _stem(path), 0, False
        try:
            with _open(path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        found = True
                        yield _line_record(line, number, str(path), stem, names)
        except _ENDS_EARLY:
            reason = f"ends early after line {number}: get the file again"
            yield Record(str(path), path.name, problem=reason)
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            yield Record(str(path), path.name, problem=reason)
        else:
            if not found:
                reason = "empty file; get it again or leave it out"
                yield Record(str(path), path.name, problem=reason)

    return _source(path, entries, count, names, keep_unlabelled, labels)


def open_json(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a JSON file of one structure or many, in any of the usual layouts.

    These are: one structure; a list of structures or entries; a dictionary from ids to
    them; the `{"index", "columns", "data"}` of matbench. Numbers that stand beside a
    structure are its labels.
    """
    problem = None
    entries: list[tuple[str, Any]] = []
    try:
        data = read_bytes(path)
        content = load_json(data)
        entries = list(_layout(content, _stem(path)))
        if not entries:
            problem = "no structures in it; add them or leave the file out"
    except BadStructure as error:
        problem = str(error)
    except ValueError as error:
        if data.strip() and _is_json(data.lstrip().partition(b"\n")[0]):
            return open_lines(path, keep_unlabelled, labels)
        problem = f"not valid JSON ({error}): damaged or cut short; get the file again"
        if not data.strip():
            problem = "empty file; get it again or leave it out"
    names = _label_names(entry for _, entry in entries) if labels else ()

    def records() -> Iterator[Record]:
        for name, entry in entries:
            yield _entry_record(entry, entry, str(path), name, names)
        if problem is not None:
            yield Record(str(path), _stem(path), problem=problem)

    count = len(entries) + (problem is not None)
    return _source(path, records, count, names, keep_unlabelled, labels)


def _source(
    path: Path,
    entries: Any,
    count: int,
    names: tuple[str, ...],
    keep_unlabelled: bool,
    labels: bool,
) -> Source:
    """Join the labels that lie beside a table."""
    beside = path.parent / PROPERTIES
    files = [stamp(path)]
    table: LabelTable | None = None
    if labels and beside.is_file():
        table = read_labels(beside.read_bytes(), str(beside))
        files.append(stamp(beside))
        names = tuple(dict.fromkeys((*names, *table.properties)))
        count += len(table.strays)

    def records() -> Iterator[Record]:
        if table is None:
            return entries()
        return table.join(entries(), str(path), keep_unlabelled)

    marks = fingerprint(files, keep_unlabelled, labels)
    return Source(path, records, count, names, marks)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name


def _open(path: Path) -> IO[bytes]:
    """Open a file to read lines from, compressed or not, whatever it is called."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]


def _survey(path: Path, labels: bool) -> tuple[int, tuple[str, ...]]:
    """Count the lines, and find the names of labels if lines hold entries."""
    count, names = 0, {}
    try:
        with _open(path) as file:
            first = file.readline()
            if labels and b'"structure"' in first:
                file.seek(0)
                for line in file:
                    count += 1
                    if _is_json(line):
                        names.update(dict.fromkeys(_label_names([load_json(line)])))
            else:
                count, last = first.count(b"\n"), first[-1:]
                while block := file.read(1 << 20):
                    count += block.count(b"\n")
                    last = block[-1:]
                count += last not in (b"\n", b"")
    except (OSError, *_ENDS_EARLY):
        pass  # told when the lines are read
    return max(count, 1), tuple(names)


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(load_json(data), dict)
    except ValueError:
        return False


def _line_record(
    line: bytes, number: int, source: str, stem: str, names: tuple[str, ...]
) -> Record:
    """Return the record of one line; its id has to be known, so it is parsed here."""
    place = f"line {number}"
    try:
        entry = load_json(line)
    except ValueError as error:
        text = f"not valid JSON ({error}); mend or remove the line"
        return Record(source, place, problem=text)
    return _entry_record(entry, line, source, f"{stem}-{number}", names, place)


def _entry_record(
    entry: Any,
    payload: Any,
    source: str,
    name: str,
    names: tuple[str, ...],
    place: str = "",
) -> Record:
    """Return the record of one entry.

    Args:
        entry: what JSON holds.
        payload: what the reader gets.
        source: its name.
        name: the id if the entry has none.
        names: the properties to take from it.
        place: where it stands.
    """
    if not isinstance(entry, dict):
        record = Record(source, name, place=place)
        return record.refuse("not a structure; give a dictionary with its lattice")
    record = Record(source, _entry_id(entry) or name, place=place)
    if isinstance(entry.get("problem"), str) and not entry.get("structure"):
        return record.refuse(entry["problem"])  # what a service could not hand out
    structure = entry.get("structure", entry)
    if not isinstance(structure, dict):
        return record.refuse(
            "`structure` holds no structure; add it or remove the entry"
        )
    if "sites" in structure or "@class" in structure:
        layout = "pymatgen"
    elif structure.keys() & {"lattice", "species", "frac"}:
        layout = "flat"
    else:
        return record.refuse(
            "no structure; give `lattice`, `species` and `frac`, or pymatgen's "
            "`Structure.as_dict()`"
        )
    values: dict[str, float] = {}
    for key in names:
        value = entry.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            return record.refuse(
                f"`{key}` is `{value}`, not a finite number; mend it, or write null"
            )
        values[key] = float(value)
    return Record(source, record.material_id, layout, payload, values, place=place)


def _entry_id(entry: Mapping[str, Any]) -> str:
    for key in ID_KEYS:
        if isinstance(entry.get(key), str | int) and str(entry[key]).strip():
            return str(entry[key]).strip()
    return ""


def _label_names(entries: Iterable[Any]) -> tuple[str, ...]:
    """Return the keys beside `structure` that hold a number anywhere."""
    names: dict[str, None] = {}
    for entry in entries:
        if isinstance(entry, dict) and "structure" in entry:
            for key, value in entry.items():
                if isinstance(value, int | float) and key not in ID_KEYS:
                    names[key] = None
    return tuple(names)


def _layout(content: Any, stem: str) -> Iterator[tuple[str, Any]]:
    """Yield a name for each entry of a JSON file, and the entry."""
    if isinstance(content, list):
        for number, entry in enumerate(content):
            yield f"{stem}-{number}", entry
    elif not isinstance(content, dict):
        raise BadStructure("neither a list nor a dictionary of structures; mend it")
    elif {"columns", "data"} <= content.keys():
        if "structure" not in content["columns"]:
            raise BadStructure("a table without a column `structure`; add it")
        names = content.get("index", range(len(content["data"])))
        for name, row in zip(names, content["data"], strict=True):
            entry = dict(zip(content["columns"], row, strict=True))
            yield name if isinstance(name, str) else f"{stem}-{name}", entry
    elif content.keys() & {"sites", "structure", "@class"} or (
        "lattice" in content and not isinstance(content["lattice"], dict)
    ):
        yield stem, content
    else:
        yield from ((str(name), entry) for name, entry in content.items())
