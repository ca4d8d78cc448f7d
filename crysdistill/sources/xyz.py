"""Extended XYZ, cut into frames that are parsed later by a worker."""

from __future__ import annotations

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crysdistill.sources.identity import is_id_key
from crysdistill.sources.tables import open_plain
from crysdistill.structures.text import plain_numbers

if TYPE_CHECKING:
    from ase import Atoms

_ATOM = re.compile(rb"[A-Za-z]\w{0,3}( [+-]?[0-9.]+([eE][+-]?[0-9]+)?){3}")
_LATTICE = re.compile(rb'Lattice="[^"]*"')
_FORTRAN_LABEL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)[dD][+-]?\d+")


@dataclass(frozen=True)
class Frame:
    """One structure of a file, before it is checked.

    Args:
        content: the atoms that ASE read, or the text of a frame of extended XYZ.
        info: the id and labels beside the structure.
        problem: the reason why there is no content; no frame follows.
    """

    content: Atoms | bytes | None
    info: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def extxyz_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a file; if reading fails, the last frame holds the reason.

    ASE looks at all frames before it returns the first, so a damaged last frame would
    cost all the others.
    """
    from ase.io.extxyz import key_val_str_to_dict

    line_number = 0
    whole: Frame | None = None  # held until the next line shows that it is complete
    with open_plain(path) as file:
        try:
            for line in file:
                line_number += 1
                if line_number == 1:
                    if line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                        yield Frame(None, problem="UTF-16 text; save it as UTF-8")
                        return
                    line = line.removeprefix(BOM_UTF8)
                if not line.strip():
                    continue
                if not line.strip().isdigit():
                    yield from _not_a_frame(line, line_number, whole)
                    return
                if whole is not None:
                    yield whole
                    whole = None
                atoms = int(line)
                lines = [line]
                for _ in range(atoms + 1):
                    lines.append(file.readline())
                    if not lines[-1]:
                        raise EOFError
                line_number += atoms + 1
                lines[1] = _LATTICE.sub(lambda m: plain_numbers(m[0]), lines[1])
                comment = lines[1].decode("utf-8", "replace").strip()
                try:
                    info = key_val_str_to_dict(comment) if comment else {}
                except Exception:  # reported when the frame is parsed
                    info = {}
                info = {key: _fortran(value) for key, value in info.items()}
                info |= _ids_as_written(comment, info)
                whole = Frame(b"".join(lines), info)
            if whole is not None:
                yield whole
        except (OSError, EOFError):
            if whole is not None:
                yield whole
            yield Frame(
                None,
                problem=f"ends early, in the frame at line {line_number}; get the file "
                "again",
            )


def _not_a_frame(line: bytes, number: int, before: Frame | None) -> Iterator[Frame]:
    """Yield the problem of a line that should begin a frame.

    An atom in that line belongs to the frame before, whose count is too small.
    """
    start = line.strip()[:40].decode("utf-8", "replace")
    words = plain_numbers(line).split()
    if before is not None:
        if _ATOM.match(b" ".join(words)):
            yield Frame(
                None,
                before.info,
                f"has more atoms than its first line counts (line {number} is "
                f"`{start}`); mend either",
            )
            return
        yield before
    problem = (
        f"line {number} is `{start}`, not the number of atoms of a frame; mend it from "
        "there on"
    )
    yield Frame(None, problem=problem)


def _fortran(value: Any) -> Any:
    """Return the number in a label such as `-1.5D0`; return other labels unchanged."""
    if isinstance(value, str) and _FORTRAN_LABEL.fullmatch(value):
        return float(value.upper().replace("D", "E"))
    return value


def _ids_as_written(comment: str, info: Mapping[str, Any]) -> dict[str, str]:
    """Return ids with their leading zeros: ASE takes `id=007` for the number 7."""
    found = {}
    for key in filter(is_id_key, map(str, info)):
        match = re.search(rf'(?:^|\s){re.escape(key)}=(?:"([^"]*)"|(\S+))', comment)
        if match:
            found[key] = match[1] or match[2] or ""
    return found
