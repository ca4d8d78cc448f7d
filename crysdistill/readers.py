"""POSCAR, pymatgen's JSON and flat JSON, read strictly; the bytes of any file."""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures import (
    FULL_OCCUPANCY,
    Crystal,
    disordered,
    species_number,
    unknown_element,
    validate,
)


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file, unpacked if it is gzip-compressed.

    Raises:
        BadStructure: it cannot be read, or ends early.
    """
    try:
        data = Path(path).read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadStructure(
            "its compressed data end early; get the file again"
        ) from None
    except OSError as error:
        raise BadStructure(f"cannot be read ({error.strerror})") from None


# ------------------------------------------------------------------------------ POSCAR


def read_poscar(data: bytes, material_id: str) -> Crystal:
    """Read a POSCAR or CONTCAR that names its elements.

    Raises:
        BadStructure: it is damaged, does not name its elements, or cannot be a crystal.
    """
    from pymatgen.io.vasp import Poscar

    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    if not text.strip():
        raise BadStructure("empty file; get it again or remove it")
    _check_species_line([line.split() for line in text.splitlines()[5:7]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            structure = Poscar.from_str(text, read_velocities=False).structure
        except IndexError:
            raise BadStructure(
                "not a whole POSCAR: a line or a number is missing; get the file again"
            ) from None
    if any("cannot be determined" in str(w.message) for w in caught):
        raise BadStructure("no element symbols (VASP 4); add them as line 6")
    return Crystal.from_pymatgen(structure, material_id)


def _check_species_line(lines: list[list[str]]) -> None:
    """Refuse what pymatgen passes over in lines 6 and 7: elements and their numbers."""
    if len(lines) < 2 or not lines[0] or lines[0][0].isdigit():
        return  # cut short, or VASP 4
    for symbol in lines[0]:
        if not species_number(re.split("[_/]", symbol)[0]):
            raise BadStructure(unknown_element("line 6", symbol))
    counted = lines[1] and all(word.isdigit() for word in lines[1])
    if counted and len(lines[0]) != len(lines[1]):
        raise BadStructure(
            f"{len(lines[0])} elements but {len(lines[1])} numbers of atoms; mend "
            "lines 6 and 7"
        )


# -------------------------------------------------------------------------------- JSON


def read_flat(entry: Mapping[str, Any], material_id: str) -> Crystal:
    """Read `{"lattice": (3, 3), "species": [symbols], "frac": (N, 3)}`.

    Raises:
        BadStructure: a key is missing, arrays do not fit, or it cannot be a crystal.
    """
    for key in ("lattice", "species", "frac"):
        if entry.get(key) is None:
            raise BadStructure(f"no `{key}`; give `lattice`, `species` and `frac`")
    species = entry["species"]
    numbers = [species_number(str(name)) for name in species]
    if 0 in numbers:
        site = numbers.index(0)
        raise BadStructure(unknown_element(f"site {site}", str(species[site])))
    return validate(
        Crystal(
            material_id,
            np.array(numbers, np.int64),
            _array(entry["frac"], "frac"),
            _array(entry["lattice"], "lattice"),
        )
    )


def read_pymatgen(entry: Mapping[str, Any], material_id: str) -> Crystal:
    """Read what pymatgen's `Structure.as_dict` writes.

    Raises:
        BadStructure: it is disordered, damaged, or cannot be a crystal.
    """
    lattice, sites = entry.get("lattice"), entry.get("sites")
    if not isinstance(lattice, Mapping) or "matrix" not in lattice:
        raise BadStructure("no `lattice` with a `matrix`; write it with pymatgen")
    if not isinstance(sites, Sequence):
        raise BadStructure("no `sites`; write it with pymatgen")
    numbers, frac = [], []
    for row, site in enumerate(sites):
        species = site["species"]
        if len(species) != 1 or abs(species[0].get("occu", 1) - 1) > FULL_OCCUPANCY:
            parts = " + ".join(f"{s['element']} {s.get('occu', 1):g}" for s in species)
            raise BadStructure(disordered(str(row), parts or "nothing"))
        number = species_number(species[0]["element"])
        if number == 0:
            raise BadStructure(unknown_element(f"site {row}", species[0]["element"]))
        numbers.append(number)
        frac.append(site["abc"])
    return validate(
        Crystal(
            material_id,
            np.array(numbers, np.int64),
            _array(frac, "abc"),
            _array(lattice["matrix"], "matrix"),
        )
    )


def _array(values: Any, name: str) -> np.ndarray:
    """Return an array of numbers; null becomes NaN, which `validate` reports."""
    try:
        return np.array(values, dtype=np.float64)
    except (ValueError, TypeError):
        raise BadStructure(
            f"`{name}` is not a table of numbers with three columns; mend the entry"
        ) from None
