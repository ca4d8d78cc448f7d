"""The text of a file in any encoding, and the format that it seems to have."""

from __future__ import annotations

import codecs
import re

from crysdistill.errors import BadStructure

_MARKS = (  # the longest first, because a UTF-32 mark begins like a UTF-16 mark
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE = 400  # bytes; enough to see zeros between letters
_PASTED = str.maketrans(
    {"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-"}
    | dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f", " ")
)
_END_OF_FILE = "\x1a\0"  # DOS ends text with the first, some disks with the second
_FORTRAN = re.compile(rb"(?<![\w.])([+-]?(?:\d+\.?\d*|\.\d+))[dD]([+-]?\d+)(?![\w.])")
_CIF = re.compile(r"^\s*data_\S*\s", re.MULTILINE | re.IGNORECASE)
_CIF_TAG = re.compile(r"^\s*_(?:cell|atom_site)[_.]", re.MULTILINE | re.IGNORECASE)


def as_text(data: bytes) -> str:
    """Decode a file of UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Anything else is read as the code page of Western Windows; if it is another one,
    only authors' names suffer. Lines end as on Unix. Special minus signs and spaces
    from word processors become plain ones.

    Raises:
        BadStructure: it starts like UTF-16 or UTF-32 but is neither.
    """
    text = _decoded(data)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = text.translate(_PASTED)
    return text.rstrip(_END_OF_FILE)


def _decoded(data: bytes) -> str:
    name = _encoding(data)
    if name is not None:
        try:
            return data.decode(name).removeprefix("\ufeff")
        except UnicodeDecodeError:
            raise BadStructure(
                f"starts like {name[:6].upper()} but is not: damaged or cut short; "
                "save it as UTF-8"
            ) from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return data.removeprefix(codecs.BOM_UTF8).decode("cp1252", "replace")


def _encoding(data: bytes) -> str | None:
    """Return the encoding of text with two or four bytes a letter; None for others."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    sample = data[:_SAMPLE]
    if 0 not in sample:
        return None
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    many = len(sample) // 8  # most letters have a zero beside them
    if odd > many > even:
        return "utf-16-le"
    return "utf-16-be" if even > many > odd else None


def format_of(data: bytes, named: str) -> str:
    """Return the format of a file by its content, whatever its name says.

    Args:
        data: the content.
        named: the format by its name, `cif` or `poscar`; returned if it may be right.
    """
    if named == "cif" and b"data_" in data:
        return named
    try:
        return content_format(as_text(data)) or named
    except BadStructure:
        return named  # the parser will report it


def plain_numbers(data: bytes) -> bytes:
    """Write Fortran's `1.5D0` as `1.5E0`, leaving other words unchanged."""
    return _FORTRAN.sub(rb"\1E\2", data)


def content_format(text: str) -> str | None:
    """Return `cif` or `poscar` for text that can be nothing else; None if unsure."""
    if _CIF.search(text) and _CIF_TAG.search(text):
        return "cif"
    vectors = [line.split()[:3] for line in text.splitlines()[2:5]]
    if len(vectors) == 3 and all(
        len(words) == 3 and all(map(_is_number, words)) for words in vectors
    ):
        return "poscar"
    return None


def _is_number(word: str) -> bool:
    try:
        float(word.replace("D", "E").replace("d", "e"))
    except ValueError:
        return False
    return True
