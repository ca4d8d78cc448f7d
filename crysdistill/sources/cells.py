"""Tables as programs and spreadsheets save them: encoding, separator, numbers."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence

from crysdistill.errors import InputError

Row = tuple[int, list[str]]
"""The line on which a row ends, and its cells without spaces around them."""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16 does, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
_WORDS = {"true": 1.0, "false": 0.0}
_LOOKED_AT = 100  # lines that tell the separator


def decode(data: bytes) -> str:
    """Return the text of a file in UTF-8, UTF-16 or UTF-32, else in Windows' code page.

    Spreadsheets write UTF-16 with a mark at the beginning. Some programs omit the mark;
    then every other byte of plain text is zero.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data.decode(name, "replace").replace("\0", "")
    some = data[:4096]
    for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = some[start::2]
        if len(half) > 1 and half.count(0) > 0.8 * len(half):
            return data.decode(name, "replace").replace("\0", "")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    return text.replace("\0", "")


def read_rows(data: bytes, path: str) -> tuple[list[Row], str]:
    """Return the rows of a table that are not empty, and the separator of its cells.

    Args:
        data: the content.
        path: the file, for messages.

    Raises:
        InputError: it is no table.
    """
    text = decode(data)
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r'"?sep=(.)"?\s*', first)  # a line for Excel alone
    separator = told[1] if told else _separator(text)
    lines = io.StringIO(rest if told else text, newline="")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator == " ")
    rows: list[Row] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((reader.line_num + bool(told), cells))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; mend it") from None
    return rows, separator


def _separator(text: str) -> str:
    """Return the separator: a tab or semicolon that all lines have, or a comma.

    If the lines have none of these, spaces separate the cells.
    """
    lines = [line for line in text.splitlines() if line.strip()][:_LOOKED_AT]
    plain = [re.sub(r'"[^"]*"', "", line) for line in lines]
    for mark in "\t;|":
        if plain and all(mark in line for line in plain):
            return mark
    if any("," in line for line in plain):
        return ","
    marks = [mark for mark in "\t;|" if any(mark in line for line in plain)]
    if marks:
        return marks[0]
    spaced = plain and all(re.fullmatch(r"\S+([ ]+\S+)+\s*", line) for line in plain)
    return " " if spaced else ","


def number_reader(
    cells: Iterable[str], separator: str
) -> Callable[[str], float | None]:
    """Return a function that reads a cell as a number; None for any other cell.

    In much of Europe 1,25 is five quarters. In other places 1,250 is more than a
    thousand. If a table does not show which is meant, neither is read.

    Args:
        cells: the cells with labels.
        separator: the separator of the cells.
    """
    cells = list(cells)
    commas = [cell for cell in cells if _COMMA.fullmatch(cell)]
    decimal = (
        bool(commas)
        and not any(map(_POINT.fullmatch, cells))
        and (separator == ";" or not all(map(_THOUSANDS.fullmatch, commas)))
    )

    def read(cell: str) -> float | None:
        if decimal and _COMMA.fullmatch(cell):
            cell = cell.replace(",", ".")
        return number(cell)

    return read


def number(text: str) -> float | None:
    """Return the number in a text, NaN and infinity included; None for other text.

    `true` and `false` are 1 and 0.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def is_finite(text: str) -> bool:
    """Whether a text is a finite number."""
    found = number(text)
    return found is not None and math.isfinite(found)


def without_empty_columns(rows: Sequence[Row]) -> list[Row]:
    """Return rows without the empty columns at their end."""
    width = max((len(_trimmed(cells)) for _, cells in rows), default=0)
    return [(line, cells[:width]) for line, cells in rows]


def _trimmed(cells: list[str]) -> list[str]:
    end = len(cells)
    while end and not cells[end - 1]:
        end -= 1
    return cells[:end]
