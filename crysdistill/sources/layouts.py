"""The layouts in which a JSON file may hold many structures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from crysdistill.errors import BadStructure
from crysdistill.sources.records import layout_of, structure_key

_LISTS = ("data", "structures", "entries", "materials", "crystals", "results")
"""Keys that may hold the list of entries of a file."""


class Entry(NamedTuple):
    """One entry of a file.

    Args:
        name: the id for an entry that has none itself.
        content: the parsed JSON of the entry.
        made_up: whether the program made up the name.
    """

    name: str
    content: Any
    made_up: bool = False


def entries_of(content: Any, stem: str) -> Iterator[Entry]:
    """Yield the entries of a JSON file.

    Args:
        content: the parsed JSON of the file.
        stem: the stem of the file name.

    Raises:
        BadStructure: the layout is not one of those that are read.
    """
    if isinstance(content, list):
        yield from _list(content, stem)
    elif not isinstance(content, dict):
        raise BadStructure("neither a list nor a dictionary of structures; mend it")
    elif {"ids", "nextid"} <= content.keys():
        raise BadStructure(
            "an ASE database in JSON; convert it with `ase db FILE.json --insert-into "
            "FILE.db`"
        )
    elif {"columns", "data"} <= content.keys():
        yield from _split(content, stem)
    elif column := _structure_column(content):
        yield from _columns(content, column, stem)
    elif _is_one(content):
        yield Entry(stem, content)
    elif listed := _only_list(content):
        yield from _list(listed, stem)
    else:
        made_up = is_running(content)
        for name, entry in content.items():
            yield Entry(str(name), entry, made_up)


def is_running(names: Iterable[Any]) -> bool:
    """Whether names only number the rows: 0, 1, 2, ... or 1, 2, 3, ..."""
    names = [str(name) for name in names]
    count = len(names)
    return any(
        names == [str(number) for number in range(start, start + count)]
        for start in (0, 1)
    )


def matbench_id(task: str, number: int, count: int) -> str:
    """Return the official id of an entry, such as `mb-phonons-0001`.

    Args:
        task: the task, such as `matbench_phonons`.
        number: the number of the row, from 0.
        count: the number of rows.
    """
    name = task.removeprefix("matbench_").replace("_", "-")
    return f"mb-{name}-{number + 1:0{len(str(count))}d}"


def _list(content: list[Any], stem: str) -> Iterator[Entry]:
    for number, entry in enumerate(content):
        yield Entry(f"{stem}-{number}", entry, True)


def _is_one(content: Mapping[str, Any]) -> bool:
    """Whether a dictionary is one structure, or one entry."""
    if content.keys() & {"sites", "structure", "@class", "atoms", "lattice_mat"}:
        return True
    if "lattice" in content and not isinstance(content["lattice"], dict):
        return True
    key = structure_key(content)
    inner = content.get(key) if key is not None else None
    return isinstance(inner, dict) and layout_of(inner) is not None


def _only_list(content: Mapping[str, Any]) -> list[Any]:
    """Return the list of entries inside a dictionary, such as under `data`."""
    for key in _LISTS:
        found = content.get(key)
        if isinstance(found, list) and all(isinstance(e, dict) for e in found):
            return found
    return []


def _row(name: Any, entry: dict[str, Any], stem: str) -> Entry:
    """Return a row of a table; a number in the index is no id."""
    if isinstance(name, str) and not re.fullmatch(r"\d+", name):
        return Entry(name, entry)
    return Entry(f"{stem}-{name}", entry, True)


def _split(content: Mapping[str, Any], stem: str) -> Iterator[Entry]:
    """Yield the rows of pandas' `split` layout, which matbench uses."""
    columns, data = content["columns"], content["data"]
    if not (isinstance(columns, list) and all(isinstance(c, str) for c in columns)):
        raise BadStructure("a table whose `columns` are no list of names; mend it")
    if structure_key(dict.fromkeys(columns)) is None:
        raise BadStructure("a table without a column `structure`; add it")
    if not isinstance(data, list):
        raise BadStructure("a table whose `data` is no list of rows; mend it")
    count = len(data)
    names = content.get("index", range(count))
    if not isinstance(names, list | range) or len(names) != count:
        raise BadStructure(f"a table whose `index` does not name its {count} rows")
    if re.fullmatch(r"matbench_\w+", stem) and list(names) == list(range(count)):
        names = [matbench_id(stem, number, count) for number in names]
    for name, row in zip(names, data, strict=True):
        if isinstance(row, list) and len(row) == len(columns):
            yield _row(name, dict(zip(columns, row, strict=True)), stem)
        else:
            yield _row(name, {"problem": "a row with other cells than columns"}, stem)


def _structure_column(content: Mapping[str, Any]) -> str | None:
    """Return the structure column of a table written by columns, or None."""
    key = structure_key(content)
    column = content.get(key) if key is not None else None
    if isinstance(column, list):
        return key
    if isinstance(column, dict) and column and layout_of(column) is None:
        described = [x for x in column.values() if isinstance(x, dict | str)]
        if len(described) == len([x for x in column.values() if x is not None]):
            return key
    return None


def _columns(content: Mapping[str, Any], column: str, stem: str) -> Iterator[Entry]:
    """Yield the rows of pandas' `columns` layout: a dictionary or list per column."""
    structures = content[column]
    index = range(len(structures)) if isinstance(structures, list) else structures
    for name in index:
        row = {key: _cell(values, name) for key, values in content.items()}
        yield _row(name, row, stem)


def _cell(values: Any, name: Any) -> Any:
    if isinstance(values, dict):
        return values.get(name)
    if isinstance(values, list) and isinstance(name, int) and name < len(values):
        return values[name]
    return None
