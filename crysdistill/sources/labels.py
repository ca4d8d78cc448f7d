"""Label tables: `id_prop.csv` and `properties.csv`, and joining them to structures."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace

from crysdistill.errors import InputError, did_you_mean
from crysdistill.sources.records import Record

ID_PROP = "id_prop.csv"
PROPERTIES = "properties.csv"
ID_COLUMN = "material_id"


@dataclass(frozen=True, slots=True)
class Label:
    """One row of a table.

    Args:
        line: where it stands.
        values: the known labels by name.
        problem: why its structure must go to quarantine.
    """

    line: int
    values: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class LabelTable:
    """The labels of a source.

    Args:
        name: of the file.
        properties: the names of its columns.
        labels: by material id, the first row of each.
        strays: ids and reasons of rows that belong to no structure: repeated ones.
    """

    name: str
    properties: tuple[str, ...]
    labels: dict[str, Label]
    strays: list[tuple[str, str]]

    @property
    def partial(self) -> bool:
        """Whether an empty cell may stand for a value that is not known."""
        return self.name == PROPERTIES

    def join(
        self, records: Iterator[Record], source: str, keep_unlabelled: bool
    ) -> Iterator[Record]:
        """Give records their labels; every row becomes part of one record, or one.

        Args:
            records: without labels.
            source: its name, for rows that no structure belongs to.
            keep_unlabelled: whether a structure without a label is kept.
        """
        seen: set[str] = set()
        for record in records:
            seen.add(record.material_id)
            label = self.labels.get(record.material_id)
            if record.problem is not None:
                yield record
            elif label is None:
                yield record if keep_unlabelled else record.refuse(self._no_row())
            elif label.problem is not None:
                yield record.refuse(label.problem)
            elif label.values or self.partial or keep_unlabelled:
                yield replace(record, properties={**record.properties, **label.values})
            else:
                yield record.refuse(
                    f"no label in {self.name} (line {label.line}); fill it in or build "
                    "with `--keep-unlabelled`"
                )
        for material_id, label in self.labels.items():
            if material_id not in seen:
                reason = (
                    f"in {self.name} (line {label.line}), but there is no such "
                    "structure; add it or remove the row"
                )
                yield Record(source, material_id, problem=reason)
        for material_id, reason in self.strays:
            yield Record(source, material_id, problem=reason)

    def orphans(self, known: Container[str]) -> int:
        """Return how many rows have no structure among `known`."""
        return sum(material_id not in known for material_id in self.labels)

    def _no_row(self) -> str:
        empty = " (empty cells mean not known)" if self.partial else ""
        return (
            f"no row in {self.name}; add one{empty} or build with `--keep-unlabelled`"
        )


def read_labels(
    data: bytes,
    path: str,
    known: Container[str] = (),
    rename: Callable[[str], str] = str,
) -> LabelTable:
    """Read `id_prop.csv` or `properties.csv`.

    `id_prop.csv` has the id and one label or more in each row, and mostly no header:
    the first row is one if no structure is called like its first cell and its labels
    are words. `properties.csv` has a header with `material_id`.

    Args:
        data: the content.
        path: of the file; its name decides how it is read.
        known: the ids of the structures.
        rename: from an id as written to the id of the structure.

    Raises:
        InputError: `properties.csv` has no header with `material_id`, or repeats a
            name.
    """
    name = re.split(r"[/\\]", path)[-1]
    text = data.decode("utf-8-sig", "replace").replace("\0", "")
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; mend it") from None
    header = _header(rows, path, known, rename)
    if header is None:
        width = len(rows[0][1]) - 1 if rows else 1
        names = ["target"] if width <= 1 else [f"target_{n + 1}" for n in range(width)]
        header = [ID_COLUMN, *names]
    else:
        rows = rows[1:]
    column = header.index(ID_COLUMN)
    properties = tuple(n for i, n in enumerate(header) if i != column)
    table = LabelTable(name, properties, {}, [])
    for line, cells in rows:
        material_id = rename(cells[column]) if column < len(cells) else ""
        if not material_id:
            table.strays.append((f"line {line}", f"no id in {name}; add it"))
        elif material_id in table.labels:
            earlier = table.labels[material_id].line
            reason = (
                f"a second row in {name} (line {line}, the first is line {earlier})"
            )
            table.strays.append((material_id, f"{reason}; remove one"))
        else:
            table.labels[material_id] = _label(line, cells, header, column, table)
    return table


def _header(
    rows: list[tuple[int, list[str]]],
    path: str,
    known: Container[str],
    rename: Callable[[str], str],
) -> list[str] | None:
    """Return the names of the columns, the id's being `ID_COLUMN`; None if unnamed."""
    cells = rows[0][1] if rows else []
    if re.split(r"[/\\]", path)[-1] != ID_PROP:
        if ID_COLUMN not in cells:
            raise InputError(
                f"{path}: no column `{ID_COLUMN}` in its first line"
                f"{did_you_mean(ID_COLUMN, cells)}"
            )
        twice = [cell for cell in cells if cells.count(cell) > 1 or not cell]
        if twice:
            raise InputError(
                f"{path}: the column name `{twice[0]}` is empty or stands twice; give "
                "every column a name of its own"
            )
        return cells
    words = cells[1:] and all(re.match(r"[^\W\d]", cell) for cell in cells[1:])
    numbers = any(_value(cell) is not None for cell in cells[1:])
    identifies = cells and (rename(cells[0]) in known or re.search(r"\d", cells[0]))
    if not words or numbers or identifies or len(set(cells)) < len(cells):
        return None
    return [ID_COLUMN, *cells[1:]]


def _value(cell: str) -> float | None:
    """Return the number in a cell, NaN and infinity included; None if it is none."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _label(
    line: int, cells: list[str], header: list[str], column: int, table: LabelTable
) -> Label:
    """Read one row."""
    if len(cells) > len(header) and any(cells[len(header) :]):
        return Label(
            line,
            problem=f"{len(cells)} cells in line {line} of {table.name}, but "
            f"{len(header)} columns; mend the row",
        )
    values: dict[str, float] = {}
    for number, (name, cell) in enumerate(zip(header, cells, strict=False)):
        if number == column or not cell:
            continue
        value = _value(cell)
        if value is None or not math.isfinite(value):
            advice = "; leave it empty where it is not known" if table.partial else ""
            return Label(
                line,
                problem=f"`{name}` is `{cell}` in {table.name} (line {line}), not a "
                f"finite number; mend it{advice}",
            )
        values[name] = value
    return Label(line, values)
