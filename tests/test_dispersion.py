"""The D4 dispersion model as a teacher."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.analysis.ewald import EwaldSummation
from scipy.special import erf, erfc

from crysdistill.errors import BadStructure, InputError
from crysdistill.graphs.batch import make_batch
from crysdistill.structures.crystal import Crystal
from crysdistill.teachers import make_teacher
from crysdistill.training.pretrain import pretrain
from crysdistill.transfer.seen import seen
from crysdistill.transfer.weights import read_header
from tests.conftest import crystal, from_structure, random_crystal, structures
from tests.toy_runs import pretraining_config
from tests.toy_stores import SMALL_GRAPH, open_store, write_store

dftd4 = pytest.importorskip(
    "dftd4.interface",
    reason="dftd4 is not installed: `pip install crysdistill[dispersion]`",
)
from crysdistill.teachers.dispersion import (  # noqa: E402
    BOHR,
    HARTREE,
    DispersionTeacher,
    properties,
)

NACL, TIO2, CU = (
    from_structure(n, structures()[n]) for n in ("NaCl", "TiO2", "fcc-Cu")
)
WATER = np.array(
    [
        [0.0, 0.0, -0.73578586109551],
        [1.44183152868459, 0.0, 0.36789293054775],
        [-1.44183152868459, 0.0, 0.36789293054775],
    ]
)
"""O, H, H, in Bohr: the example in the manual of dftd4."""


def answer(*crystals: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """Return the teacher's answers for atoms and crystals."""
    found = DispersionTeacher()(make_batch(crystals, SMALL_GRAPH))
    return found.atoms.double().numpy(), found.crystals.double().numpy()


def alone(symbol: str, length: float) -> np.ndarray:
    """Return the properties of an atom in a cubic cell."""
    one = crystal("alone", np.eye(3) * length, [symbol], [[0, 0, 0]])
    return properties(one.atomic_numbers, one.frac_coords, one.cell)[0]


# ------------------------------------------------------------------------ known answers


def test_water_in_a_large_box_is_the_molecule_of_the_manual():
    cell = np.eye(3) * 40
    found = properties(np.array([8, 1, 1]), WATER * BOHR / 40, cell)
    molecule = dftd4.DispersionModel(np.array([8, 1, 1]), WATER)
    known = molecule.get_properties()
    np.testing.assert_allclose(found[:, 0], known["coordination numbers"], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], known["partial charges"], rtol=1e-4)
    np.testing.assert_allclose(np.exp(found[:, 2]), np.diag(known["c6 coefficients"]),
                               rtol=1e-4)  # fmt: skip
    # As printed in the manual.
    np.testing.assert_allclose(
        np.exp(found[:, 3]), [6.74893641, 1.33914933, 1.33914933], rtol=1e-4
    )
    energy = molecule.get_dispersion(dftd4.DampingParam(method="pbe"), grad=False)
    assert found[:, 4].sum() == pytest.approx(HARTREE * energy["energy"], rel=1e-3)


@pytest.mark.parametrize(
    ("symbol", "polarizability", "c6"),
    [("He", 1.383, 1.46), ("Ne", 2.661, 6.38), ("Ar", 11.08, 64.3), ("Kr", 16.78, 130)],
)
def test_noble_gases_are_those_of_experiments(symbol, polarizability, c6):
    # Kumar and Meath, Mol. Phys. 54, 823 (1985), doi:10.1080/00268978500103191.
    number, charge, log_c6, log_polarizability, _ = alone(symbol, 15.0)
    assert (number, charge) == (0, 0)
    assert np.exp(log_polarizability) == pytest.approx(polarizability, rel=0.08)
    assert np.exp(log_c6) == pytest.approx(c6, rel=0.08)


def test_far_argon_atoms_attract_each_other_by_c6_and_c8():
    # C6 as above; C8 from Thakkar et al., J. Chem. Phys. 97, 3252 (1992).
    images = (np.array(list(np.ndindex(9, 9, 9))) - 4) * 12.0 / BOHR
    r = np.linalg.norm(images, axis=1)
    r = r[(r > 0) & (r < 40)]
    energy = -HARTREE / 2 * (64.3 / r**6 + 0.95948085 * 1623 / r**8).sum()
    assert alone("Ar", 12.0)[4] == pytest.approx(energy, rel=0.03)


def neighbours(one: Crystal) -> np.ndarray:
    """Return the distances of all pairs and images in Bohr, (N, N, images)."""
    places = one.frac_coords @ one.cell
    images = (np.array(list(np.ndindex(9, 9, 9))) - 4) @ one.cell
    between = places[None, :, None] - places[:, None, None] + images
    r = np.linalg.norm(between, axis=-1) / BOHR
    return np.where(r > 1e-9, r, np.inf)


def plain(one: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """Return D4's coordination numbers and the charges of H and O, from the papers.

    E. Caldeweyher et al., J. Chem. Phys. 150, 154122 (2019), and parameters published
    with it.
    """
    oxygen = one.atomic_numbers == 8
    radius = np.where(oxygen, 0.63, 0.32) * 4 / 3 / BOHR
    affinity = np.where(oxygen, 3.44, 2.20)
    r, touching = neighbours(one), (radius[:, None] + radius)[..., None]
    bonds = (0.5 * (1 + erf(-7.5 * (r / touching - 1)))).sum(axis=-1)  # (N, N)
    unlike = abs(affinity[:, None] - affinity)
    polar = 4.10451 * np.exp(-((unlike + 19.08857) ** 2) / (2 * 11.28174**2))
    number = bonds.sum(axis=1)
    number = np.log(1 + np.exp(8)) - np.log(1 + np.exp(8 - number))
    wanted = -np.where(oxygen, 1.56866440, 1.23695041)
    wanted += np.where(oxygen, 0.11689703, 0.04916110) * np.sqrt(number)
    width = np.where(oxygen, 1.23166285, 0.55159092)
    hardness = np.where(oxygen, 0.03151644, -0.35015861)
    # Point charges, less what Gaussians that overlap miss. The background of a charged
    # cell adds one constant to all pairs, which does not matter: charges add up to 0.
    pymatgen = one.to_pymatgen()
    pymatgen.add_site_property("charge", [1.0] * len(oxygen))
    points = EwaldSummation(pymatgen).total_energy_matrix / EwaldSummation.CONV_FACT
    both = np.sqrt(width[:, None] ** 2 + width**2)[..., None]
    matrix = np.ones((len(oxygen) + 1,) * 2)
    matrix[:-1, :-1] = 2 * points * BOHR - (erfc(r / both) / r).sum(axis=-1)
    matrix[:-1, :-1] += np.diag(hardness + np.sqrt(2 / np.pi) / width)
    matrix[-1, -1] = 0
    charges = np.linalg.solve(matrix, np.append(wanted, 0))[:-1]
    return (bonds * polar).sum(axis=1), charges


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_numbers_and_charges_equal_a_plain_second_implementation(seed):
    hydrogen_and_oxygen = np.array([8, 1, 1, 8, 8, 1], np.uint8)
    one = replace(random_crystal(seed), atomic_numbers=hydrogen_and_oxygen)
    atoms, _ = answer(one)
    number, charges = plain(one)
    np.testing.assert_allclose(atoms[:, 0], number, rtol=1e-5)
    np.testing.assert_allclose(atoms[:, 1], charges, atol=1e-5)
    assert charges.std() > 0.1


def test_energies_add_up_to_that_of_all_pairs():
    model = dftd4.DispersionModel(
        TIO2.atomic_numbers,
        TIO2.frac_coords @ TIO2.cell / BOHR,
        lattice=TIO2.cell / BOHR,
        periodic=np.ones(3, bool),
    )
    pairs = dftd4.DampingParam(method="pbe", atm=False)
    energy = HARTREE * model.get_dispersion(pairs, grad=False)["energy"]
    atoms, _ = answer(TIO2)
    assert atoms[:, 4].sum() == pytest.approx(energy, rel=0.005)


def test_a_crystal_has_its_polarizability_per_volume():
    atoms, crystals = answer(TIO2, NACL)
    cells = [abs(np.linalg.det(c.cell)) / BOHR**3 for c in (TIO2, NACL)]
    sums = np.exp(atoms[:6, 3]).sum(), np.exp(atoms[6:, 3]).sum()
    np.testing.assert_allclose(
        crystals[:, 0], np.log(np.array(sums) / cells), rtol=1e-5
    )


# -------------------------------------------------------------------------- invariances


def test_answers_follow_the_atoms_and_not_the_description():
    one = random_crystal(3)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    order = np.array([3, 0, 5, 1, 4, 2])
    wanted, of_crystal = answer(one)
    assert wanted[:, 1].std() > 0.1
    doubled = from_structure("doubled", one.to_pymatgen() * (1, 2, 1))
    for other, atoms in (
        (replace(one, frac_coords=one.frac_coords[order],
                 atomic_numbers=one.atomic_numbers[order]), wanted[order]),
        (replace(one, cell=one.cell @ turn), wanted),
        (replace(one, cell=-one.cell), wanted),  # left-handed
        (replace(one, frac_coords=(one.frac_coords + 0.3) % 1), wanted),
        (doubled, np.repeat(wanted, 2, axis=0)),
    ):  # fmt: skip
        found, crystals = answer(other)
        np.testing.assert_allclose(found, atoms, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(crystals, of_crystal, rtol=1e-4)


def test_every_element_of_a_store_is_known():
    for z in range(1, 101):
        found = properties(np.array([z]), np.zeros((1, 3)), np.eye(3) * 3.5)
        assert np.isfinite(found).all(), z


# ------------------------------------------------------------------------- as a teacher


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    store = open_store(tmp_path / "s.h5", [NACL])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError,
        match=r"`dftd4` is not installed; `pip install crysdistill\[dispersion\]`",
    ):
        make_teacher("dftd4", store)


def test_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="`dftd4` has no model 'd3'; name it alone"):
        make_teacher("dftd4:d3", open_store(tmp_path / "s.h5", [NACL]))


def test_what_dftd4_refuses_is_named():
    both = replace(NACL, frac_coords=np.zeros_like(NACL.frac_coords))
    batch = make_batch([NACL], SMALL_GRAPH)
    batch.frac_coords = torch.from_numpy(both.frac_coords).float()
    with pytest.raises(
        BadStructure,
        match=r"NaCl: dftd4 cannot answer \(RuntimeError: Too close interatomic "
        r"distances found\); leave that crystal out of the store",
    ):
        DispersionTeacher()(batch)


def test_another_release_of_dftd4_is_asked_again(monkeypatch):
    before = DispersionTeacher().fingerprint()
    assert len(before) == 64
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    assert DispersionTeacher().fingerprint() != before


def test_it_has_seen_no_crystal(tmp_path):
    store = open_store(tmp_path / "s.h5", [NACL])
    teacher = make_teacher("dftd4", store)
    made = teacher.provenance
    assert made.origin.endswith(", whose parameters were fitted to molecules")
    assert made.licence == ""
    assert not made.formulas.has(store).any()
    assert seen(teacher.learned, store)[0] == "clean"


@pytest.mark.parametrize("levels", [None, ["atoms", "crystals"]])
def test_both_computed_teachers_teach_on_a_corpus(tmp_path, levels):
    salts = [random_crystal(seed, atoms=3, elements=(8, 14)) for seed in range(16)]
    salts = [
        replace(one, atomic_numbers=np.array([8, 14, 8], np.uint8)) for one in salts
    ]
    corpus = write_store(tmp_path / "corpus.h5", [*salts, CU])
    config = pretraining_config(
        corpus,
        tmp_path / "run",
        objectives={"teacher": {"teachers": ["dftd4", "ewald"], "levels": levels}},
    )
    config = replace(config, trainer=replace(config.trainer, epochs=1))
    weights = pretrain(config)
    assert len(list(Path(f"{corpus}.teachers").iterdir())) == 2
    # Nobody's crystals are behind these answers but the corpus' own.
    assert read_header(weights).provenance.taught_by == ""
