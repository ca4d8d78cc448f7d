"""Reading label tables: finding the columns that hold ids and labels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from crysdistill.errors import InputError, did_you_mean
from crysdistill.sources.cells import (
    Row,
    number,
    number_reader,
    read_rows,
    without_empty_columns,
)
from crysdistill.sources.identity import find_id_column, same_name
from crysdistill.sources.labels import (
    ID_COLUMN,
    ID_PROP,
    PROPERTIES,
    Label,
    LabelTable,
)

_NO_NAME = re.compile(r"|Unnamed: \d+|index", re.IGNORECASE)


@dataclass
class _Sheet:
    """The rows of a table below its header.

    Args:
        rows: the lines and cells.
        header: the names of the columns; None if there is no header.
        ids: the number of the column that holds ids.
    """

    rows: list[Row]
    header: list[str] | None
    ids: int


def read_labels(
    data: bytes,
    path: str,
    known: Container[str] = (),
    rename: Callable[[str], str] = str,
) -> LabelTable:
    """Read a table of labels.

    Each row of `id_prop.csv` has an id and one label or more. Most files have no
    header: the first row is a header if its first cell names no structure and its
    labels are words. `properties.csv` has a header with `material_id` or another name
    of an id. A table of any other name may be either. An index column of pandas and
    empty columns at the end are ignored.

    Args:
        data: the content.
        path: the file; its name decides how it is read.
        known: the ids of the structures.
        rename: maps an id as written to the id of the structure.

    Raises:
        InputError: it is not a table, or `properties.csv` has no header with an id, or
            its header repeats a name.
    """
    name = re.split(r"[/\\]", path)[-1]
    found, separator = read_rows(data, path)
    rows = without_empty_columns(found)
    sheet = _sheet(rows, path, name, known, rename)
    labels = _label_columns(sheet, path)
    read = number_reader(_cells(sheet.rows, labels), separator)
    remarks = []
    if sheet.header is not None and len(labels) > 1:  # some columns may be notes
        words = [c for c in labels if _holds_words(sheet.rows, c, read)]
        labels = [c for c in labels if c not in words or len(words) == len(labels)]
        remarks = [
            f"{path}: column `{sheet.header[c]}` holds text, no numbers: left out"
            for c in words
            if c not in labels
        ]
    names = _names(sheet, labels)
    partial = name != ID_PROP and sheet.header is not None
    table = LabelTable(name, tuple(names.values()), {}, [], partial, remarks)
    width = (
        len(sheet.header) if sheet.header else max([sheet.ids, *labels], default=0) + 1
    )
    for line, cells in sheet.rows:
        written = cells[sheet.ids] if sheet.ids < len(cells) else ""
        material_id = same_name(rename(written))
        if not material_id:
            table.strays.append((f"line {line}", f"no id in {name}; add it"))
        elif material_id in table.labels:
            earlier = table.labels[material_id].line
            reason = (
                f"a second row in {name} (line {line}, the first is line {earlier})"
            )
            table.strays.append((material_id, f"{reason}; remove one"))
        elif any(cells[width:]):
            reason = (
                f"{len(cells)} cells in line {line} of {name}, but {width} columns; "
                "mend the row"
            )
            table.labels[material_id] = Label(line, problem=reason)
        else:
            table.labels[material_id] = _label(line, cells, names, read, table)
    return table


def _sheet(
    rows: list[Row],
    path: str,
    name: str,
    known: Container[str],
    rename: Callable[[str], str],
) -> _Sheet:
    """Find header and ids."""
    while rows and _is_comment(rows, known, rename):
        rows = rows[1:]
    cells = list(rows[0][1]) if rows else []
    if cells:
        cells[0] = cells[0].lstrip("# ")
    if name == PROPERTIES or _is_header(cells, known, rename):
        column = find_id_column(cells)
        if column is None and name == PROPERTIES:
            raise InputError(
                f"{path}: no column `{ID_COLUMN}` in its first line"
                f"{did_you_mean(ID_COLUMN, cells)}"
            )
        called = 0 if column is None else cells.index(column)
        return _Sheet(rows[1:], cells, _id_number(rows[1:], known, rename, called))
    return _Sheet(rows, None, _id_number(rows, known, rename))


def _is_comment(
    rows: Sequence[Row], known: Container[str], rename: Callable[[str], str]
) -> bool:
    """Whether the first row is a line of text above a table."""
    cells = [cell for cell in rows[0][1] if cell]
    return (
        cells[0].startswith("#")
        and len(rows) > 1
        and len(cells) < max(2, len(rows[1][1]))
        and same_name(rename(cells[0])) not in known
    )


def _is_header(
    cells: list[str], known: Container[str], rename: Callable[[str], str]
) -> bool:
    """Whether the first row of a table holds names, not an id and labels."""
    rest = [cell for cell in cells[1:] if cell]
    if not rest or any(number(cell) is not None for cell in rest):
        return False
    if any(same_name(rename(cell)) in known for cell in cells if cell):
        return False
    if len(set(cells)) < len(cells):
        return False
    if not cells[0] or find_id_column([cells[0]]) or _NO_NAME.fullmatch(cells[0]):
        return True
    words = all(re.match(r"[^\W\d]", cell) for cell in rest)
    return words and not re.search(r"\d", cells[0])


def _id_number(
    rows: Sequence[Row],
    known: Container[str],
    rename: Callable[[str], str],
    called: int = 0,
) -> int:
    """Return the column in which most cells name a structure.

    If no cell does, return the column with the name of an id, else the first column.
    """
    width = max((len(cells) for _, cells in rows), default=1)
    hits = [
        sum(bool(c) and same_name(rename(c)) in known for c in _cells(rows, [column]))
        for column in range(max(width, called + 1))
    ]
    return called if hits[called] == max(hits) else hits.index(max(hits))


def _label_columns(sheet: _Sheet, path: str) -> list[int]:
    """Return the columns that are neither ids nor an index.

    Raises:
        InputError: a column has no name, or the name of another column.
    """
    width = max(
        [len(sheet.header or ()), *(len(cells) for _, cells in sheet.rows[:1])],
        default=0,
    )
    found = [c for c in range(max(width, 2)) if c != sheet.ids]
    found = [c for c in found if not _is_index(sheet, c)]
    if sheet.header is None:
        return found
    header = sheet.header
    found = [c for c in found if c < len(header)]
    for c in found:
        if not header[c] or header.count(header[c]) > 1:
            raise InputError(
                f"{path}: the column name `{header[c]}` is empty or occurs twice; give "
                "every column its own name"
            )
    return found


def _is_index(sheet: _Sheet, column: int) -> bool:
    """Whether a column numbers the rows, or has neither name nor content."""
    cells = _cells(sheet.rows, [column])
    if sheet.header is not None:
        name = sheet.header[column] if column < len(sheet.header) else ""
        if not _NO_NAME.fullmatch(name):
            return False
        if not any(cells):
            return True
    elif column > 0 or sheet.ids == 0:
        return False
    return any(
        cells == [str(number) for number in range(start, start + len(cells))]
        for start in (0, 1)
    )


def _cells(rows: Sequence[Row], columns: Sequence[int]) -> list[str]:
    """Return the cells of some columns; "" where a row is short."""
    return [
        cells[column] if column < len(cells) else ""
        for _, cells in rows
        for column in columns
    ]


def _holds_words(
    rows: Sequence[Row], column: int, read: Callable[[str], float | None]
) -> bool:
    """Whether a column holds text and not a single number."""
    cells = [cell for cell in _cells(rows, [column]) if cell]
    return bool(cells) and all(read(cell) is None for cell in cells)


def _names(sheet: _Sheet, labels: Sequence[int]) -> dict[int, str]:
    """Return the names of labels by column."""
    if sheet.header is not None:
        return {column: sheet.header[column] for column in labels}
    if len(labels) <= 1:
        return dict.fromkeys(labels, "target")
    return {column: f"target_{n}" for n, column in enumerate(labels, start=1)}


def _label(
    line: int,
    cells: list[str],
    names: dict[int, str],
    read: Callable[[str], float | None],
    table: LabelTable,
) -> Label:
    """Read one row."""
    values: dict[str, float] = {}
    for column, name in names.items():
        cell = cells[column] if column < len(cells) else ""
        if not cell:
            continue
        value = read(cell)
        if value is None or not math.isfinite(value):
            advice = "; leave it empty where it is not known" if table.partial else ""
            return Label(
                line,
                problem=f"`{name}` is `{cell}` in {table.name} (line {line}), not a "
                f"finite number; mend it{advice}",
            )
        values[name] = value
    return Label(line, values)
