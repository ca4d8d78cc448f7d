"""Strict readers of all formats but CIF and POSCAR, and of the bytes of any file."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.crystal import (
    FULL_OCCUPANCY,
    Crystal,
    check_periodic,
    disordered,
    species_number,
    unknown_element,
    validate,
)
from crysdistill.structures.text import as_text, plain_numbers

if TYPE_CHECKING:
    from ase import Atoms

_FULL_IN_SHELX = 11.0  # an occupancy of 1; SHELX adds 10 to fixed values


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


# -------------------------------------------------------------------------------- JSON


def read_flat(entry: Mapping[str, Any], material_id: str) -> Crystal:
    """Read `{"lattice": (3, 3), "species": [symbols], "frac": (N, 3)}`.

    Raises:
        BadStructure: a key is missing, arrays do not fit, or it cannot be a crystal.
    """
    for key in ("lattice", "species", "frac"):
        if entry.get(key) is None:
            raise BadStructure(f"no `{key}`; give `lattice`, `species` and `frac`")
    check_periodic(entry.get("pbc"))
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
    """Read the output of pymatgen's `Structure.as_dict`.

    Raises:
        BadStructure: it is disordered, damaged, or cannot be a crystal.
    """
    lattice, sites = entry.get("lattice"), entry.get("sites")
    if isinstance(lattice, Mapping):
        check_periodic(lattice.get("pbc"))
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


def read_jarvis(atoms: Mapping[str, Any], material_id: str) -> Crystal:
    """Read the `atoms` of a JARVIS entry.

    Its keys are `lattice_mat` (3, 3) in Å, `elements`, `coords` (N, 3), and
    `cartesian`, which says whether `coords` are in Å or fractional.

    Raises:
        BadStructure: a key is missing, arrays do not fit, or it cannot be a crystal.
    """
    for key in ("lattice_mat", "elements", "coords"):
        if atoms.get(key) is None:
            raise BadStructure(f"no `{key}` in its `atoms`; mend the entry")
    check_periodic(atoms.get("pbc"))
    lattice = _array(atoms["lattice_mat"], "lattice_mat")
    coords = _array(atoms["coords"], "coords")
    if atoms.get("cartesian"):
        coords = fractional(coords, lattice)
    species = [str(name).strip() for name in atoms["elements"]]
    return read_flat(
        {"lattice": lattice, "species": species, "frac": coords}, material_id
    )


def fractional(positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Return positions in Å as fractional coordinates.

    For an impossible cell they are zero, so that `validate` reports the cell.
    """
    if cell.shape != (3, 3) or positions.ndim != 2 or positions.shape[1] != 3:
        return np.zeros(positions.shape) if positions.ndim == 2 else positions
    try:
        return np.linalg.solve(cell.T, positions.T).T
    except np.linalg.LinAlgError:
        return np.zeros_like(positions)


# --------------------------------------------------------------------------- RES, CSSR


def read_res(data: bytes, material_id: str) -> Crystal:
    """Read a RES file as written by AIRSS: all atoms of the cell, no symmetry.

    Raises:
        BadStructure: it is damaged, is disordered, has symmetry operations, or cannot
            be a crystal.
    """
    from pymatgen.io.res import ResIO

    lines = [line.strip() for line in as_text(data).splitlines()]
    in_sites = False
    for words in map(str.split, lines):
        # Readers ignore these lines and mistake the asymmetric unit for the whole cell.
        if words[:1] == ["SYMM"] or (words[:1] == ["LATT"] and words[1:2] != ["-1"]):
            raise BadStructure(
                f"has symmetry (`{' '.join(words)}`), which is not expanded in RES "
                "files; write it as CIF"
            )
        if in_sites and len(words) > 5:
            occupancy = float(words[5])
            if (
                min(abs(occupancy - 1), abs(occupancy - _FULL_IN_SHELX))
                > FULL_OCCUPANCY
            ):
                raise BadStructure(disordered(words[0], f"occupancy {words[5]}"))
        in_sites = words[:1] != ["END"] and (in_sites or words[:1] == ["SFAC"])
    text = "\n".join(line for line in lines if line)
    structure: Any = ResIO.structure_from_str(text)
    return Crystal.from_pymatgen(structure, material_id)


def read_cssr(data: bytes, material_id: str) -> Crystal:
    """Read a CSSR file with fractional coordinates.

    Raises:
        BadStructure: it is damaged, or cannot be a crystal.
    """
    from pymatgen.io.cssr import Cssr

    text = as_text(data)
    words = (text.splitlines() + [""] * 3)[2].split()
    if not words or not words[0].isdigit():
        raise BadStructure("no number of atoms in line 3; get the file again")
    if words[1:2] == ["1"]:
        raise BadStructure("Cartesian coordinates; write fractional ones, or a CIF")
    structure: Any = Cssr.from_str(text).structure
    if len(structure) != int(words[0]):
        raise BadStructure(
            f"{len(structure)} atoms but line 3 says {words[0]}: cut short or damaged; "
            "get the file again"
        )
    return Crystal.from_pymatgen(structure, material_id)


# --------------------------------------------------------------------------------- ASE


def crystal_of_atoms(atoms: Atoms, material_id: str) -> Crystal:
    """Take the arrays of ASE atoms; `validate` has to check them afterwards.

    ASE keeps partial occupancies beside atoms that look ordered. They are refused here.

    Raises:
        BadStructure: no cell, not periodic in three directions, or disordered.
    """
    cell = np.array(atoms.cell.array, np.float64)
    if not cell.any():
        raise BadStructure("no cell; add its three vectors, or leave molecules out")
    check_periodic(atoms.pbc)
    _check_ase_occupancy(atoms)
    frac = fractional(atoms.positions, cell)
    return Crystal(material_id, atoms.numbers, frac, cell)


def _check_ase_occupancy(atoms: Atoms) -> None:
    """Refuse sites that are not full, wherever ASE or its users keep occupancies."""
    named = atoms.info.get("occupancy")
    if isinstance(named, Mapping):
        for site, holds in named.items():
            parts = holds.items() if isinstance(holds, Mapping) else [("", holds)]
            shares = [(name, float(share)) for name, share in parts]
            if len(shares) != 1 or abs(shares[0][1] - 1) > FULL_OCCUPANCY:
                shown = " + ".join(
                    f"{name} {share:g}".strip() for name, share in shares
                )
                raise BadStructure(disordered(str(site), shown or "nothing"))
        named = None
    columns = (atoms.arrays.get(name) for name in ("occupancy", "occupancies", "occ"))
    for values in (named, *columns):
        if values is None:
            continue
        filled = np.atleast_1d(np.asarray(values, np.float64))
        odd = np.flatnonzero(~(np.abs(filled - 1) <= FULL_OCCUPANCY))
        if len(odd):
            raise BadStructure(disordered(str(odd[0]), f"occupancy {filled[odd[0]]:g}"))


def read_extxyz(data: bytes, material_id: str) -> Crystal:
    """Read one frame of extended XYZ.

    Raises:
        BadStructure: as `crystal_of_atoms`, or it cannot be a crystal.
    """
    atoms = _ase_read(plain_numbers(data), "extxyz")
    if not atoms.cell.array.any():
        raise BadStructure(
            "no cell; add its three vectors, or leave molecules out (`Lattice` in the "
            "second line of a frame)"
        )
    return validate(crystal_of_atoms(atoms, material_id))


def read_gen(data: bytes, material_id: str) -> Crystal:
    """Read a GEN file of DFTB+.

    Raises:
        BadStructure: as `crystal_of_atoms`, or it cannot be a crystal.
    """
    return validate(crystal_of_atoms(_ase_read(data, "gen"), material_id))


def _ase_read(data: bytes, layout: str) -> Atoms:
    import ase.io

    text = io.StringIO(as_text(data))
    return next(ase.io.iread(text, format=layout))
