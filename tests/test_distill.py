"""Runs with a teacher: how well the student learned is measured and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from crysdistill.errors import InputError
from crysdistill.splits import make_split
from crysdistill.store.store import Store
from crysdistill.teachers import make_teacher
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.train import TrainConfig
from crysdistill.transfer.distillation import DISTILLATION_LOSSES, Distillation
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_predictor
from tests.test_teacher_objective import write_table
from tests.toy_runs import SHORT, results, shared, training_config
from tests.toy_stores import SMALL_ENCODER, labelled, write_store

NOTHING = "the student learned nothing from the teacher"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("dataset") / "d.h5", labelled(40))


@pytest.fixture
def config(dataset, tmp_path) -> TrainConfig:
    return training_config(dataset, tmp_path / "run")


def run(config: TrainConfig, **more) -> Path:
    given = {"teacher": "random", "teacher_encoder": SMALL_ENCODER, **more}
    return distill(DistillConfig(**shared(config), **given))


def line(printed: str) -> str:
    """The final line about the teacher, at any screen width."""
    return " ".join(printed[printed.rindex(" as teacher:") :].split())


def test_what_was_learned_is_measured_on_others_and_said(config, tmp_path, capsys):
    table = write_table(tmp_path / "table.safetensors", labelled(40))
    config = replace(
        config,
        trainer=replace(SHORT, epochs=20),
        optimizer=OptimizerSettings(lr=0.03),
    )
    weights = run(config, teacher=str(table), loss="standardized_atoms", alpha=0.9)
    found = results(config.out)["teacher"]
    assert (found["name"], found["loss"], found["level"], found["crystals"]) == (
        "table.safetensors", "standardized_atoms", "atoms", 16,
    )  # fmt: skip
    said = line(capsys.readouterr().out)
    assert said.startswith(f"as teacher: R2 {found['r2']:.2f}, cosine ")
    assert f"{found['cosine']:.2f} on 16 crystals held out (standardized_atoms)" in said
    assert found["r2"] > 0.05
    assert NOTHING not in said
    assert load_predictor(weights).encoder.width == 8  # the projector is not saved


def test_a_student_that_learned_nothing_is_told_so(config, capsys):
    run(config, loss="standardized_atoms", alpha=0.0)
    assert results(config.out)["teacher"]["r2"] < 0.05
    assert (
        line(capsys.readouterr().out)
        .split(" (standardized_atoms)")[1]
        .startswith(f"; {NOTHING}")
    )


@pytest.mark.parametrize("loss", DISTILLATION_LOSSES)
def test_every_loss_says_what_was_learned(loss, config):
    run(config, loss=loss)
    found = results(config.out)["teacher"]
    assert np.isfinite(found["r2"])
    assert ("cosine" in found) == (not loss.startswith("relations"))
    assert found["level"] == loss.rpartition("_")[2].replace("published", "atoms")


def test_a_table_of_training_crystals_alone_is_enough(config, tmp_path, capsys):
    store = Store.open(config.dataset)
    split = make_split(store, config.split, store.property("density"))
    names = [store.material_ids[row] for row in split.train]
    table = tmp_path / "t.safetensors"
    answers = np.random.default_rng(0).random((len(names), 5), np.float32)
    ids = np.frombuffer("\n".join(names).encode(), np.uint8)
    save_file({"material_ids": ids, "crystals": answers}, table)
    run(config, teacher=str(table), loss="standardized_crystals")
    found = json.loads((config.out / "results.json").read_text())
    assert np.isfinite(found["test"])
    assert found["teacher"]["crystals"] == 0
    assert "what was learned is not known (there are no crystals to ask" in line(
        capsys.readouterr().out
    )


def test_fading_follows_the_run(config, monkeypatch):
    seen = []
    real = Distillation.total

    def watching(self, property_loss, embedding_loss, done=0.0):
        seen.append(done)
        return real(self, property_loss, embedding_loss, done)

    monkeypatch.setattr(Distillation, "total", watching)
    run(config, weighting="fading")
    steps = seen[-9:]  # three epochs of three steps; earlier ones were a trial
    np.testing.assert_allclose(steps, np.arange(9) / 9)


def test_losses_are_balanced_where_they_have_a_scale(config):
    """The published form stays as it is, and so does what the user asks for."""

    def balance(**given) -> str:
        given = {"target": config.target, **given}
        return DistillConfig(dataset=config.dataset, teacher="random", **given).balance

    assert balance() == "balanced"
    assert balance(loss="relations_atoms") == "balanced"
    assert balance(loss="published") == "fixed"
    assert balance(loss="published", weighting="balanced") == "balanced"
    assert balance(weighting="fading") == "fading"
    targets = [Target("density"), Target("class", task="classification")]
    assert balance(target=None, targets=targets) == "fixed"
    weighted = [replace(target, weight=1.0) for target in targets]
    assert balance(target=None, targets=weighted) == "balanced"


def test_a_run_balances_its_losses(config, monkeypatch):
    used = set()
    real = Distillation.total

    def watching(self, property_loss, embedding_loss, done=0.0):
        total = real(self, property_loss, embedding_loss, done)
        wanted = (property_loss.detach() * embedding_loss.detach()).sqrt()
        torch.testing.assert_close(total.detach(), wanted)
        used.add(self.weighting)
        return total

    monkeypatch.setattr(Distillation, "total", watching)
    run(config)
    assert used == {"balanced"}


def test_balanced_losses_of_several_targets_are_refused(config):
    targets = [Target("density"), Target("class", task="classification")]
    several = replace(config, target=None, targets=targets)
    with pytest.raises(
        InputError,
        match=r"`weighting` is balanced, but the loss of several targets .* give "
        r"each target a `weight`, or set `weighting=fixed`",
    ):
        DistillConfig(**shared(several), teacher="random", weighting="balanced")
    weighted = [replace(t, weight=1.0) for t in targets]
    run(replace(several, targets=weighted), weighting="balanced")


def test_a_random_teacher_stays_who_it_is(dataset):
    """It must give the same answers when it is asked about other crystals later."""
    store = Store.open(dataset)
    teacher = make_teacher("random", store, encoder={**SMALL_ENCODER})
    teacher.prepare(store, np.arange(10))
    before = teacher.fingerprint()
    teacher.prepare(store, np.arange(20, 40))
    assert teacher.fingerprint() == before
