"""CHGNet as a teacher; tests that need its package are skipped without it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import make_batch
from crysdistill.store.store import Store
from crysdistill.teachers import answers_for, make_teacher
from crysdistill.teachers.chgnet import MODELS, structures_of
from crysdistill.transfer.seen import seen
from tests.conftest import crystal, from_structure, structures
from tests.test_layers import ROOT
from tests.toy_stores import SMALL_GRAPH, labelled, open_store

needs_chgnet = pytest.mark.skipif(
    importlib.util.find_spec("chgnet") is None,
    reason="CHGNet is not installed: `pip install crysdistill[chgnet]`",
)
NACL, TIO2, CU = (
    from_structure(n, structures()[n]) for n in ("NaCl", "TiO2", "fcc-Cu")
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("store") / "s.h5"
    return open_store(path, [NACL, TIO2, CU])


# -------------------------------------------------------------------- without CHGNet


def test_structures_of_a_batch_are_those_of_its_crystals():
    batch = make_batch([TIO2, CU], SMALL_GRAPH)
    for found, crystal_ in zip(structures_of(batch), (TIO2, CU), strict=True):
        wanted = crystal_.to_pymatgen()
        assert [s.specie for s in found] == [s.specie for s in wanted]
        np.testing.assert_allclose(found.frac_coords, wanted.frac_coords, atol=1e-6)
        np.testing.assert_allclose(
            found.lattice.matrix, wanted.lattice.matrix, atol=1e-5
        )


def test_without_the_package_the_extra_is_named(store, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError,
        match=r"`chgnet` is not installed; `pip install crysdistill\[chgnet\]`",
    ):
        make_teacher("chgnet", store)


@pytest.mark.slow
def test_the_room_of_teachers_loads_no_foreign_model():
    code = (
        "import crysdistill.teachers, sys; "
        "assert not {'chgnet', 'pymatgen.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=ROOT)


# ----------------------------------------------------------------------- with CHGNet


@needs_chgnet
def test_answers_are_what_chgnet_says_of_each_structure(store):
    from chgnet.model.model import CHGNet

    teacher = make_teacher("chgnet", store)
    assert (teacher.atom_width, teacher.crystal_width) == (65, 64)
    batch = store.batch([1, 2])
    answer = teacher(batch)
    assert not answer.atoms.requires_grad
    model = CHGNet.load(use_device="cpu", verbose=False)
    for k, crystal_ in enumerate((TIO2, CU)):
        alone = model.predict_structure(
            crystal_.to_pymatgen(),
            task="e",
            return_site_energies=True,
            return_atom_feas=True,
            return_crystal_feas=True,
        )
        atoms = answer.atoms[batch.batch == k].numpy()
        np.testing.assert_allclose(atoms[:, :64], alone["atom_fea"], atol=2e-4)
        np.testing.assert_allclose(atoms[:, 64], alone["site_energies"], atol=2e-4)
        # Site energies, in eV, add up to the total energy, which is given per atom.
        assert atoms[:, 64].mean() == pytest.approx(float(alone["e"]), abs=2e-4)
        count = len(crystal_.atomic_numbers)
        np.testing.assert_allclose(
            answer.crystals[k], alone["crystal_fea"] / count, atol=2e-4
        )


@needs_chgnet
def test_a_supercell_has_the_same_answers(tmp_path):
    cell = NACL.to_pymatgen()
    cell.make_supercell([2, 1, 1])
    doubled = from_structure("doubled", cell)
    store = open_store(tmp_path / "s.h5", [NACL, doubled])
    answer = make_teacher("chgnet", store)(store.batch([0, 1]))
    torch.testing.assert_close(
        answer.crystals[0], answer.crystals[1], atol=1e-3, rtol=1e-3
    )


@needs_chgnet
def test_answers_are_kept_for_each_model(store, capsys):
    for spec in ("chgnet", "chgnet:r2scan"):
        teacher = make_teacher(spec, store)
        found = answers_for(teacher, store, [0, 2], workers=1, progress=False)
        batch = store.batch([2, 0])
        torch.testing.assert_close(
            found.gather_atoms(batch.rows), teacher(batch).atoms, atol=2e-4, rtol=1e-4
        )
    assert len(list(Path(f"{store.path}.teachers").iterdir())) == 2
    assert capsys.readouterr().out == ""  # CHGNet would print its number of parameters


@needs_chgnet
def test_it_says_what_it_learned_from(store):
    for model in MODELS:
        teacher = make_teacher(f"chgnet:{model}", store)
        made = teacher.provenance
        assert made.origin.startswith(f"CHGNet {model}, trained on MPtrj")
        assert "Materials Project" in made.origin
        assert made.licence == "BSD-3-Clause-LBNL AND CC-BY-4.0"
        word, why = seen(teacher.learned, store)
        assert word == "unknown"
        assert "Materials Project; nobody has compared its crystals" in why


@needs_chgnet
def test_elements_that_it_does_not_know_are_counted_and_named(tmp_path):
    heavy = crystal("cm", np.eye(3) * 3, ["Cm"], [[0, 0, 0]])
    store = open_store(tmp_path / "s.h5", [NACL, heavy])
    teacher = make_teacher("chgnet", store)
    with pytest.raises(
        InputError,
        match=r"1 of 2 crystals have elements that CHGNet does not know \(cm\); leave "
        r"them out with `crysdistill build .*s.h5 -o NEW.h5 --without Cm`",
    ):
        answers_for(teacher, store, [0, 1], workers=1, progress=False)
    teacher.prepare(store, np.array([0]))  # fine while nobody asks for that crystal


@needs_chgnet
def test_a_lonely_atom_is_named(tmp_path):
    lonely = replace(labelled(1)[0], material_id="lonely", cell=np.eye(3) * 6.5)
    store = open_store(tmp_path / "s.h5", [NACL, lonely])
    with pytest.raises(
        InputError, match="lonely: CHGNet finds no neighbour of an atom"
    ):
        answers_for(
            make_teacher("chgnet", store), store, [0, 1], workers=1, progress=False
        )


@needs_chgnet
def test_what_it_cannot_be_asked_about_is_known_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("crysdistill.teachers.chgnet._AT_ONCE", 2)  # several parts
    heavy = crystal("cm", np.eye(3) * 3, ["Cm"], [[0, 0, 0]])
    lonely = replace(labelled(1)[0], material_id="lonely", cell=np.eye(3) * 6.5)
    store = open_store(tmp_path / "s.h5", [NACL, heavy, lonely, CU, TIO2])
    teacher = make_teacher("chgnet", store)
    rows = np.array([4, 1, 2, 0, 3])
    known = [True, False, False, True, True]
    assert teacher.knows(store, rows).tolist() == known
    answers_for(teacher, store, rows[known], workers=1, progress=False)


@needs_chgnet
@pytest.mark.slow
def test_processes_say_the_same(tmp_path, monkeypatch, forked_workers):
    monkeypatch.setattr("crysdistill.teachers.asking._SLOW_CRYSTALS", 1)
    store = open_store(tmp_path / "s.h5", [NACL, TIO2, CU])
    teacher = make_teacher("chgnet", store)
    found = answers_for(teacher, store, [0, 1, 2], workers=2, progress=False)
    batch = store.batch([0, 1, 2])
    torch.testing.assert_close(
        found.gather_atoms(batch.rows), teacher(batch).atoms, atol=2e-4, rtol=1e-4
    )
