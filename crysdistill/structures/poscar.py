"""POSCAR and CONTCAR, read as VASP does, but without guessing elements.

This reader exists because pymatgen multiplies Cartesian coordinates by a negative
scale, and reads neither three scale factors, nor Fortran's exponents, nor comments
after numbers.

Source: the description of POSCAR in the VASP wiki, https://www.vasp.at/wiki/POSCAR.
"""

from __future__ import annotations

import math
import re

import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.crystal import (
    Crystal,
    species_number,
    unknown_element,
    validate,
)
from crysdistill.structures.elements import symbols
from crysdistill.structures.readers import fractional
from crysdistill.structures.text import as_text

_COMMENT = re.compile(r"[#!].*")
_RUN_TOGETHER = re.compile(r"(?<=[\d.])-(?=[\d.])")  # 0.25-0.50-0.75
_NOT_WHOLE = "not a whole POSCAR: a line or a number is missing; get the file again"


def read_poscar(data: bytes, material_id: str) -> Crystal:
    """Read a POSCAR or CONTCAR that names its elements.

    Elements are in line 6, or after each coordinate. A negative scale is the volume;
    three scales stretch x, y and z. Anything after the atoms is ignored.

    Args:
        data: the content of the file.
        material_id: the name of the crystal.

    Raises:
        BadStructure: it is damaged, does not name its elements, or cannot be a crystal.
    """
    text = as_text(data)
    if not text.strip():
        raise BadStructure("empty file; get it again or remove it")
    title, *rest = text.splitlines()
    lines = [title, *(_COMMENT.sub("", line) for line in rest)]
    try:
        vectors = [_three_numbers(lines, row) for row in (2, 3, 4)]
        cell, factors = _scaled(lines[1], np.array(vectors))
        species, counts, row = _species(lines)
        if lines[row].split()[0][0] in "sS":
            row += 1
        first, cartesian = row + 1, _is_cartesian(lines, row)
        atoms = sum(counts)
        coordinates = [_three_numbers(lines, n) for n in range(first, first + atoms)]
    except IndexError:
        raise BadStructure(_NOT_WHOLE) from None
    _check_end(lines[first + atoms :], atoms)
    ends = [_symbol_at_end(line) for line in lines[first : first + atoms]]
    numbers = [z for z, n in zip(species, counts, strict=False) for _ in range(n)]
    if not species:
        if not all(ends):
            raise BadStructure("no element symbols (VASP 4); add them as line 6")
        numbers = ends
    for n, (number, end) in enumerate(zip(numbers, ends, strict=True)):
        if end and end != number:
            raise BadStructure(
                f"atom {n} is {symbols()[number]} by line 6 but {symbols()[end]} by "
                f"the word behind its coordinates (line {first + n + 1}); mend either"
            )
    frac = np.array(coordinates, np.float64).reshape(-1, 3)
    if cartesian:
        frac = fractional(frac * factors, cell)
    return validate(Crystal(material_id, np.array(numbers, np.int64), frac, cell))


def _number(word: str) -> float | None:
    """Read a number as Fortran writes it; None if it is not a number."""
    try:
        return float(re.sub("[dD]", "e", word)) if "_" not in word else None
    except ValueError:
        return None


def _leading_numbers(line: str) -> list[float]:
    """Return the numbers at the start of a line."""
    found: list[float] = []
    for word in line.split():
        value = _number(word)
        if value is None:
            break
        found.append(value)
    return found


def _three_numbers(lines: list[str], row: int) -> list[float]:
    """Return the vector at the start of a line; comments or flags may follow."""
    words = lines[row].split()
    found = _leading_numbers(lines[row])
    if len(found) < 3 and len(words) < 3:
        found = _leading_numbers(_RUN_TOGETHER.sub(" -", lines[row]))
    if len(found) >= 3:
        return found[:3]
    if len(words) < 3:
        raise BadStructure(_NOT_WHOLE)
    raise BadStructure(
        f"line {row + 1} is `{lines[row].strip()[:40]}`, not three numbers; mend it"
    )


def _scaled(line: str, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cell (3, 3) and the factors (3,) for Cartesian coordinates."""
    scales = np.array(_leading_numbers(line))
    if len(scales) not in (1, 3) or not np.isfinite(scales).all():
        raise BadStructure(
            f"line 2 is `{line.strip()[:40]}`, not one scale factor or three; mend it"
        )
    if len(scales) == 3 and not (scales > 0).all():
        raise BadStructure(
            f"line 2 is `{line.strip()[:40]}`: of three scale factors none may be "
            "negative or 0; mend it"
        )
    if scales[0] < 0:
        finite = np.isfinite(vectors).all()
        volume = abs(float(np.linalg.det(vectors))) if finite else 0.0
        if not 0 < volume < math.inf:
            raise BadStructure("its lattice vectors span no volume; mend lines 3 to 5")
        scales = np.array([(-scales[0] / volume) ** (1 / 3)])
    return vectors * scales, np.broadcast_to(scales, 3)


def _species(lines: list[str]) -> tuple[list[int], list[int], int]:
    """Return the elements, their numbers of atoms, and the next row.

    VASP breaks both lines after twenty entries. Without elements (VASP 4) the first
    list is empty.
    """
    row = 5
    names: list[str] = []
    while not _leading_numbers(lines[row]):
        words = lines[row].split()
        if not words or row > 5 + len(names):
            raise BadStructure(_NOT_WHOLE)
        names += words
        row += 1
    species = [species_number(re.split("[_/]", name)[0]) for name in names]
    if 0 in species:
        raise BadStructure(unknown_element("line 6", names[species.index(0)]))
    counts = _leading_numbers(lines[row])
    row += 1
    while len(counts) < len(names) and _leading_numbers(lines[row]):
        counts += _leading_numbers(lines[row])
        row += 1
    wrong = [n for n in counts if not 0 <= n <= 1e6 or n != int(n)]
    if wrong:
        raise BadStructure(
            f"line {row} counts {wrong[0]:g} atoms of an element; mend it"
        )
    if names and len(names) != len(counts):
        raise BadStructure(
            f"{len(names)} elements but {len(counts)} numbers of atoms; mend lines 6 "
            "and 7"
        )
    return species, [int(n) for n in counts], row


def _is_cartesian(lines: list[str], row: int) -> bool:
    """Whether coordinates are Cartesian, judged like VASP by the first letter."""
    if not lines[row].strip() or _leading_numbers(lines[row]):
        raise BadStructure(
            f"line {row + 1} should say `Direct` or `Cartesian` but is "
            f"`{lines[row].strip()[:40]}`; mend it"
        )
    return lines[row].strip()[0] in "cCkK"


def _symbol_at_end(line: str) -> int:
    """Return the element after the coordinates of an atom; 0 if there is none."""
    words = line.split()[3:]
    if len(words) >= 3 and all(word.strip(".") in ("T", "F") for word in words[:3]):
        words = words[3:]
    return species_number(words[0]) if len(words) == 1 and words[0].istitle() else 0


def _check_end(lines: list[str], atoms: int) -> None:
    """Refuse coordinates after the last atom; velocities follow a blank line."""
    more = 0
    while more < len(lines) and len(_leading_numbers(lines[more])) >= 3:
        more += 1
    if more:
        raise BadStructure(
            f"line 7 says {atoms} atoms but {atoms + more} lines of coordinates "
            "follow; mend either"
        )
