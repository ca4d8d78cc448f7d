"""The Ewald sum of formal charges as a teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure
from scipy.constants import e as elementary_charge
from scipy.constants import epsilon_0
from scipy.special import erfc

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import make_batch
from crysdistill.objectives import make_objective
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import atomic_numbers_by_symbol, symbols
from crysdistill.teachers import answers_for, make_teacher
from crysdistill.teachers.electrostatics import EwaldTeacher
from crysdistill.teachers.formal_charges import (
    Formula,
    formal_charges,
    formulas_of,
)
from crysdistill.transfer.seen import seen
from tests.conftest import crystal, from_structure, random_crystal, structures
from tests.toy_stores import SMALL_GRAPH, open_store

COULOMB = 1e10 * elementary_charge / (4 * np.pi * epsilon_0)  # V Å / e
NACL, CSCL, TIO2, CU = (
    from_structure(n, structures()[n]) for n in ("NaCl", "CsCl", "TiO2", "fcc-Cu")
)
ZNS = from_structure(
    "ZnS",
    Structure.from_spacegroup(
        "F-43m", Lattice.cubic(5.41), ["Zn", "S"], [[0, 0, 0], [0.25] * 3]
    ),
)
SILICA = replace(
    random_crystal(5), atomic_numbers=np.array([14, 8, 8, 8, 14, 8], np.uint8)
)
"""SiO2 with its atoms anywhere, so that no two have the same potential."""


def answer(*crystals: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """Return the teacher's answers for atoms and crystals."""
    found = EwaldTeacher()(make_batch(crystals, SMALL_GRAPH))
    return found.atoms.double().numpy(), found.crystals.double().numpy()


def formula(text: str) -> Formula:
    numbers = atomic_numbers_by_symbol()
    parts = Composition(text).reduced_composition.get_el_amt_dict()
    return tuple(sorted((numbers[name], int(n)) for name, n in parts.items()))


# -------------------------------------------------------------------- formal charges


@pytest.mark.parametrize(
    ("text", "charges"),
    [
        ("NaCl", {"Na": 1, "Cl": -1}),
        ("Na4Cl4", {"Na": 1, "Cl": -1}),
        ("SrTiO3", {"Sr": 2, "Ti": 4, "O": -2}),
        ("Fe3O4", {"Fe": 8 / 3, "O": -2}),
        ("FeO", {"Fe": 2, "O": -2}),
        ("NH4NO3", {"N": 1, "H": 1, "O": -2}),
        ("K2Cr2O7", {"K": 1, "Cr": 6, "O": -2}),
        ("LiH", {"Li": 1, "H": -1}),
    ],
)
def test_charges_of_known_compounds(text, charges):
    found = formal_charges(formula(text))
    assert {symbols()[z]: q for z, q in found.items()} == pytest.approx(charges)


@pytest.mark.parametrize(
    "text",
    [
        *("Fe3O4", "Mn3O4", "NH4NO3", "CaMn7O12", "Cu2OS", "SbO2", "BaOs4Sb12"),
        *("Na2S2O3", "KMnO4", "Pb3O4", "TlWO3", "UO2F2", "CuFeS2", "Bi2Te3", "CsO2"),
        *("NiTi", "Cu3Au", "LiFePO4", "CdSi2N4", "P2S5", "V6O13", "HgN3Cl"),
    ],
)
def test_charges_are_pymatgens_first_guess(text):
    guesses = Composition(text).oxi_state_guesses()
    found = formal_charges(formula(text))
    assert (found is None) == (not guesses)
    if found is not None:
        named = {symbols()[z]: q for z, q in found.items()}
        assert named == pytest.approx(guesses[0])


@pytest.mark.parametrize("text", ["Cu", "S8", "NiTi", "Cu3Au", "SbO2"])
def test_what_is_not_neutral_has_none(text):
    assert formal_charges(formula(text)) is None


def test_an_element_without_oxidation_states_has_none():
    assert formal_charges(((2, 1), (11, 2))) is None  # Na2He


def test_a_long_formula_takes_no_minutes():
    # pymatgen would list choose(47, 7) states of the nitrogen alone.
    found = formal_charges(((6, 3), (7, 40), (14, 27), (48, 9)))
    assert sum(n * found[z] for z, n in ((6, 3), (7, 40), (14, 27), (48, 9))) == (
        pytest.approx(0)
    )


def test_the_formula_does_not_depend_on_the_cell():
    atoms = np.array([8, 22, 8] * 3 + [29] + [22, 8, 8])
    rutile = ((8, 2), (22, 1))
    assert formulas_of(np.array([0, 9, 10, 13]), atoms) == [rutile, ((29, 1),), rutile]


# ------------------------------------------------------------- potentials and energies


@pytest.mark.parametrize(
    ("one", "nearest", "charge", "madelung"),
    [
        (NACL, 5.64 / 2, 1, 1.747565),
        (CSCL, 4.12 * 3**0.5 / 2, 1, 1.762675),
        (ZNS, 5.41 * 3**0.5 / 4, 2, 1.638055),
    ],
)
def test_madelung_constants(one, nearest, charge, madelung):
    atoms, crystals = answer(one)
    signs = np.where(np.isin(one.atomic_numbers, (11, 55, 30)), 1, -1)
    np.testing.assert_array_equal(atoms[:, 0], charge * signs)
    unit = charge * COULOMB / nearest  # V
    np.testing.assert_allclose(atoms[:, 1] / unit, -madelung * signs, rtol=2e-6)
    energy = -madelung * charge * unit / 2  # eV/atom
    assert crystals == pytest.approx(-np.sqrt(-energy), rel=2e-6)


def plain(one: Crystal, charges: np.ndarray) -> np.ndarray:
    """Return potentials in V by plain loops, with another width than pymatgen's."""
    width, volume = 0.45, abs(np.linalg.det(one.cell))
    places, q = one.frac_coords @ one.cell, charges
    images = np.array(list(np.ndindex(11, 11, 11))) - 5
    found = -2 * width / np.sqrt(np.pi) * q
    for i in range(len(q)):
        for j in range(len(q)):
            r = np.linalg.norm(places[j] - places[i] + images @ one.cell, axis=1)
            r = r[r > 1e-9]
            found[i] += q[j] * (erfc(width * r) / r).sum()
            k = (images @ (2 * np.pi * np.linalg.inv(one.cell).T))[images.any(axis=1)]
            square = (k * k).sum(axis=1)
            waves = np.exp(-square / (4 * width**2)) / square
            phases = np.cos(k @ (places[i] - places[j]))
            found[i] += q[j] * 4 * np.pi / volume * (waves * phases).sum()
    return COULOMB * found


def test_potentials_equal_a_plain_second_implementation():
    atoms, crystals = answer(SILICA)
    charges = np.where(SILICA.atomic_numbers == 14, 4.0, -2.0)
    np.testing.assert_array_equal(atoms[:, 0], charges)
    wanted = plain(SILICA, charges)
    np.testing.assert_allclose(atoms[:, 1], wanted, rtol=1e-5)
    energy = (charges * wanted).mean() / 2
    assert crystals == pytest.approx(-np.sqrt(-energy), rel=1e-5)


def test_a_neutral_atom_feels_the_others(monkeypatch):
    monkeypatch.setattr(
        "crysdistill.teachers.electrostatics.formal_charges",
        lambda formula: {8: -1.0, 14: 0.0, 26: 2.0},
    )
    one = replace(SILICA, atomic_numbers=np.array([14, 8, 26, 8, 14, 14], np.uint8))
    charges = np.array([0.0, -1, 2, -1, 0, 0])
    atoms, _ = answer(one)
    np.testing.assert_array_equal(atoms[:, 0], charges)
    np.testing.assert_allclose(atoms[:, 1], plain(one, charges), rtol=1e-5)


def test_potentials_of_wrong_charges_are_cut(monkeypatch):
    monkeypatch.setattr(
        "crysdistill.teachers.electrostatics.formal_charges",
        lambda formula: {11: 40.0, 17: -40.0},
    )
    atoms, crystals = answer(NACL)
    signs = np.where(NACL.atomic_numbers == 11, 1, -1)
    np.testing.assert_array_equal(atoms, np.column_stack((40 * signs, -100 * signs)))
    energy = 1.747565 * 40**2 * COULOMB / 2.82 / 2  # the energy is that of all of it
    assert crystals == pytest.approx(-np.sqrt(energy), rel=2e-6)


def test_a_positive_energy_keeps_its_sign(monkeypatch):
    monkeypatch.setattr(
        "crysdistill.teachers.electrostatics.formal_charges",
        lambda formula: {8: 1.0, 14: -2.0},
    )
    # Two like charges lie close together, and far from the other one.
    one = crystal("close", np.eye(3) * 7, ["O", "O", "Si"],
                  [[0, 0, 0], [0.09, 0, 0], [0.5] * 3])  # fmt: skip
    _, crystals = answer(one)
    energy = (np.array([1, 1, -2]) * plain(one, np.array([1.0, 1, -2]))).mean() / 2
    assert energy > 0
    assert crystals == pytest.approx(np.sqrt(energy), rel=1e-3)


def test_answers_follow_the_atoms_and_not_the_description():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    order = np.array([3, 0, 5, 1, 4, 2])
    wanted, of_crystal = answer(SILICA)
    doubled = SILICA.to_pymatgen() * (1, 2, 1)
    for one, atoms in (
        (replace(SILICA, frac_coords=SILICA.frac_coords[order],
                 atomic_numbers=SILICA.atomic_numbers[order]), wanted[order]),
        (replace(SILICA, cell=SILICA.cell @ turn), wanted),
        (replace(SILICA, cell=-SILICA.cell), wanted),
        (replace(SILICA, frac_coords=(SILICA.frac_coords + 0.3) % 1), wanted),
        (from_structure("doubled", doubled), np.repeat(wanted, 2, axis=0)),
    ):  # fmt: skip
        found, crystals = answer(one)
        np.testing.assert_allclose(found, atoms, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(crystals, of_crystal, rtol=1e-5)


def test_a_batch_answers_for_each_crystal_alone():
    atoms, crystals = answer(TIO2, NACL, SILICA)
    alone = [answer(one) for one in (TIO2, NACL, SILICA)]
    np.testing.assert_allclose(atoms, np.concatenate([a for a, _ in alone]), rtol=1e-6)
    np.testing.assert_allclose(crystals[:, 0], [c[0, 0] for _, c in alone], rtol=1e-6)


# ------------------------------------------------------------------------- as a teacher


def test_crystals_without_charges_are_unknown(tmp_path):
    store = open_store(tmp_path / "s.h5", [NACL, CU, TIO2])
    teacher = make_teacher("ewald", store)
    assert teacher.knows(store, np.array([2, 1, 0])).tolist() == [True, False, True]
    with pytest.raises(
        InputError,
        match=r"1 of 3 crystals have no formal charges that add up to zero \(fcc-Cu\); "
        "leave them out of the store, or pretrain with the objective `teacher`",
    ):
        answers_for(teacher, store, [0, 1, 2], workers=1, progress=False)
    objective = make_objective(
        "teacher", CGCNN(width=8, convolutions=1), teachers=["ewald"]
    )
    with pytest.raises(
        InputError,
        match=r"Ewald sum of formal charges knows none of the 1 crystals .*; name "
        "another teacher",
    ):
        objective.prepare(store, np.array([1]))


def test_another_release_of_pymatgen_is_asked_again(monkeypatch):
    before = EwaldTeacher().fingerprint()
    assert len(before) == 64
    monkeypatch.setattr("pymatgen.core.__version__", "1999.1.1")
    assert EwaldTeacher().fingerprint() != before


def test_it_has_learned_nothing(tmp_path):
    store = open_store(tmp_path / "s.h5", [NACL])
    teacher = make_teacher("ewald", store)
    assert teacher.provenance.origin == (
        "Ewald sum of formal charges, which has learned nothing"
    )
    assert not teacher.provenance.formulas.has(store).any()
    assert seen(teacher.learned, store)[0] == "clean"


def test_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="`ewald` has no model 'gulp'; name it alone"):
        make_teacher("ewald:gulp", open_store(tmp_path / "s.h5", [NACL]))
