"""Teachers as frozen encoders: in readouts, in `fit`, and in weights files."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from crysdistill.encoders import ENCODERS, make_encoder
from crysdistill.errors import InputError
from crysdistill.objectives import make_objective
from crysdistill.store.store import Store
from crysdistill.teachers import answers_for, make_teacher
from crysdistill.teachers.frozen import FrozenTeacher, asked
from crysdistill.teachers.live import LIVE
from crysdistill.teachers.teacher import Answer, Foreign, Teacher
from crysdistill.training import candidates
from crysdistill.training.fit import fit
from crysdistill.training.inference import predict
from crysdistill.training.settings import (
    AcrossSettings,
    SplitSettings,
)
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.seen import with_teachers
from crysdistill.transfer.side_by_side import SideBySide
from crysdistill.transfer.stack import Stack
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import (
    Provenance,
    load_predictor,
    read_header,
    save_weights,
)
from tests.toy_runs import fit_config
from tests.toy_stores import SMALL_GRAPH, labelled, write_store

DENSITY = Target("density", "1/Å³")
SMALL = ENCODERS["cgcnn"].SMALL
STRANGE = int(labelled(1)[0].atomic_numbers[0])
"""The element that the teacher below does not know."""


def strange(crystal) -> bool:
    return bool((crystal.atomic_numbers == STRANGE).any())


class Knowing(Teacher):
    """Knows the density: two numbers for each atom, and the label for each crystal."""

    atom_width, crystal_width = 2, 1
    calls = 0

    def __init__(self, model: str) -> None:
        self.model = model
        self.name = "Knowing"
        self.learned = Foreign(Provenance(origin="Knowing, trained on secrets"))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"knowing {self.model}".encode()).hexdigest()

    def knows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        return np.array([not strange(c) for c in store.crystals(rows.tolist())])

    def __call__(self, batch):
        Knowing.calls += batch.num_graphs
        z = batch.atomic_numbers.float()
        size = torch.bincount(batch.batch).float()
        volume = batch.cell.det().abs() / size
        mean = torch.zeros_like(size).index_add(0, batch.batch, z) / size
        atoms = torch.stack([z, z.square()], dim=1)
        return Answer(atoms, (mean / volume)[:, None])


@pytest.fixture(autouse=True)
def live(monkeypatch):
    """Put the teacher among those that a name stands for."""
    monkeypatch.setitem(LIVE, "knowing", Knowing)
    Knowing.calls = 0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    without = [c for c in labelled(200) if not strange(c)][:60]
    return write_store(tmp_path_factory.mktemp("frozen") / "d.h5", without)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("known") / "known.safetensors"
    return save_weights(path, make_encoder("cgcnn", SMALL_GRAPH, **SMALL), SMALL_GRAPH)


def config(store, out, **more):
    return fit_config(store, out, **{"teachers": ["knowing"], **more})


def test_its_embeddings_are_the_answers(store):
    batch = Store.open(store).batch(np.arange(5))
    found, answer = FrozenTeacher("knowing")(batch, layers=True), Knowing("")(batch)
    assert torch.equal(found.atoms[:, :2], answer.atoms)
    assert torch.equal(found.atoms[:, 2], answer.crystals[batch.batch, 0])
    assert found.layers == (found.atoms,)
    torch.testing.assert_close(found.crystals[:, 2:], answer.crystals)
    for k in range(5):
        own = answer.atoms[batch.batch == k].mean(dim=0)
        torch.testing.assert_close(found.crystals[k, :2], own)
    assert not list(FrozenTeacher("knowing").parameters())


def test_crystals_are_asked_about_once(store):
    opened, rows = Store.open(store), np.array([3, 1, 7])
    frozen = FrozenTeacher("knowing")
    direct = frozen(opened.batch(rows)).atoms
    Knowing.calls = 0
    for _ in range(2):
        with asked([SideBySide([frozen, frozen])], opened, rows, progress=False):
            assert torch.equal(frozen(opened.batch(rows)).atoms, direct)
            with pytest.raises(InputError, match="was not asked about row 2 of the"):
                frozen(opened.batch(np.array([2])))
    assert Knowing.calls == 3
    frozen(opened.batch(rows))  # afterwards it computes
    assert Knowing.calls == 6


def readout(store: Store, encoder) -> FrozenPredictor:
    labels = store.property("density")
    outputs = Outputs([DENSITY], [Normalizer.fit(DENSITY, labels)])
    batch = store.batch(np.arange(len(store)), ["density"])
    known = FrozenPredictor.read(encoder, [batch])
    return FrozenPredictor.fit(encoder, known, outputs, store.graph)


def test_a_weights_file_names_the_teacher(store, tmp_path):
    opened = Store.open(store)
    own = make_encoder("cgcnn", SMALL_GRAPH, **SMALL)
    batch = opened.batch(np.arange(9))
    for kind, encoder in (
        ("alone", FrozenTeacher("knowing")),
        ("beside", SideBySide([own, FrozenTeacher("knowing")])),
    ):
        made = readout(opened, encoder)
        path = save_weights(tmp_path / f"{kind}.safetensors", made)
        torch.testing.assert_close(load_predictor(path).answer(batch), made(batch))
    settings = read_header(tmp_path / "alone.safetensors").encoder["settings"]
    assert settings["teacher"] == "knowing"
    assert settings["fingerprint"] == Knowing("").fingerprint()


def test_members_of_a_stack_may_share_an_encoder(store, tmp_path):
    opened = Store.open(store)
    own = make_encoder("cgcnn", SMALL_GRAPH, **SMALL)
    both = SideBySide([own, FrozenTeacher("knowing")])
    made = Stack([readout(opened, own), readout(opened, both)])
    path = save_weights(tmp_path / "s.safetensors", made)
    batch = opened.batch(np.arange(9))
    torch.testing.assert_close(load_predictor(path).answer(batch), made(batch))


def test_an_ensemble_asks_the_teacher_of_its_members_once(store, tmp_path, capsys):
    opened, rows = Store.open(store), np.array([2, 9, 4])
    shared = readout(opened, FrozenTeacher("knowing"))
    both = SideBySide([FrozenTeacher("knowing"), FrozenTeacher("knowing")])
    members = [shared, readout(opened, both)]
    for k, member in enumerate(members):
        save_weights(tmp_path / f"{k}.safetensors", member)
    teacher = make_teacher(f"ensemble:{tmp_path}/*.safetensors", opened)
    Knowing.calls = 0
    for _ in range(2):
        found = answers_for(teacher, opened, rows)
    assert Knowing.calls == 3
    batch = opened.batch(rows)
    direct = [
        member.outputs.normalizers[0].denormalize(member.answer(batch))
        for member in members
    ]
    told = found.gather_crystals(torch.from_numpy(rows))
    torch.testing.assert_close(told[:, :1], sum(direct) / 2)
    assert "asking Knowing" in capsys.readouterr().out
    Knowing.calls = 0
    teacher(opened.batch(np.array([0])))  # answers are held only while it is asked
    assert Knowing.calls == 3


def test_an_ensemble_and_its_teachers_keep_answers_apart(store, tmp_path):
    opened, rows = Store.open(store), np.array([2, 9, 4])
    save_weights(tmp_path / "m.safetensors", readout(opened, FrozenTeacher("knowing")))
    teacher = make_teacher(f"ensemble:{tmp_path}/m.safetensors", opened)
    moved = Store.open(shutil.copy(store, tmp_path / "s.h5"))
    Path(f"{moved.path}.teachers").write_text("a file in the way")
    run = tmp_path / "run"
    found = answers_for(teacher, moved, rows, fallback=run, progress=False)
    assert len(found) == 3
    assert len(list(run.glob("teacher/*/about.json"))) == 2


def test_an_ensemble_knows_what_the_teachers_of_its_members_know(tmp_path):
    crystals = labelled(40)
    known = [not strange(crystal) for crystal in crystals]
    assert 0 < sum(known) < 40
    fitted = write_store(
        tmp_path / "known.h5",
        [c for c, one in zip(crystals, known, strict=True) if one],
    )
    member = readout(Store.open(fitted), FrozenTeacher("knowing"))
    save_weights(tmp_path / "m.safetensors", member)
    every = Store.open(write_store(tmp_path / "all.h5", crystals))
    teacher = make_teacher(f"ensemble:{tmp_path}/m.safetensors", every)
    assert teacher.knows(every, np.arange(40)).tolist() == known
    objective = make_objective(
        "teacher", make_encoder("cgcnn", SMALL_GRAPH, **SMALL),
        teachers=[f"ensemble:{tmp_path}/m.safetensors"],
    )  # fmt: skip
    objective.prepare(every, np.arange(40))
    assert objective.speaks_of(np.arange(40)).tolist() == known


def test_a_file_is_read_before_anything_else_knows_teachers(store, tmp_path):
    pytest.importorskip("dftd4", reason="dftd4 is not installed")
    made = readout(Store.open(store), FrozenTeacher("dftd4"))
    path = save_weights(tmp_path / "d.safetensors", made)
    program = (
        "import sys; from crysdistill.transfer.weights import load_predictor; "
        "assert 'crysdistill.teachers' not in sys.modules; "
        "print(load_predictor(sys.argv[1]).encoder.settings['teacher'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("dftd4", "")


def test_another_release_is_refused(store, tmp_path, monkeypatch):
    made = readout(Store.open(store), FrozenTeacher("knowing"))
    path = save_weights(tmp_path / "k.safetensors", made)
    monkeypatch.setattr(Knowing, "fingerprint", lambda self: "0" * 64)
    said = (
        r"k.safetensors: this predictor was fitted to another release of Knowing; "
        r"install the one of knowing with which it was made"
    )
    with pytest.raises(InputError, match=said):
        load_predictor(path)


@pytest.mark.parametrize("name", ["random", "ensemble:runs", "table.h5", "CHGnt"])
def test_only_live_teachers_can_be_frozen(name):
    said = f"'{name}' cannot be frozen as it is; choose from chgnet, dftd4, ewald"
    with pytest.raises(InputError, match=said) as found:
        FrozenTeacher(name)
    assert ("did you mean" in str(found.value)) == (name == "CHGnt")


def test_fit_freezes_teachers_beside_the_weights(store, weights, tmp_path, capsys):
    path = fit(config(store, tmp_path / "fit", weights=[weights]))
    table = pd.read_csv(tmp_path / "fit" / "candidates.csv").set_index("candidate")
    alone = {name for name in table.index if "%" not in name}
    assert alone == {
        "scratch", "fine-tuned", "frozen", "knowing", "all together", "composition"
    }  # fmt: skip
    # It knows the label, so nothing without it comes near.
    assert table.loc["knowing", "density"] < 0.3 * table.loc["frozen", "density"]
    results = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert set(results["probe"]) == {
        "composition", "untrained", "known", "knowing", "all together"
    }  # fmt: skip
    assert "knowing" in results["chosen"] or "together" in results["chosen"]
    assert results["overlap"].startswith("unknown")
    header = read_header(path)
    assert "Knowing, trained on secrets" in header.provenance.taught_by
    said = " ".join(capsys.readouterr().out.split())
    assert "to predict, it asks knowing about every crystal" in said
    # A student of this predictor has learned from the teacher, too.
    ensemble = make_teacher(f"ensemble:{tmp_path / 'fit'}", Store.open(store))
    assert len(ensemble.members) == 1  # not the networks that it was made from
    strangers = with_teachers(Provenance(), [ensemble.learned]).taught_by
    assert "d.h5 (taught by Knowing, trained on secrets)" in strangers
    # The predictor asks the teacher about crystals of a file, and about each once.
    judged = pd.read_csv(tmp_path / "fit" / "predictions.csv").set_index("material_id")
    source = store.with_name(f"{store.name}-source") / "s.jsonl"
    Knowing.calls = 0
    out = predict(path, [source], tmp_path / "all.csv", workers=1, progress=False)
    again = pd.read_csv(out).set_index("material_id").loc[judged.index]
    np.testing.assert_allclose(again["density"], judged["prediction"], rtol=1e-3)
    assert Knowing.calls == len(pd.read_csv(out))


def test_a_mean_that_holds_a_teacher_has_seen_its_crystals(
    store, weights, tmp_path, monkeypatch
):
    for shares, seen in (
        ({"knowing": 0.5, "scratch": 0.5}, True),
        ({"composition": 0.5, "scratch": 0.5}, False),
    ):
        real = candidates.Workshop._judged

        def judged(self, name, predictor, sources, real=real):
            found = real(self, name, predictor, sources)
            return replace(found, score=0.0) if "%" in name else found

        with monkeypatch.context() as patch:
            patch.setattr(candidates, "choose_shares", lambda *_, s=shares: s)
            patch.setattr(candidates.Workshop, "_judged", judged)
            path = fit(config(store, tmp_path / f"{seen}", weights=[weights]))
        found = json.loads((tmp_path / f"{seen}" / "results.json").read_text())
        assert found["overlap"].startswith("unknown" if seen else "clean")
        taught = read_header(path).provenance.taught_by
        assert ("Knowing" in taught) == seen


def test_two_weights_and_a_teacher(store, weights, tmp_path):
    torch.manual_seed(1)
    second = tmp_path / "second.safetensors"
    save_weights(second, make_encoder("cgcnn", SMALL_GRAPH, **SMALL), SMALL_GRAPH)
    fit(config(store, tmp_path / "fit", weights=[weights, second]))
    results = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert {"known", "second", "all weights", "all together"} < set(results["probe"])


def test_teachers_without_weights(store, tmp_path):
    fit(config(store, tmp_path / "fit", weights=[]))
    table = pd.read_csv(tmp_path / "fit" / "candidates.csv")
    alone = {name for name in table["candidate"] if "%" not in name}
    assert alone == {"scratch", "knowing", "composition"}
    results = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert results["overlap"].startswith("unknown")


def test_a_test_set_in_another_store_has_its_own_answers(store, tmp_path):
    fresh = [c for c in labelled(300)[220:] if not strange(c)]
    other = write_store(tmp_path / "other.h5", fresh)
    out = tmp_path / "fit"
    path = fit(config(store, out, weights=[], test=AcrossSettings(dataset=other)))
    judged = pd.read_csv(out / "predictions.csv").set_index("material_id")
    assert len(judged) > 20
    all_ = predict(path, [other], tmp_path / "all.csv", progress=False)
    again = pd.read_csv(all_).set_index("material_id").loc[judged.index]
    np.testing.assert_allclose(again["density"], judged["prediction"], rtol=1e-4)


def test_crystals_that_a_teacher_does_not_know(store, tmp_path):
    crystals = labelled(90)
    names = [c.material_id for c in crystals if strange(c)]
    mixed = write_store(tmp_path / "mixed.h5", crystals)
    said = rf"Knowing does not know {len(names)} of 90 crystals \(.*\)"
    with pytest.raises(InputError, match=said + "; leave them out of .*mixed.h5, or"):
        fit(config(mixed, tmp_path / "no", split=SplitSettings(60, 20, 10)))
    path = fit(config(store, tmp_path / "fit", weights=[]))
    with pytest.raises(InputError, match=said):
        predict(path, [mixed], tmp_path / "no.csv", progress=False)


def test_bad_settings(store, tmp_path):
    with pytest.raises(InputError, match="`teachers` names knowing twice; leave one"):
        config(store, tmp_path, teachers=["knowing", "knowing"])
    with pytest.raises(InputError, match="'clever' cannot be frozen as it is"):
        fit(config(store, tmp_path / "x", teachers=["clever"]))
    assert not (tmp_path / "x").exists()
