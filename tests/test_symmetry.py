"""Space groups and crystal systems."""

from __future__ import annotations

import gzip
import json
from itertools import islice

import moyopy
import numpy as np
import pytest
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from crysdistill.structures import symmetry
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.readers import read_flat
from crysdistill.structures.symmetry import (
    ANGLE_TOLERANCE,
    CRYSTAL_SYSTEMS,
    ENGINES,
    SYMPREC,
    crystal_system,
    space_group,
    space_groups,
)

from .conftest import random_crystal, structures

STRUCTURES = structures()


@pytest.mark.parametrize("symprec", SYMPREC)
def test_space_groups_are_those_of_pymatgen(symprec):
    known = {"fcc-Cu": 225, "NaCl": 225, "diamond": 227, "TiO2": 136, "hcp-Mg": 194}
    for name, structure in STRUCTURES.items():
        crystal = Crystal.from_pymatgen(structure, name)
        found = space_group(crystal, symprec, ANGLE_TOLERANCE)
        analyzer = SpacegroupAnalyzer(structure, symprec, ANGLE_TOLERANCE)
        assert found == analyzer.get_space_group_number()
        assert found == known.get(name, found)
    assert space_group(random_crystal(0), symprec) == 1


def test_space_group_of_nothing_sensible_is_0(capfd):
    twice = Crystal(
        "twice", np.array([6, 6], np.uint8), np.zeros((2, 3)), np.eye(3) * 4
    )
    assert space_group(twice, 0.01) == 0
    assert space_groups(twice, "fast") == (0, 0)
    assert capfd.readouterr().err == ""


def test_a_search_that_fails_tears_no_progress_bar(capfd, monkeypatch):
    # Two hcp cells with every atom displaced by about 0.15 Å.
    crystal = Crystal(
        "bent-Mg",
        np.full(4, 12, np.uint8),
        np.array(
            [
                [0.1724, 0.6493, 0.2451],
                [0.6617, 0.6198, 0.2357],
                [0.3295, 0.3459, 0.7794],
                [0.8233, 0.3319, 0.7654],
            ]
        ),
        np.array(
            [[6.426, 0.028, -0.002], [-1.611, 2.77, 0.001], [-0.038, -0.001, 5.201]]
        ),
    )
    found = space_group(crystal, 0.1)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("SPGLIB_WARNING", "ON")  # spglib's default
    assert space_group(crystal, 0.1) == found
    assert "spglib: get_bravais_exact_positions_and_lattice" in capfd.readouterr().err


def test_crystal_systems():
    first = [1, 3, 16, 75, 143, 168, 195]
    last = [2, 15, 74, 142, 167, 194, 230]
    assert crystal_system(np.array(first)).tolist() == list(range(7))
    assert crystal_system(np.array(last)).tolist() == list(range(7))
    assert crystal_system(np.array([[0, 225]], np.uint8)).tolist() == [[-1, 6]]
    assert CRYSTAL_SYSTEMS[crystal_system(np.array(166))] == "trigonal"


def test_crystal_systems_are_those_of_pymatgen():
    from pymatgen.symmetry.groups import SpaceGroup

    for number in (1, 2, 3, 15, 16, 74, 75, 142, 143, 167, 168, 194, 195, 198):
        expected = SpaceGroup.from_int_number(number).crystal_system
        assert CRYSTAL_SYSTEMS[crystal_system(np.array(number))] == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_both_engines_know_the_textbook(engine):
    known = {"fcc-Cu": 225, "NaCl": 225, "diamond": 227, "TiO2": 136, "hcp-Mg": 194}
    for name, number in known.items():
        crystal = Crystal.from_pymatgen(STRUCTURES[name], name)
        assert space_groups(crystal, engine) == (number, number)


def test_spglib_is_asked_where_the_tolerances_disagree(monkeypatch):
    """Rutile with oxygen moved by 0.03 Å: one group at 0.01 Å, another at 0.1 Å."""
    rutile = Crystal.from_pymatgen(STRUCTURES["TiO2"], "TiO2")
    bent = rutile.frac_coords.copy()
    bent[2, 0] += 0.03 / 4.594
    bent = Crystal("bent", rutile.atomic_numbers, bent, rutile.cell)
    asked = []

    def spglib_alone(crystal, symprec):
        asked.append((crystal.material_id, symprec))
        return space_group(crystal, symprec)

    monkeypatch.setattr(symmetry, "space_group", spglib_alone)
    assert space_groups(rutile) == (136, 136)
    assert asked == []
    tight, loose = space_groups(bent)
    assert tight != loose == 136
    assert asked == [("bent", 0.01), ("bent", 0.1)]


def test_a_panic_in_moyopy_leaves_the_answer_to_spglib(monkeypatch):
    class PanicException(BaseException):
        """Stands for a Rust panic as it arrives in Python."""

    def panic(*args, **kwargs):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(moyopy, "MoyoDataset", panic)
    copper = Crystal.from_pymatgen(STRUCTURES["fcc-Cu"], "Cu")
    assert space_groups(copper) == (225, 225)


def test_supercells_tear_no_progress_bar(capfd):
    doubled = STRUCTURES["fcc-Cu"].make_supercell([3, 1, 1], in_place=False)
    assert space_groups(Crystal.from_pymatgen(doubled, "Cu")) == (225, 225)
    assert capfd.readouterr() == ("", "")


def test_the_fast_engine_agrees_with_spglib_on_real_crystals(shared_data):
    """On all 154,922 crystals they agree for 99.7 % (BENCHMARKS.md)."""
    with gzip.open(shared_data / "mp_corpus" / "structures.jsonl.gz") as file:
        entries = [json.loads(line) for line in islice(file, 0, 8000, 20)]
    crystals = [read_flat(entry, entry["id"]) for entry in entries]
    fast, slow = (
        np.array([space_groups(c, engine) for c in crystals]) for engine in ENGINES
    )
    assert (fast == slow).mean(axis=0).min() >= 0.99
