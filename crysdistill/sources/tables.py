"""Many structures in one JSON file: JSON lines, and the layouts of pymatgen users.

A structure is pymatgen's `Structure.as_dict`, or a flat `{"id", "lattice", "species",
"frac"}`; an entry is a dictionary that holds one as `structure`, its id, its labels.
JARVIS calls its own layout `atoms`, and writes "na" for what is not known.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from crysdistill.errors import BadStructure
from crysdistill.sources.labels import PROPERTIES, LabelTable, read_labels
from crysdistill.sources.records import (
    Record,
    Source,
    fingerprint,
    layout_of,
    load_json,
    stamp,
)
from crysdistill.structures.readers import read_bytes

ID_KEYS = ("material_id", "id", "entry_id", "task_id", "mp_id", "jid")
"""Where an entry may keep its id; the first that is there counts."""

_NOT_KNOWN = "na"
"""What JARVIS writes for a property that it has not calculated."""

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
            with open_plain(path) as file:
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

    return table_source(path, entries, count, names, keep_unlabelled, labels)


def open_json(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a JSON file of one structure or many, in any of the usual layouts.

    These are: one structure; a list of structures or entries; a dictionary from ids to
    them; the `{"index", "columns", "data"}` of matbench; a list of JARVIS. Numbers that
    stand beside a structure are its labels.
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
        if data.strip() and isinstance(
            _loaded(data.lstrip().partition(b"\n")[0]), dict
        ):
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
    return table_source(path, records, count, names, keep_unlabelled, labels)


def table_source(
    path: Path,
    entries: Callable[[], Iterator[Record]],
    count: int | None,
    names: tuple[str, ...],
    keep_unlabelled: bool,
    labels: bool,
) -> Source:
    """Return the source of a file of many structures, joined with labels beside it."""
    beside = path.parent / PROPERTIES
    files = [stamp(path)]
    table: LabelTable | None = None
    if labels and beside.is_file():
        table = read_labels(beside.read_bytes(), str(beside))
        files.append(stamp(beside))
        names = tuple(dict.fromkeys((*names, *table.properties)))
        count = None if count is None else count + len(table.strays)

    def records() -> Iterator[Record]:
        if table is None:
            return entries()
        return table.join(entries(), str(path), keep_unlabelled)

    marks = fingerprint(files, keep_unlabelled, labels)
    return Source(path, records, count, names, marks)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name


def open_plain(path: Path) -> IO[bytes]:
    """Open a file to read lines from, compressed or not, whatever it is called."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]


def _survey(path: Path, labels: bool) -> tuple[int, tuple[str, ...]]:
    """Count the lines, and find the names of labels if lines hold entries."""
    count = 0
    names: tuple[str, ...] = ()
    try:
        with open_plain(path) as file:
            first = file.readline()
            if labels and (b'"structure"' in first or b'"atoms"' in first):
                file.seek(0)
                names = _label_names(map(_loaded, file))
                file.seek(0)
                count = sum(1 for _ in file)
            else:
                count, last = first.count(b"\n"), first[-1:]
                while block := file.read(1 << 20):
                    count += block.count(b"\n")
                    last = block[-1:]
                count += last not in (b"\n", b"")
    except (OSError, *_ENDS_EARLY):
        pass  # told when the lines are read
    return max(count, 1), names


def _loaded(data: bytes) -> Any:
    """Return what JSON holds; None where it is none, which is told elsewhere."""
    try:
        return load_json(data)
    except ValueError:
        return None


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
    record = Record(source, entry_id(entry) or name, place=place)
    if isinstance(entry.get("problem"), str) and not entry.get("structure"):
        return record.refuse(entry["problem"])  # what a service could not hand out
    structure = entry.get("structure", entry.get("atoms", entry))
    if not isinstance(structure, dict):
        return record.refuse(
            "`structure` holds no structure; add it or remove the entry"
        )
    layout = layout_of(structure)
    if layout is None:
        return record.refuse(
            "no structure; give `lattice`, `species` and `frac`, or pymatgen's "
            "`Structure.as_dict()`"
        )
    try:
        values = label_values(entry, names, layout == "jarvis")
    except BadStructure as error:
        return record.refuse(str(error))
    return Record(source, record.material_id, layout, payload, values, place=place)


def entry_id(entry: Mapping[str, Any]) -> str:
    """Return the id that an entry holds; "" where it holds none."""
    for key in ID_KEYS:
        if isinstance(entry.get(key), str | int) and str(entry[key]).strip():
            return str(entry[key]).strip()
    return ""


def label_values(
    entry: Mapping[str, Any], names: Iterable[str], na: bool = False
) -> dict[str, float]:
    """Return the known labels of an entry.

    Args:
        entry: with labels beside a structure.
        names: of the labels.
        na: whether "na" stands for what is not known.

    Raises:
        BadStructure: a label is no finite number.
    """
    values: dict[str, float] = {}
    for key in names:
        value = entry.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if na and value == _NOT_KNOWN:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise BadStructure(
                f"`{key}` is `{value}`, not a finite number; mend it, or write null"
            )
        values[key] = float(value)
    return values


def _label_names(entries: Iterable[Any]) -> tuple[str, ...]:
    """Return the keys beside `structure` that hold a number anywhere.

    Beside the `atoms` of JARVIS they must hold nothing else: there some keys are a
    number in one entry and a list or a name in the next.
    """
    names: dict[str, None] = {}
    mixed: set[str] = set()
    for entry in entries:
        if not isinstance(entry, dict) or not entry.keys() & {"structure", "atoms"}:
            continue
        for key, value in entry.items():
            if isinstance(value, int | float) and key not in ID_KEYS:
                names[key] = None
            elif "atoms" in entry and value not in (None, _NOT_KNOWN):
                mixed.add(key)
    return tuple(name for name in names if name not in mixed)


def matbench_id(task: str, number: int, count: int) -> str:
    """Return the official id of an entry, such as `mb-phonons-0001`.

    Args:
        task: such as `matbench_phonons`.
        number: of the row, from 0.
        count: how many rows there are.
    """
    name = task.removeprefix("matbench_").replace("_", "-")
    return f"mb-{name}-{number + 1:0{len(str(count))}d}"


def _layout(content: Any, stem: str) -> Iterator[tuple[str, Any]]:
    """Yield a name for each entry of a JSON file, and the entry."""
    if isinstance(content, list):
        for number, entry in enumerate(content):
            yield f"{stem}-{number}", entry
    elif not isinstance(content, dict):
        raise BadStructure("neither a list nor a dictionary of structures; mend it")
    elif {"ids", "nextid"} <= content.keys():
        raise BadStructure(
            "an ASE database in JSON; convert it with `ase db FILE.json --insert-into "
            "FILE.db`"
        )
    elif {"columns", "data"} <= content.keys():
        if "structure" not in content["columns"]:
            raise BadStructure("a table without a column `structure`; add it")
        count = len(content["data"])
        names = content.get("index", range(count))
        if re.fullmatch(r"matbench_\w+", stem) and list(names) == list(range(count)):
            names = [matbench_id(stem, number, count) for number in names]
        for name, row in zip(names, content["data"], strict=True):
            entry = dict(zip(content["columns"], row, strict=True))
            yield name if isinstance(name, str) else f"{stem}-{name}", entry
    elif content.keys() & {"sites", "structure", "@class", "atoms", "lattice_mat"} or (
        "lattice" in content and not isinstance(content["lattice"], dict)
    ):
        yield stem, content
    else:
        yield from ((str(name), entry) for name, entry in content.items())
