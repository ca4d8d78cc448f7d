"""Printing text on terminals of any encoding."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

import rich

_HANDLER = "crysdistill.nearest"
_NEAREST = {"Å": "A", "×": "x", "µ": "u", "−": "-", "–": "-", "…": "...", "→": "->"}


def print_anything() -> None:
    """Print text unchanged; if a terminal lacks a character, print a similar one.

    Half of the world's terminals have no `Å`; and `:smile:` may be part of a name.
    """
    codecs.register_error(_HANDLER, _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)
    rich.reconfigure(emoji=False)


def _nearest(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return ASCII for characters that an encoding lacks: `Å³` becomes `A3`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_ascii, text)), error.end


def _ascii(character: str) -> str:
    if character in _NEAREST:
        return _NEAREST[character]
    if 0xD800 <= ord(character) <= 0xDFFF:  # a byte in the name of a file
        return f"\\x{ord(character) & 0xFF:02x}"
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or "?"
