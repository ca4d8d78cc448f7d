"""Many structures in one JSON file: JSON lines, and the layouts of pymatgen users.

A structure is pymatgen's `Structure.as_dict`, or a flat `{"id", "lattice", "species",
"frac"}`. An entry is a dictionary with a `structure`, an id and labels. JARVIS calls
its own layout `atoms`, and writes "na" for an unknown value.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from crysdistill.errors import BadStructure, InputError
from crysdistill.sources.contents import contents_of, not_a_file
from crysdistill.sources.entries import Survey, entry_record
from crysdistill.sources.identity import ID_KEYS, made_up_remark
from crysdistill.sources.label_files import read_labels
from crysdistill.sources.labels import ID_PROP, PROPERTIES, LabelTable
from crysdistill.sources.layouts import Entry, entries_of
from crysdistill.sources.records import Record, Source, load_json
from crysdistill.structures.readers import read_bytes

_ENDS_EARLY = (EOFError, zlib.error, gzip.BadGzipFile)
_PLAIN = {*ID_KEYS, "lattice", "species", "frac"}
"""Keys of a line that holds a structure and its id, but no labels."""


def open_lines(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open `structures.jsonl[.gz]`, and `properties.csv` beside it if there is one.

    Workers receive raw lines and parse them, so that memory stays flat however long the
    file is.
    """
    count, survey = _survey(path, labels)
    names, keys, stem = survey.names, survey.ids.keys, _stem(path)

    def entries() -> Iterator[Record]:
        number, found = 0, False
        try:
            with open_plain(path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        found = True
                        yield _line_record(line, number, str(path), stem, names, keys)
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

    remarks = survey.remarks(path)
    if survey.ids.missing:
        remarks.append(made_up_remark(path, f"{stem}-1"))
    return table_source(path, entries, count, names, keep_unlabelled, labels, remarks)


def open_json(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a JSON file of one structure or many, in any of the usual layouts.

    These are: one structure; a list of structures or entries; a dictionary from ids to
    them; a pandas data frame by rows, by columns, or in the layout of matbench; a list
    of JARVIS. Numbers beside a structure are its labels.
    """
    problem = None
    entries: list[Entry] = []
    data = b""
    try:
        data = read_bytes(path)
        entries = list(entries_of(load_json(data), _stem(path)))
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
    survey = Survey()
    for entry in entries:
        survey.add(entry.content, labels)
    names, keys = survey.names, survey.ids.keys

    def records() -> Iterator[Record]:
        for name, entry, made_up in entries:
            yield entry_record(entry, entry, str(path), name, names, "", keys, made_up)
        if problem is not None:
            yield Record(str(path), _stem(path), problem=problem)

    remarks = survey.remarks(path)
    if survey.ids.missing and any(entry.made_up for entry in entries):
        remarks.append(made_up_remark(path, entries[0].name))
    count = len(entries) + (problem is not None)
    return table_source(path, records, count, names, keep_unlabelled, labels, remarks)


def table_source(
    path: Path,
    entries: Callable[[], Iterator[Record]],
    count: int | None,
    names: tuple[str, ...],
    keep_unlabelled: bool,
    labels: bool,
    remarks: list[str] | None = None,
) -> Source:
    """Return the source of a file of many structures, joined with its label table.

    Raises:
        InputError: the label table cannot be read.
    """
    files = [(path.name, path)]
    table: LabelTable | None = None
    beside = _labels_beside(path) if labels else None
    if beside is not None:
        table = read_labels(beside.read_bytes(), str(beside))
        files.append((beside.name, beside))
        names = tuple(dict.fromkeys((*names, *table.properties)))
        count = None if count is None else count + len(table.strays)
        remarks = [*(remarks or []), *table.remarks]

    def records() -> Iterator[Record]:
        if table is None:
            return entries()
        return table.join(entries(), str(path), keep_unlabelled)

    contents = contents_of(files, keep_unlabelled, labels)
    return Source(path, records, count, names, contents, remarks=tuple(remarks or ()))


def _labels_beside(path: Path) -> Path | None:
    """Return the label table beside a file of structures, or None.

    `id_prop.csv` belongs to the file if no other file there holds structures.
    """
    found = path.parent / PROPERTIES
    if not (found.is_symlink() or found.exists()):
        found = path.parent / ID_PROP
        if not (found.is_symlink() or found.exists()):
            return None
        others = (f.name for f in path.parent.iterdir() if not f.name.startswith("."))
        if any(n != path.name and not n.endswith((".csv", ".tsv")) for n in others):
            return None
    if reason := not_a_file(found):
        raise InputError(f"{found}: {reason}; mend or remove it")
    return found


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name


def open_plain(path: Path) -> IO[bytes]:
    """Open a file to read lines, compressed or not, whatever its name."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]


def _survey(path: Path, labels: bool) -> tuple[int, Survey]:
    """Count the lines, and survey their ids and labels."""
    count, survey = 0, Survey()
    try:
        with open_plain(path) as file:
            first = file.readline()
            entry = _loaded(first)
            survey.add(entry, labels)
            plain = isinstance(entry, dict) and entry.keys() <= _PLAIN
            if not (plain and not survey.ids.missing):
                count = bool(first)
                for line in file:
                    count += 1
                    survey.add(_loaded(line), labels)
            else:
                count, last = first.count(b"\n"), first[-1:]
                while block := file.read(1 << 20):
                    count += block.count(b"\n")
                    last = block[-1:]
                count += last not in (b"\n", b"")
    except (OSError, *_ENDS_EARLY):
        pass  # told when the lines are read
    return max(count, 1), survey


def _loaded(data: bytes) -> Any:
    """Return parsed JSON; None if it is invalid, which is reported elsewhere."""
    try:
        return load_json(data)
    except ValueError:
        return None


def _line_record(
    line: bytes,
    number: int,
    source: str,
    stem: str,
    names: tuple[str, ...],
    keys: tuple[str, ...],
) -> Record:
    """Return the record of one line, which is parsed here to find its id."""
    place = f"line {number}"
    try:
        entry = load_json(line)
    except ValueError as error:
        text = f"not valid JSON ({error}); mend or remove the line"
        return Record(source, place, problem=text)
    return entry_record(entry, line, source, f"{stem}-{number}", names, place, keys)
