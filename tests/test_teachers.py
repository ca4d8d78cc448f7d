"""Teachers: their answers, and how a configuration finds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, make_batch
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.store import Store
from crysdistill.teachers import (
    EncoderTeacher,
    RandomTeacher,
    TableTeacher,
    answers_for,
    make_teacher,
)
from crysdistill.teachers.random import fit_batch_norms
from crysdistill.teachers.teacher import Foreign
from crysdistill.transfer.distillation import Distillation
from crysdistill.transfer.published import PUBLISHED_GRAPH, import_cgcnn
from crysdistill.transfer.seen import seen
from crysdistill.transfer.weights import Provenance, save_weights
from tests.conftest import from_structure, random_crystal, structures
from tests.test_published_cgcnn import published_checkpoint
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled, open_store

CRYSTALS = labelled(9)
MADE = Provenance(corpus="c0", licence="CC-BY-4.0", origin="runs/pretrain")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(tmp_path_factory.mktemp("store") / "s.h5", CRYSTALS)


@pytest.fixture(scope="module")
def encoder() -> CGCNN:
    torch.manual_seed(0)
    made = CGCNN(width=8)
    fit_batch_norms(made, [make_batch(CRYSTALS, SMALL_GRAPH)])
    return made.train()


@pytest.fixture
def weights(encoder, tmp_path) -> Path:
    return save_weights(tmp_path / "w.safetensors", encoder, SMALL_GRAPH, MADE)


@pytest.fixture
def batch(store) -> CrystalBatch:
    return store.batch([2, 0, 5])


# ------------------------------------------------------------ an encoder as a teacher


def test_a_teacher_stays_as_it_is(encoder, batch):
    teacher = EncoderTeacher(encoder, SMALL_GRAPH)
    assert (teacher.atom_width, teacher.crystal_width) == (8, 8)
    before = teacher.fingerprint()
    answer = teacher(batch)
    assert not answer.atoms.requires_grad
    assert not answer.crystals.requires_grad
    teacher.train()
    teacher.encoder.train()  # a careless caller
    assert torch.equal(teacher(batch).atoms, answer.atoms)
    assert not teacher.encoder.training
    assert teacher.fingerprint() == before
    # An answer does not depend on the other crystals of the batch.
    alone = teacher(make_batch([CRYSTALS[2]], SMALL_GRAPH))
    torch.testing.assert_close(alone.atoms, answer.atoms[: batch.ptr[1]])
    torch.testing.assert_close(alone.crystals, answer.crystals[:1])
    # The original encoder is unchanged.
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())


def test_a_teacher_is_no_part_of_the_module_that_holds_it(batch):
    student = CGCNN(width=8)
    names = set(student.state_dict())
    student.teacher = RandomTeacher({"name": "cgcnn", "width": 8}, 1, SMALL_GRAPH)
    assert set(student.state_dict()) == names
    atoms = student(batch).atoms
    Distillation(8, 8)(atoms, student.teacher(batch).atoms, batch).backward()
    assert student.embedding.weight.grad.any()
    assert all(p.grad is None for p in student.teacher.encoder.parameters())


def test_what_its_answers_depend_on_is_in_the_fingerprint(encoder):
    one = EncoderTeacher(encoder, SMALL_GRAPH).fingerprint()
    assert one == EncoderTeacher(encoder, SMALL_GRAPH, name="other").fingerprint()
    assert one != EncoderTeacher(encoder, PUBLISHED_GRAPH).fingerprint()
    torch.manual_seed(0)
    other = CGCNN(width=8, normalize=True)
    other.load_state_dict(encoder.state_dict())
    assert one != EncoderTeacher(other, SMALL_GRAPH).fingerprint()
    other = CGCNN(width=8)
    other.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        other.embedding.bias[0] += 1e-3
    assert one != EncoderTeacher(other, SMALL_GRAPH).fingerprint()


# --------------------------------------------------------------------- a random teacher


def test_random_teachers_depend_on_their_seed_alone():
    settings = {"name": "cgcnn", "width": 8}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = RandomTeacher(settings, 1, SMALL_GRAPH)
    assert torch.equal(torch.rand(1), expected)
    assert one.encoder.settings["cutoff"] == SMALL_GRAPH.cutoff
    again, other = (RandomTeacher(settings, seed, SMALL_GRAPH) for seed in (1, 2))
    assert one.fingerprint() == again.fingerprint()
    assert one.fingerprint() != other.fingerprint()


def test_batch_norms_of_a_random_teacher_are_fitted_to_the_crystals(store):
    teacher = RandomTeacher({"name": "cgcnn", "width": 8}, 1, SMALL_GRAPH)
    teacher.prepare(store, np.array([1, 4, 8]))
    torch.manual_seed(1)
    plain = CGCNN(width=8, cutoff=SMALL_GRAPH.cutoff)
    seen_by_norm = []
    norm = plain.convolutions[0].atom_norm
    norm.register_forward_pre_hook(lambda _, x: seen_by_norm.append(x[0].detach()))
    plain(store.batch([1, 4, 8]))
    fitted = teacher.encoder.convolutions[0].atom_norm
    torch.testing.assert_close(fitted.running_mean, seen_by_norm[0].mean(0))
    assert fitted.momentum == norm.momentum


def test_statistics_of_batch_norms_are_plain_averages_over_batches(store):
    torch.manual_seed(1)
    fitted = CGCNN(width=8)
    plain = CGCNN(width=8)
    plain.load_state_dict(fitted.state_dict())
    batches = [store.batch([0, 1, 2]), store.batch([3, 4, 5, 6])]
    fit_batch_norms(fitted, batches)
    seen_by_norm = []
    plain.convolutions[0].atom_norm.register_forward_pre_hook(
        lambda _, x: seen_by_norm.append(x[0].detach())
    )
    for part in batches:
        plain(part)
    mean = (seen_by_norm[0].mean(0) + seen_by_norm[1].mean(0)) / 2
    torch.testing.assert_close(fitted.convolutions[0].atom_norm.running_mean, mean)
    assert not fitted.training


# ------------------------------------------------------------------ by configuration


def test_a_weights_file(weights, encoder, store, batch):
    teacher = make_teacher(weights, store)
    torch.testing.assert_close(teacher(batch).atoms, encoder.eval()(batch).atoms)
    encoder.train()
    assert teacher.graph == SMALL_GRAPH
    assert teacher.provenance == MADE
    assert make_teacher(str(weights), store).fingerprint() == teacher.fingerprint()


def test_a_random_one(store):
    teacher = make_teacher("random", store, seed=4, encoder=SMALL_ENCODER)
    expected = RandomTeacher(SMALL_ENCODER, 4, store.graph).fingerprint()
    assert teacher.fingerprint() == expected
    assert teacher.graph == store.graph
    assert seen(teacher.learned, store)[0] == "clean"


def test_a_published_checkpoint_is_asked_on_its_own_graph(store, tmp_path):
    path = tmp_path / "my-gap.pth.tar"
    torch.save(published_checkpoint(), path)
    teacher = make_teacher(path, store)
    assert teacher.graph == PUBLISHED_GRAPH != store.graph
    answers = answers_for(teacher, store, np.array([4, 1]), workers=1, progress=False)
    wanted = import_cgcnn(path).encoder(
        make_batch([CRYSTALS[1], CRYSTALS[4]], PUBLISHED_GRAPH)
    )
    found = answers.gather_atoms(torch.tensor([1, 4]))
    torch.testing.assert_close(found, wanted.atoms.detach(), atol=1e-5, rtol=1e-5)
    word, why = seen(teacher.learned, store)
    assert word == "unknown"
    assert "imported from my-gap.pth.tar" in why


def test_a_published_checkpoint_of_the_authors(shared_data, store):
    path = shared_data / "cgcnn_published" / "band-gap.pth.tar"
    teacher = make_teacher(path, store)
    assert (teacher.atom_width, teacher.provenance.licence) == (64, "MIT")
    assert "published CGCNN code" in teacher.provenance.origin


def test_what_a_file_is_follows_from_what_is_in_it(weights, store, tmp_path):
    odd = tmp_path / "my.pth.tar"
    odd.write_bytes(weights.read_bytes())
    expected = make_teacher(weights, store).fingerprint()
    assert make_teacher(odd, store).fingerprint() == expected
    published = tmp_path / "published.weights"
    torch.save(published_checkpoint(), published)
    assert make_teacher(published, store).graph == PUBLISHED_GRAPH


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            "chgnett",
            "no teacher 'chgnett': .* none of random, chgnet.*; did you mean `chg",
        ),
        ("radom", "did you mean `random`"),
        ("{folder}/w.safetensor", "did you mean `.*/w.safetensors`"),
        ("{folder}", "is a folder; give the file in it"),
        ("{folder}/text.txt", "text.txt is not a weights file"),
        ("{folder}/other.safetensors", "not a weights file of crysdistill"),
        ("{folder}/cut.safetensors", "is cut short"),
        ("{folder}/any.pkl", "is not a readable PyTorch checkpoint"),
        ("{store}", "is a store, which holds no embeddings; .* --level atoms"),
        ("chgnet:0.9", "unknown CHGNet '0.9'; choose one of 0.3.0, r2scan, 0.2.0"),
        ("{folder}/w.safetensors:2", "w.safetensors is no table of embeddings"),
    ],
)
def test_what_is_no_teacher_is_refused_in_one_line(spec, text, weights, store):
    folder = weights.parent
    (folder / "text.txt").write_text("hello")
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:-40])
    (folder / "any.pkl").write_bytes(b"\x80\x04K\x01.")
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    with pytest.raises(InputError, match=text) as caught:
        make_teacher(spec.format(folder=folder, store=store.path), store)
    assert "\n" not in str(caught.value)


def test_a_teacher_tells_what_it_learned_from(weights, store):
    """Its students record the source, and check test sets against it."""
    teacher = make_teacher(weights, store)
    assert (teacher.provenance.licence, teacher.provenance.corpus) == (
        "CC-BY-4.0",
        "c0",
    )
    foreign = Foreign(Provenance(origin="MODEL, trained on everything"))
    word, why = seen(foreign, store)
    assert word == "unknown"
    assert why == (
        "unknown (MODEL, trained on everything; nobody has compared its crystals with "
        "this dataset)"
    )
    check = DatasetCheck("d", store.structures_hash, "0" * 64, ("id",), 9, 1, 0, kept=1)
    compared = Foreign(Provenance(origin="MODEL", checks=[check]))
    assert seen(compared, store)[1].startswith(
        "unknown (1 of 9 structures of d are also in the corpus, perhaps with their "
        "labels)"
    )


def test_only_a_table_has_answers_at_hand(weights, store):
    teacher = make_teacher(weights, store)
    assert not isinstance(teacher, TableTeacher | nn.Module)
    assert teacher.at_hand(np.arange(3)) is None


def test_an_encoder_is_refused_a_crystal_without_neighbours(tmp_path, encoder):
    """The error names a crystal without edges in the teacher's graph."""
    far = replace(random_crystal(0, atoms=1), material_id="far")
    far = replace(far, cell=np.eye(3) * 6.5)
    store = open_store(tmp_path / "far.h5", [*CRYSTALS[:2], far])
    short = replace(SMALL_GRAPH, cutoff=5.0)
    with pytest.raises(InputError, match=r"far: no neighbour within 5\.0 Å of atom 0"):
        answers_for(
            EncoderTeacher(encoder, short), store, np.arange(3), workers=1,
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "widths"), [("dftd4", (5, 1)), ("ewald", (2, 1))])
def test_computed_answers_are_kept(name, widths, tmp_path, monkeypatch):
    if name == "dftd4":
        pytest.importorskip("dftd4", reason="the extra `dispersion`")
    known = [from_structure(n, structures()[n]) for n in ("NaCl", "fcc-Cu", "TiO2")]
    store = open_store(tmp_path / "s.h5", known)
    teacher = make_teacher(name, store)
    first = answers_for(teacher, store, [0, 2], workers=1, progress=False)
    monkeypatch.setattr(type(teacher), "__call__", None)  # nobody asks again
    again = make_teacher(name, store)
    found = answers_for(again, store, [0, 2], workers=1, progress=False)
    rows = store.batch([2, 0]).rows
    torch.testing.assert_close(found.gather_atoms(rows), first.gather_atoms(rows))
    torch.testing.assert_close(found.gather_crystals(rows), first.gather_crystals(rows))
    assert (found.atom_width, found.crystal_width) == widths
