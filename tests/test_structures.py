"""Crystals: checks, conversions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crysdistill.errors import BadStructure
from crysdistill.structures.crystal import (
    MIN_DISTANCE,
    Crystal,
    label_number,
    species_number,
    validate,
)

from .conftest import structures

STRUCTURES = structures()
CUBE = np.eye(3) * 4.0


def cscl(**changes) -> Crystal:
    plain = Crystal(
        "CsCl", np.array([55, 17]), np.array([[0.0, 0, 0], [0.5, 0.5, 0.5]]), CUBE
    )
    return replace(plain, **changes)


def test_validate_wraps_and_sets_types():
    crystal = validate(
        cscl(
            frac_coords=[[-1e-17, 1.0, -3.0], [1.5, -0.5, 2.5]], properties={"gap": 1.0}
        )
    )
    assert crystal.atomic_numbers.dtype == np.uint8
    assert crystal.frac_coords.tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert crystal.cell.flags.c_contiguous
    assert crystal.properties == {"gap": 1.0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"atomic_numbers": np.array([], int), "frac_coords": np.zeros((0, 3))},
            "^no atoms; add the atom sites",
        ),
        ({"atomic_numbers": np.array([55, 0])}, "site 1 holds `Z = 0`, not an element"),
        ({"atomic_numbers": np.array([101, 17])}, "site 0 holds `Z = 101`.* H and Fm;"),
        ({"atomic_numbers": np.array([-1, 17])}, "site 0 holds `Z = -1`"),
        (
            {"frac_coords": np.array([[0, 0, 0], [0.5, np.nan, 0.5]])},
            r"a coordinate of atom 1 \(Cl\) is not a number; complete it",
        ),
        (
            {"frac_coords": np.array([[np.inf, 0, 0], [0.5, 0.5, 0.5]])},
            r"a coordinate of atom 0 \(Cs\) is not a number",
        ),
        (
            {"frac_coords": np.zeros((3, 3))},
            r"2 atoms but coordinates of shape \(3, 3\)",
        ),
        ({"cell": np.zeros((3, 3))}, "lattice vector a is 0 Å long.*mend the cell"),
        ({"cell": np.diag([4, np.nan, 4])}, "lattice vector b is not three numbers"),
        ({"cell": np.eye(2)}, r"its cell has shape \(2, 2\); give three lattice vec"),
        ({"cell": np.diag([4, 4, 1e5])}, r"lattice vector c is 1e\+05 Å long"),
        ({"cell": np.diag([4, 4, 0.2])}, "lattice vector c is 0.2 Å long"),
        (
            {"cell": np.array([[4.0, 0, 0], [0, 4, 0], [4, 4, 0]])},
            "its cell of 0 Å³ is too small for 2 atoms .impossible cell",
        ),
        (
            {"frac_coords": np.array([[0.99, 0, 0], [0.01, 0, 0]])},
            r"two atoms on one point: atoms 0 and 1 \(Cs and Cl\) are 0.08 Å apart;",
        ),
    ],
)
def test_validate_refuses(changes, reason):
    with pytest.raises(BadStructure, match=reason):
        validate(cscl(**changes))


def closest_distance(crystal: Crystal) -> float:
    """Return the shortest distance by a search over all nearby images."""
    shifts = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3), -1).reshape(-1, 3)
    frac = crystal.frac_coords
    delta = frac[:, None, None] - frac[None, :, None] + shifts
    lengths = np.linalg.norm(delta @ crystal.cell, axis=-1)
    return lengths[lengths > 1e-9].min()


@pytest.mark.parametrize("atoms", [2, 6, 40, 41, 120])
def test_close_atoms_are_found_in_cells_of_any_size(atoms):
    rng = np.random.default_rng(atoms)
    side = (20.0 * atoms) ** (1 / 3)
    found = 0
    for _ in range(12):
        cell = np.eye(3) * side + rng.uniform(-0.2, 0.2, (3, 3)) * side
        frac = rng.random((atoms, 3))
        # Bring two atoms close, often across the border of the cell.
        frac[-1] = frac[0] + rng.normal(size=3) * 0.35 / side
        frac -= np.floor(frac)
        crystal = Crystal("x", np.full(atoms, 6), frac, cell)
        close = closest_distance(crystal) < MIN_DISTANCE
        found += close
        if close:
            with pytest.raises(BadStructure, match="two atoms on one point"):
                validate(crystal)
        else:
            validate(crystal)
    assert found > 0


def test_close_atoms_are_found_in_a_skewed_cell():
    skewed = np.array([[4.0, 0, 0], [0, 4, 0], [60, 36.1, 4]])
    validate(cscl(cell=skewed, frac_coords=np.array([[0.0, 0, 0], [0.5, 0.5, 0.5]])))
    near = np.linalg.solve(skewed.T, [4.0, 8.0, 0.3]) % 1.0
    with pytest.raises(BadStructure, match=r"two atoms on one point.*0\.30 Å apart"):
        validate(cscl(cell=skewed, frac_coords=np.array([[0.0, 0, 0], near])))
    short = np.array([[4.0, 0, 0], [40, 0.3, 0], [0, 0, 30.0]])
    with pytest.raises(BadStructure, match=r"atom 0 lies 0.30 Å from its own image"):
        validate(Crystal("x", np.array([6]), np.zeros((1, 3)), short))


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_pymatgen_round_trip(name):
    structure = STRUCTURES[name]
    crystal = Crystal.from_pymatgen(structure, name, {"gap": 0.5})
    assert crystal.material_id == name
    assert crystal.properties == {"gap": 0.5}
    assert crystal.to_pymatgen() == structure
    assert crystal.volume == pytest.approx(structure.volume)
    assert crystal.formula == structure.composition.reduced_formula


def test_from_pymatgen_refuses_what_is_no_ordered_crystal():
    lattice, sites = Lattice.cubic(4), [[0, 0, 0], [0.5, 0.5, 0.5]]
    mixed = Structure(lattice, [{"Fe": 0.5, "Mn": 0.5}, "O"], sites)
    with pytest.raises(BadStructure, match=r"site 0 is disordered \(.*0.5.*\); use an"):
        Crystal.from_pymatgen(mixed, "x")
    dummy = Structure(lattice, ["Fe", "X"], sites)
    with pytest.raises(
        BadStructure, match=r"site 1 holds `X0.*`, not an element between"
    ):
        Crystal.from_pymatgen(dummy, "x")
    ions = Structure(lattice, ["Cs+", "Cl-"], sites)
    assert Crystal.from_pymatgen(ions, "x").atomic_numbers.tolist() == [55, 17]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Fe", 26),
        ("FE", 26),
        ("Fe3+", 26),
        ("Fe+3", 26),
        ("Fe12", 26),
        ("O2-", 8),
        ("Cs1+", 55),
        ("D", 1),
        ("V", 23),
        ("Vac", 0),
        ("Va", 0),
        ("X", 0),
        ("Xx0+", 0),
        ("Fe,Mn", 0),
        ("Fe0.5Mn0.5", 0),
        ("0.8Nb + 0.2Zr", 0),
        ("Md", 0),
        ("", 0),
        ("?", 0),
    ],
)
def test_species(text, number):
    assert species_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("Fe12A", 26), ("Fe(1)", 26), ("O1_2", 8), ("OW1", 0), ("Vac1", 0), ("NH4", 0)],
)
def test_labels(text, number):
    assert label_number(text) == number
