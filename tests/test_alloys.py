"""The alloys that are made on the spot: the same everywhere, and physically right."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.eos import EquationOfState
from ase.neighborlist import neighbor_list

from crysdistill.corpus import alloys
from crysdistill.corpus.alloys import (
    METALS,
    PROPERTIES,
    alloy_corpus,
    demo_sets,
    label_alloys,
    prototype_of,
    prototypes,
)
from crysdistill.elements import atomic_numbers_by_symbol
from crysdistill.errors import InputError
from crysdistill.structures import Crystal


def make(species: list[str], frac: list, cell: np.ndarray, name: str = "x") -> Crystal:
    numbers = atomic_numbers_by_symbol()
    return Crystal(
        name,
        np.array([numbers[symbol] for symbol in species], np.uint8),
        np.array(frac, float),
        np.array(cell, float),
    )


def fcc(symbol: str, side: float) -> Crystal:
    return make([symbol], [[0, 0, 0]], side / 2 * (1 - np.eye(3)), f"fcc-{symbol}")


FCC_SITES = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]


def to_atoms(crystal: Crystal) -> Atoms:
    return Atoms(
        crystal.atomic_numbers,
        cell=crystal.cell,
        scaled_positions=crystal.frac_coords,
        pbc=True,
    )


def volume_per_atom(crystal: Crystal) -> float:
    return abs(np.linalg.det(crystal.cell)) / len(crystal.atomic_numbers)


def content_hash(crystals: list[Crystal]) -> str:
    digest = hashlib.sha256()
    for crystal in crystals:
        digest.update(crystal.material_id.encode())
        for array in (crystal.atomic_numbers, crystal.frac_coords, crystal.cell):
            digest.update(array.tobytes())
        digest.update(repr(sorted(crystal.properties.items())).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def corpus() -> list[Crystal]:
    return alloy_corpus(3000, seed=0)


@pytest.fixture(scope="module")
def labelled(corpus: list[Crystal]) -> list[Crystal]:
    return label_alloys(corpus[:100])


# --- The same everywhere -------------------------------------------------------------


def test_another_process_makes_the_same_bytes(corpus, labelled):
    program = (
        "from tests.test_alloys import *\n"
        "print(content_hash(alloy_corpus(3000, seed=0)))\n"
        "print(content_hash(label_alloys(alloy_corpus(20, seed=0))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [content_hash(corpus), content_hash(labelled[:20])]


def test_a_shorter_corpus_is_the_beginning_of_a_longer_one(corpus):
    assert content_hash(alloy_corpus(20, seed=0)) == content_hash(corpus[:20])


def test_smaller_cells_come_first_whatever_the_limit():
    names = [prototype.name for prototype in prototypes(16)]
    few = [prototype.name for prototype in prototypes(4)]
    assert 30 < len(few) < len(names)
    assert names[: len(few)] == few


def test_another_seed_makes_another_corpus(corpus):
    other = alloy_corpus(100, seed=1)
    kinds = {crystal.material_id.rsplit("-", 1)[0] for crystal in corpus[:100]}
    assert sum(c.material_id.rsplit("-", 1)[0] in kinds for c in other) < 20


def test_workers_do_not_change_the_labels(corpus, labelled):
    assert content_hash(label_alloys(corpus[:80], workers=2)) == content_hash(
        labelled[:80]
    )


# --- Structures ----------------------------------------------------------------------


def test_ids_tell_prototype_and_formula():
    assert prototype_of("A15-AlNi3-0123") == "A15"
    assert prototype_of("AB2_oP6_58_a_g-CuPt2-12345") == "AB2_oP6_58_a_g"
    names = {prototype.name for prototype in prototypes(16)}
    for crystal in alloy_corpus(400, seed=3):
        prototype, formula, _ = crystal.material_id.split("-")
        counts = Counter(alloys._symbols_of(crystal))
        largest = max(counts, key=counts.get)
        assert largest in formula
        assert prototype in names


def test_corpus_is_distinct_unlabelled_and_of_two_to_four_metals(corpus):
    assert len(corpus) == 3000
    assert len({c.material_id for c in corpus}) == 3000
    assert len({c.material_id.rsplit("-", 1)[0] for c in corpus}) == 3000
    numbers = atomic_numbers_by_symbol()
    allowed = {numbers[symbol] for symbol in METALS}
    for crystal in corpus:
        present = set(crystal.atomic_numbers.tolist())
        assert present <= allowed
        assert 2 <= len(present) <= 4
        assert len(crystal.atomic_numbers) <= 16
        assert crystal.atomic_numbers.dtype == np.uint8
        assert crystal.properties == {}
        assert np.all((crystal.frac_coords >= 0) & (crystal.frac_coords < 1))


def test_each_round_takes_every_prototype_once(corpus):
    count = len(prototypes(16))
    first = [prototype_of(crystal.material_id) for crystal in corpus[:count]]
    assert sorted(first) == sorted(prototype.name for prototype in prototypes(16))


@pytest.mark.parametrize(
    ("name", "decorations"),
    [
        ("B2", 21),  # both sites alike: 7 * 6 / 2
        ("L1_0", 21),
        ("L1_2", 42),  # 7 * 6
        ("L2_1", 105),  # X2YZ with Y and Z alike: 7 * 6 * 5 / 2
        ("E2_1", 210),  # perovskite: 7 * 6 * 5
    ],
)
def test_equivalent_decorations_come_once(name, decorations):
    (prototype,) = [p for p in prototypes(16) if p.name == name]
    assert len(list(alloys._decorations(prototype))) == decorations


def test_one_structure_has_one_prototype():
    names = {prototype.name for prototype in prototypes(16)}
    assert len(names) == len(prototypes(16))
    assert {"B1", "B2", "B3", "B4", "L1_2", "A15", "C14", "C15"} <= names
    # pyrite once more without symmetry; L1_2 once more as tetragonal; 6H as zincblende
    assert not names & {"AB2_aP12_1_4a_8a", "D0_c", "B6"}
    # quartz and carbon monoxide are no alloys
    assert not names & {"A2B_hP9_152_c_a", "C8", "B21"}


def test_volumes_and_distances_are_sensible(corpus):
    radii = {
        atomic_numbers_by_symbol()[symbol]: alloys._radius(symbol) for symbol in METALS
    }
    closest = []
    for crystal in corpus[:300]:
        atoms = to_atoms(crystal)
        elemental = sum(
            alloys._atomic_volumes()[symbol] for symbol in atoms.get_chemical_symbols()
        )
        assert 0.95 < atoms.get_volume() / elemental < 2.05
        i, j, distances = neighbor_list("ijd", atoms, 3.2)
        z = crystal.atomic_numbers
        contact = np.array(
            [radii[a] + radii[b] for a, b in zip(z[i], z[j], strict=True)]
        )
        closest.append(np.min(distances / contact))
        assert distances.min() > 1.9
    assert min(closest) > 0.74  # 0.75 before the jitter
    assert 0.85 < np.mean(closest) < 1.0


def test_estimated_volumes_are_near_equilibrium(corpus, labelled):
    ratios = [
        volume_per_atom(relaxed) / volume_per_atom(crystal)
        for crystal, relaxed in zip(corpus, labelled, strict=False)
    ]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.03)
    assert np.std(ratios) < 0.08


# --- Labels --------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", METALS)
def test_an_fcc_metal_has_no_formation_energy(symbol):
    (result,) = label_alloys([fcc(symbol, 3.9)])
    assert result.properties["formation_energy"] == pytest.approx(0, abs=1e-6)


def test_copper_is_copper():
    (result,) = label_alloys([fcc("Cu", 3.9)])
    side = (4 * volume_per_atom(result)) ** (1 / 3)
    assert side == pytest.approx(3.61, abs=0.03)  # Å
    assert result.properties["bulk_modulus"] == pytest.approx(134, rel=0.03)  # GPa


def test_copper_gold_orders():
    ordered = make(["Au", "Cu", "Cu", "Cu"], FCC_SITES, 3.75 * np.eye(3))  # L1_2
    # the same fcc sites, with gold in every fourth (001) layer
    half = [[0, 0, 0], [0.5, 0.5, 0.25], [0, 0, 0.5], [0.5, 0.5, 0.75]]
    layered = make(["Au", "Cu", "Cu", "Cu"], half, np.diag([2.65, 2.65, 7.5]))
    results = label_alloys([ordered, layered])
    energies = [crystal.properties["formation_energy"] for crystal in results]
    # measured: about -0.07 eV/atom; EMT binds less, but has the sign and the order
    assert -0.1 < energies[0] < -0.005
    assert energies[0] < energies[1] - 0.005
    # between copper (134) and gold (174 in EMT)
    assert 130 < results[0].properties["bulk_modulus"] < 180


def test_labels_agree_with_a_fit_of_plain_emt_energies(labelled):
    for crystal in labelled[:4]:
        atoms = to_atoms(crystal)
        atoms.calc = EMT()
        cell = atoms.cell.copy()
        volumes, energies = [], []
        for strain in np.linspace(-0.02, 0.02, 9):
            atoms.set_cell(cell * (1 + strain), scale_atoms=True)
            volumes.append(atoms.get_volume())
            energies.append(atoms.get_potential_energy())
        volume, energy, stiffness = EquationOfState(
            volumes, energies, eos="birchmurnaghan"
        ).fit()
        assert volume == pytest.approx(np.linalg.det(cell), rel=2e-3)
        assert crystal.properties["bulk_modulus"] == pytest.approx(
            stiffness / units.GPa, rel=0.02
        )
        elemental = sum(
            alloys._fcc_energy(symbol) for symbol in atoms.get_chemical_symbols()
        )
        assert crystal.properties["formation_energy"] == pytest.approx(
            (energy - elemental) / len(atoms), abs=2e-4
        )


def test_labels_do_not_depend_on_cell_choice_or_starting_volume(labelled):
    for crystal in labelled[:4]:
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
        above = np.array([0, 0, 1])
        doubled = Crystal(
            "doubled",
            np.tile(crystal.atomic_numbers, 2),
            np.vstack([crystal.frac_coords, crystal.frac_coords + above]) / [1, 1, 2],
            1.04 * np.diag([1, 1, 2]) @ crystal.cell @ turn,
        )
        (result,) = label_alloys([doubled])
        for name in PROPERTIES:
            assert result.properties[name] == pytest.approx(
                crystal.properties[name], rel=1e-3, abs=1e-5
            )
        assert volume_per_atom(result) == pytest.approx(
            volume_per_atom(crystal), rel=1e-4
        )


def test_labelling_again_changes_nothing_and_keeps_other_properties(labelled):
    known = [replace(c, properties={"density": 1.0}) for c in labelled[:5]]
    for before, after in zip(labelled, label_alloys(known), strict=False):
        assert after.properties["density"] == 1.0
        assert after.material_id == before.material_id
        np.testing.assert_allclose(after.cell, before.cell, rtol=1e-5, atol=1e-5)
        for name in PROPERTIES:
            assert after.properties[name] == pytest.approx(
                before.properties[name], rel=1e-4, abs=1e-5
            )


def test_labels_are_spread(labelled):
    assert len(labelled) == 100
    energies = np.array([c.properties["formation_energy"] for c in labelled])
    moduli = np.array([c.properties["bulk_modulus"] for c in labelled])
    assert 0.3 < energies.std() < 0.5
    assert -0.3 < energies.min() < energies.max() < 2.5
    assert 40 < moduli.std() < 60
    assert moduli.min() > 0


def test_a_crystal_without_equilibrium_is_counted_not_lost(caplog):
    far_apart = make(["Cu"], [[0, 0, 0]], 40 * np.eye(3), "far-apart")
    with caplog.at_level(logging.WARNING):
        results = label_alloys([fcc("Cu", 3.6), far_apart, fcc("Ni", 3.5)])
    assert [crystal.material_id for crystal in results] == ["fcc-Cu", "fcc-Ni"]
    assert "1 of 3 crystals have no EMT equilibrium" in caplog.text
    assert "far-apart" in caplog.text


# --- The two sets of the demo --------------------------------------------------------


def test_demo_sets_share_no_structure():
    unlabelled, dataset = demo_sets(seed=2, corpus_size=500, dataset_size=40)
    assert (len(unlabelled), len(dataset)) == (500, 40)
    assert all(set(crystal.properties) == set(PROPERTIES) for crystal in dataset)
    assert not any(crystal.properties for crystal in unlabelled)
    decorated = [c.material_id.rsplit("-", 1)[0] for c in unlabelled + dataset]
    assert len(set(decorated)) == 540
    # The dataset has one crystal of each of 40 prototypes; the corpus has them all.
    seen = {prototype_of(crystal.material_id) for crystal in dataset}
    assert len(seen) == 40
    assert seen <= {prototype_of(crystal.material_id) for crystal in unlabelled}
    other = demo_sets(seed=2, corpus_size=10, dataset_size=40)[1]
    assert content_hash(other) == content_hash(dataset)


def test_a_crystal_without_labels_is_replaced_by_the_next(monkeypatch):
    def forgetful(crystals: list[Crystal], workers: int) -> list[Crystal]:
        return [c for c in crystals if not c.material_id.endswith("-0003")]

    monkeypatch.setattr(alloys, "label_alloys", forgetful)
    unlabelled, dataset = demo_sets(seed=0, corpus_size=5, dataset_size=6)
    serials = [int(crystal.material_id[-4:]) for crystal in dataset + unlabelled]
    assert serials == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


# --- What a user can get wrong -------------------------------------------------------


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="`count` is 0 but must be at least 1"):
        alloy_corpus(0, seed=0)
    with pytest.raises(InputError, match="`max_atoms` is 1 but must be at least 2"):
        alloy_corpus(1, seed=0, max_atoms=1)
    with pytest.raises(
        InputError, match="but there are 189 alloys of at most 2 atoms; increase"
    ):
        alloy_corpus(10_000, seed=0, max_atoms=2)
    with pytest.raises(InputError, match="`workers` is 0 but must be at least 1"):
        label_alloys([], workers=0)
    with pytest.raises(InputError, match="`corpus_size` is 0 but must be"):
        demo_sets(0, 0, 10)
    with pytest.raises(InputError, match="`dataset_size` is -1 but must be"):
        demo_sets(0, 10, -1)
    with pytest.raises(InputError, match="fcc-Fe: EMT has no Fe; it knows Ag, Al"):
        label_alloys([fcc("Fe", 3.6)])
    with pytest.raises(InputError, match="`mp-149` is no id of this corpus"):
        prototype_of("mp-149")
