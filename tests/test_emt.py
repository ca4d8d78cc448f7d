"""Labels of alloys agree with ASE's EMT, and with real metals."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from ase import units
from ase.calculators.emt import EMT
from ase.eos import EquationOfState

from crysdistill.demo import alloy_corpus, emt
from crysdistill.demo.emt import METALS, PROPERTIES, label_alloys
from crysdistill.errors import InputError
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import atomic_numbers_by_symbol
from tests.test_alloys import content_hash, to_atoms, volume_per_atom


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


@pytest.fixture(scope="module")
def corpus() -> list[Crystal]:
    return alloy_corpus(100, seed=0)


@pytest.fixture(scope="module")
def labelled(corpus: list[Crystal]) -> list[Crystal]:
    return label_alloys(corpus)


def test_workers_do_not_change_the_labels(corpus, labelled):
    assert content_hash(label_alloys(corpus[:80], workers=2)) == content_hash(
        labelled[:80]
    )


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
    # the same fcc sites; every fourth (001) layer is gold
    half = [[0, 0, 0], [0.5, 0.5, 0.25], [0, 0, 0.5], [0.5, 0.5, 0.75]]
    layered = make(["Au", "Cu", "Cu", "Cu"], half, np.diag([2.65, 2.65, 7.5]))
    results = label_alloys([ordered, layered])
    energies = [crystal.properties["formation_energy"] for crystal in results]
    # measured: about -0.07 eV/atom; EMT binds less, with the right sign and order
    assert -0.1 < energies[0] < -0.005
    assert energies[0] < energies[1] - 0.005
    # between EMT's values for copper (134) and gold (174)
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
            emt._fcc_energy(symbol) for symbol in atoms.get_chemical_symbols()
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


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="`workers` is 0 but must be at least 1"):
        label_alloys([], workers=0)
    with pytest.raises(InputError, match="fcc-Fe: EMT has no Fe; it knows Ag, Al"):
        label_alloys([fcc("Fe", 3.6)])
