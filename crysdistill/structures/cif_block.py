"""A data block of a CIF: tags in one spelling, values without quotes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import gemmi
import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.text import as_text

_CIF2_MARK = re.compile(r"#\\#CIF_2", re.IGNORECASE)
_CIF2_VALUES = re.compile(
    r'"""|\'\'\'|^\s*_\S+\s+[\[{]|^\s*[\[{]', re.MULTILINE
)  # triple quotes, lists and tables

Table = dict[str, list[str]]
"""The columns of one loop by tag, as written; a single pair is a column of length 1."""


class Block:
    """The tags of a data block.

    The older `_cell_length_a`, the dotted `_cell.length_a` of the newer dictionaries
    and any mixture of upper and lower case become one tag: lower case, with `_` for the
    dot.

    Args:
        block: as parsed by gemmi.
    """

    def __init__(self, block: gemmi.cif.Block) -> None:
        self.name = block.name
        self.loops: list[Table] = []
        pairs: Table = {}
        item: Any
        for item in block:
            if item.pair is not None:
                tag, value = item.pair
                pairs.setdefault(_spelled(tag), []).append(value)
            elif item.loop is not None:
                values, width = item.loop.values, item.loop.width()
                table: Table = {}
                for number, tag in enumerate(item.loop.tags):
                    table.setdefault(_spelled(tag), []).extend(values[number::width])
                self.loops.append(table)
        self.loops.append(pairs)

    def tags(self) -> Iterator[tuple[str, list[str]]]:
        """Yield every tag with its values as written."""
        for table in self.loops:
            yield from table.items()

    def column(self, tag: str) -> list[str]:
        """Return the values of a tag without their quotes, in the order of the file."""
        return [plain(v) for table in self.loops for v in table.get(tag, ())]

    def value(self, tag: str) -> str | None:
        """Return the one known value of a tag, or None.

        Raises:
            BadStructure: it has two different values.
        """
        found = [value for value in self.column(tag) if known(value)]
        if not found:
            return None
        for other in found[1:]:
            if other != found[0] and not number(other) == number(found[0]):
                raise BadStructure(
                    f"`{tag}` occurs twice, as `{found[0]}` and as `{other}`; remove "
                    "the wrong one"
                )
        return found[0]

    def first(self, tags: Sequence[str]) -> str | None:
        """Return the value of the first tag that has one."""
        return next((v for v in map(self.value, tags) if v is not None), None)


def _spelled(tag: str) -> str:
    return tag.lower().replace(".", "_")


def plain(value: str) -> str:
    """Return a value without its quotes."""
    return gemmi.cif.as_string(value).strip() if value[:1] in "'\";" else value


def known(value: str | None) -> bool:
    """Whether a value is given."""
    return value not in (None, "", "?", ".")


def number(value: str) -> float:
    """Read a CIF number, with or without its uncertainty; NaN if it is not a number."""
    try:
        return float(value)
    except ValueError:
        return gemmi.cif.as_number(plain(value))


def numbers(values: Sequence[str]) -> np.ndarray:
    """Read many CIF numbers."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return np.array([number(value) for value in values])


def parse_cif(data: bytes) -> gemmi.cif.Document:
    """Parse a file.

    Raises:
        BadStructure: it is empty, not a CIF, damaged, or written in CIF 2.0.
    """
    text = as_text(data).strip()
    if not text:
        raise BadStructure("empty file; get it again or remove it")
    if text.startswith("<"):
        raise BadStructure("a web page or XML, not a CIF; get the file again")
    if not text.isascii():  # such as accents in authors' names, which are not read
        text = text.encode("ascii", "replace").decode("ascii")
    try:
        return gemmi.cif.read_string(text + "\n", check_level=0)
    except (ValueError, RuntimeError) as error:
        place = re.match(r"[^:]*:(\d+)(?::\d+\(\d+\))?:? *(.*)", str(error))
        where, what = place.groups() if place else ("?", str(error))
        if _CIF2_MARK.match(text) or _CIF2_VALUES.search(text):
            raise BadStructure(
                f"CIF 2.0 syntax at line {where} (a list, a table or triple quotes), "
                "which is not read; write it as CIF 1.1"
            ) from None
        raise BadStructure(
            f"not a valid CIF at line {where} ({what}): damaged or cut short; get the "
            "file again"
        ) from None
