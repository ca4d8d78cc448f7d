"""POSCAR and JSON: agreement with pymatgen, and refused files."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from crysdistill.errors import BadStructure
from crysdistill.sources.records import Record, parse
from crysdistill.structures.poscar import read_poscar
from crysdistill.structures.readers import (
    read_bytes,
    read_flat,
    read_pymatgen,
)

from .conftest import structures

STRUCTURES = structures()
FLAT = {
    "lattice": [[4, 0, 0], [0, 4, 0], [0, 0, 4]],
    "species": ["Cs", "Cl-"],
    "frac": [[0, 0, 0], [0.5, 0.5, 0.5]],
}
POSCAR = """CsCl
1.0
4 0 0
0 4 0
0 0 4
Cs Cl
1 1
Direct
0 0 0
0.5 0.5 0.5
"""


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_agreement_with_pymatgen(name):
    structure = STRUCTURES[name].copy()
    structure.add_oxidation_state_by_guess()
    for crystal in (
        read_poscar(structure.to(fmt="poscar").encode(), name),
        read_pymatgen(json.loads(structure.to_json()), name),
    ):
        assert crystal.material_id == name
        numbers = [site.specie.Z for site in structure]
        assert crystal.atomic_numbers.tolist() == numbers
        np.testing.assert_allclose(crystal.cell, structure.lattice.matrix, atol=1e-9)
        delta = crystal.frac_coords - structure.frac_coords
        np.testing.assert_allclose(delta - np.rint(delta), 0, atol=1e-9)


def test_flat():
    crystal = read_flat(FLAT, "CsCl")
    assert crystal.atomic_numbers.tolist() == [55, 17]
    assert crystal.volume == pytest.approx(64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lattice": None}, "no `lattice`; give `lattice`, `species` and `frac`"),
        (
            {"frac": [[0, 0, 0], [0.5, 0.5]]},
            "`frac` is not a table of numbers with three",
        ),
        ({"frac": [[0, 0, 0], [0.5, 0.5, "a"]]}, "`frac` is not a table of numbers"),
        (
            {"frac": [[0, 0, 0], [0.5, 0.5, None]]},
            r"coordinate of atom 1 \(Cl\) is not",
        ),
        ({"frac": [[0, 0, 0]]}, "2 atoms but coordinates of shape"),
        ({"species": ["Cs", "Vac"]}, "site 1 holds `Vac`, not an element"),
        ({"species": ["Cs", None]}, "site 1 holds `None`, not an element"),
        ({"species": [], "frac": []}, "no atoms"),
        ({"lattice": [4, 4, 4]}, r"its cell has shape \(3,\); give three lattice"),
    ],
)
def test_flat_refusals(changes, reason):
    with pytest.raises(BadStructure, match=reason):
        read_flat({**FLAT, **changes}, "x")


def pymatgen_entry(**site) -> dict:
    entry = json.loads(STRUCTURES["CsCl"].to_json())
    entry["sites"][1].update(site)
    return entry


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (
            pymatgen_entry(
                species=[{"element": "Fe", "occu": 0.5}, {"element": "Mn", "occu": 0.5}]
            ),
            r"site 1 is disordered \(Fe 0.5 \+ Mn 0.5\); use an ordered approximant",
        ),
        (pymatgen_entry(species=[{"element": "Fe", "occu": 0.9}]), r"\(Fe 0.9\)"),
        (pymatgen_entry(species=[]), r"site 1 is disordered \(nothing\)"),
        (
            pymatgen_entry(species=[{"element": "X", "occu": 1}]),
            "site 1 holds `X`, not an",
        ),
        (pymatgen_entry(abc=[0, 0]), "`abc` is not a table of numbers"),
        ({"@class": "Molecule", "sites": []}, "no `lattice` with a `matrix`"),
        ({"lattice": {"matrix": np.eye(3).tolist()}}, "no `sites`; write it with"),
    ],
)
def test_pymatgen_refusals(entry, reason):
    with pytest.raises(BadStructure, match=reason):
        read_pymatgen(entry, "x")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (POSCAR, "", "^empty file; get it again or remove it"),
        (POSCAR, POSCAR[:20], "not a whole POSCAR: a line or a number is missing; get"),
        ("0.5 0.5 0.5\n", "", "not a whole POSCAR: a line or a number is missing"),
        ("Cs Cl\n", "", r"no element symbols \(VASP 4\); add them as line 6"),
        ("Cs Cl\n", "Cs\n", "1 elements but 2 numbers of atoms; mend lines 6 and 7"),
        ("Cs Cl\n", "Cs Cl F\n", "3 elements but 2 numbers of atoms; mend lines 6"),
        ("Cs Cl\n", "Cs Vac\n", "line 6 holds `Vac`, not an element"),
        (
            "0.5 0.5 0.5",
            "0.5 nan 0.5",
            r"a coordinate of atom 1 \(Cl\) is not a number",
        ),
        ("0.5 0.5 0.5", "0 0 0", "two atoms on one point: atoms 0 and 1"),
        ("1.0\n", "0.0\n", "lattice vector a is 0 Å long"),
        (
            "0 4 0",
            "0 four 0",
            "line 4 is `0 four 0`, not three numbers; mend it",
        ),
    ],
)
def test_poscar_refusals(old, new, reason):
    assert old in POSCAR
    record = Record("POSCAR", "x", "poscar", POSCAR.replace(old, new, 1).encode())
    with pytest.raises(BadStructure, match=reason) as caught:
        parse(record)
    assert "\n" not in str(caught.value)


def test_poscar_with_potential_names():
    crystal = read_poscar(POSCAR.replace("Cs Cl", "Cs_sv/4f2 Cl").encode(), "x")
    assert crystal.atomic_numbers.tolist() == [55, 17]


def test_compressed_files(tmp_path):
    whole = gzip.compress(POSCAR.encode() * 100)
    path = tmp_path / "POSCAR.gz"
    path.write_bytes(whole)
    assert read_bytes(path) == POSCAR.encode() * 100
    path.write_bytes(whole[:-20])
    with pytest.raises(
        BadStructure, match="its compressed data end early; get the file"
    ):
        read_bytes(path)
    with pytest.raises(BadStructure, match=r"cannot be read .No such file"):
        read_bytes(tmp_path / "nothing")


def test_no_exception_escapes():
    for payload in (
        b"[1, 2]",
        b'{"sites": 3, "lattice": {"matrix": 1}}',
        b'{"a": ',
        b"3",
    ):
        record = Record("a.json", "x", "pymatgen", payload, place="line 3")
        with pytest.raises(BadStructure, match=r"^line 3: ") as caught:
            parse(record)
        assert "\n" not in str(caught.value)
