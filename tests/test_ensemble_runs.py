"""Whole runs with an ensemble as teacher, and what they say of test crystals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from crysdistill.store.store import Store
from crysdistill.teachers.ensemble import EnsembleTeacher
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import finetune
from crysdistill.training.fit import FitConfig, fit
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.settings import SplitSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.weights import read_header
from tests.test_ensemble_teacher import predicted
from tests.toy_runs import DENSITY, SHORT, results, shared, training_config, tuning
from tests.toy_stores import SMALL_ENCODER


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """Two members that are trained on one split, and one trained on another."""
    folder = tmp_path_factory.mktemp("trained")
    config = training_config(dataset, folder)
    config = replace(config, trainer=replace(SHORT, epochs=1))
    for seed in (0, 1):
        train(replace(config, out=folder / "same" / str(seed), seed=seed))
    other = SplitSettings(train=24, val=8, test=8, seed=1)
    train(replace(config, out=folder / "other", split=other))
    return folder


def student(dataset: Path, out: Path, *teachers: Path, **more) -> Path:
    return pretrain(
        PretrainConfig(
            corpus=dataset,
            out=out,
            encoder={**SMALL_ENCODER, "bias": False, "normalize": True},
            objectives={"teacher": {"teachers": [f"ensemble:{t}" for t in teachers]}},
            held_out=0.2,
            trainer=replace(SHORT, epochs=1),
            **more,
        )
    )


def tuned(config: TrainConfig, weights: Path) -> str:
    finetune(replace(tuning(config, weights), trainer=replace(SHORT, epochs=1)))
    return results(config.out)["overlap"]


def test_test_crystals_seen_without_labels_are_transductive(
    config, dataset, trained, tmp_path
):
    weights = student(dataset, tmp_path / "student", trained / "same")
    numbers = results(tmp_path / "student")["numbers"]
    assert np.isfinite(numbers["teacher_r2_crystals"])
    said = tuned(config, weights)
    assert said == (
        "transductive (the corpus holds 8 of the 8 test crystals, without their labels)"
    )
    header = read_header(config.out / "weights.safetensors")
    assert header.provenance.overlap == "transductive"
    # The next run knows it too.
    again = replace(config, out=tmp_path / "again")
    assert tuned(again, config.out / "weights.safetensors") == said


def test_labels_of_test_crystals_are_a_leak(config, dataset, trained, tmp_path):
    weights = student(dataset, tmp_path / "student", trained)
    first, second = (
        set(
            pd.read_csv(trained / name / "split.csv")
            .query("subset == 'test'")
            .iloc[:, 0]
        )
        for name in ("same/0", "other")
    )
    leaked = len(first - second)
    assert 0 < leaked <= 8
    said = (
        "leaked (the weights or their teachers learned from the labels of "
        f"{leaked} of the 8 test crystals)"
    )
    assert tuned(config, weights) == said
    header = read_header(config.out / "weights.safetensors")
    assert header.provenance.overlap == "leaked"
    # As teacher of a distilled student they know the same.
    distilled = DistillConfig(
        **shared(replace(config, out=tmp_path / "d")), teacher=f"ensemble:{trained}"
    )
    distill(distilled)
    assert results(tmp_path / "d")["overlap"] == said


def test_a_distilled_student_with_its_own_members(config, trained, capsys):
    distill(DistillConfig(**shared(config), teacher=f"ensemble:{trained / 'same'}"))
    found = results(config.out)
    assert found["teacher"]["level"] == "crystals"
    assert np.isfinite(found["teacher"]["r2"])
    assert found["overlap"] == (
        "clean (by row, none of the 8 test crystals is among those that the weights "
        "and their teachers learned from)"
    )
    assert "(2 predictors) as teacher: R2" in " ".join(capsys.readouterr().out.split())


def test_a_file_of_fit_is_a_member(config, dataset, pretrained, trained, tmp_path):
    weights = fit(
        FitConfig(
            dataset=dataset,
            target=DENSITY,
            split=config.split,
            out=tmp_path / "fit",
            weights=[pretrained],
            trainer=SHORT,
        )
    )
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(weights, both / "fit.safetensors")
    shutil.copy(trained / "same/0/weights.safetensors", both / "network.safetensors")
    store = Store.open(dataset)
    found = EnsembleTeacher(f"{both}/*")(store.batch([0, 1])).crystals
    each = [
        predicted(path, store, tmp_path / "p.csv")["density"][:2]
        for path in sorted(both.iterdir())
    ]
    np.testing.assert_allclose(found[:, 0], np.mean(each, axis=0), rtol=1e-4)
