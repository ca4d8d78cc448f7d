"""What a report shows: sections with sentences, tables and pictures.

A table is kept as numbers and as texts: the numbers go to CSV, the texts to the page,
to Markdown and to LaTeX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from markupsafe import Markup

_LONG = 14  # rows of a table that the page shows at once


@dataclass(frozen=True)
class Exhibit:
    """A table.

    Args:
        name: the stem of its files.
        caption: what it shows.
        data: the numbers, one row for each row of the table.
        shown: the same as texts, under the heads of the page; the first column names
            the row.
        tones: the tone of cells, by row and column: better, worse, unsure, ...
        words: the columns with words, which stand on the left.
    """

    name: str
    caption: str
    data: pd.DataFrame
    shown: pd.DataFrame
    tones: Mapping[tuple[int, int], str] = field(default_factory=dict)
    words: frozenset[int] = frozenset({0})

    @property
    def long(self) -> bool:
        """Whether the page shows it only when asked."""
        return self.name != "overview" and len(self.shown) > _LONG


@dataclass(frozen=True)
class Picture:
    """A figure, with the stem of its file; a wide one has a line of its own."""

    name: str
    svg: Markup
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: its head.
        note: what is shown, in one or two sentences.
        said: findings in sentences.
        exhibits: tables.
        pictures: figures.
        after: a sentence below the figures.
    """

    title: str
    note: str = ""
    said: Sequence[str] = ()
    exhibits: Sequence[Exhibit] = ()
    pictures: Sequence[Picture] = ()
    after: str = ""


@dataclass(frozen=True)
class Column:
    """A column of an exhibit.

    Args:
        head: its head on the page.
        text: returns the text of a row.
        word: whether it holds words.
    """

    head: str
    text: Callable[[Any], str]
    word: bool = False


def exhibit(
    name: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    tone: Callable[[Mapping[str, Any]], str] | None = None,
    toned: int = -1,
) -> Exhibit:
    """Return a table of rows of numbers.

    Args:
        name: the stem of its files.
        caption: what it shows.
        rows: the numbers by name.
        columns: what the page shows of them.
        tone: returns the tone of a row.
        toned: the column that has the tone.
    """
    shown = pd.DataFrame(
        [[column.text(row) for column in columns] for row in rows],
        columns=[column.head for column in columns],
        dtype=object,
    )
    words = {0} | {i for i, column in enumerate(columns) if column.word}
    place = toned % len(columns)
    tones = {(i, place): tone(row) for i, row in enumerate(rows)} if tone else {}
    return Exhibit(
        name, caption, pd.DataFrame(list(rows)), shown, tones, frozenset(words)
    )


def stem(*parts: object) -> str:
    """Return a name for files: small letters, digits and dashes."""
    text = "-".join(str(part) for part in parts).lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:80] or "x"
