"""The search of settings: fair, without test crystals, resumable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from crysdistill.errors import InputError
from crysdistill.studies import search as searching
from crysdistill.studies.kinds import KINDS
from crysdistill.studies.search import Range, TuneSettings
from crysdistill.studies.study import StudyConfig, study
from tests.toy_stores import labelled, write_store
from tests.toy_studies import BASE, cell_of, pretrained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("dataset") / "d.h5", labelled(40))


@pytest.fixture
def config(dataset, tmp_path) -> StudyConfig:
    return StudyConfig(
        base={"dataset": dataset, **BASE, "trainer": {**BASE["trainer"], "epochs": 1}},
        weights=pretrained(tmp_path / "w.safetensors"),
        out=tmp_path / "study",
        axes={"arm": ["scratch", "finetuned"], "labels": [12], "seed": [0]},
        controls=["mean"],
        tune=TuneSettings(
            {"optimizer.lr": {"low": 0.001, "high": 0.1, "log": True},
             "encoder_lr": [0.1, 1.0]},
            trials=3,
        ),
        workers=1,
    )  # fmt: skip


@pytest.fixture
def tried(monkeypatch) -> list:
    """The configurations of all runs, both trials and cells."""
    found = []
    for name, kind in KINDS.items():

        def watched(config, run=kind.run):
            found.append(config)
            return run(config)

        monkeypatch.setitem(KINDS, name, kind._replace(run=watched))
    return found


def test_every_arm_gets_the_same_trials(config, tried):
    table = study(config, progress=False)
    assert set(table["error"]) == {""}
    trials = [run for run in tried if run.out.name == "trial"]
    kinds = [type(run).__name__ for run in trials]
    assert kinds == ["TrainConfig"] * 3 + ["FinetuneConfig"] * 3
    facts = json.loads((config.out / "study.json").read_text("utf-8"))["tune"]
    assert facts["trials"] == 3
    for arm, keys in {
        "scratch": ["optimizer.lr"], "finetuned": ["optimizer.lr", "encoder_lr"],
    }.items():  # fmt: skip
        run = table.set_index("arm").loc[arm, "run"]
        chosen = cell_of(config.out / run)["chosen"]
        assert list(chosen) == keys
        assert facts["chosen"][run] == chosen
        assert 0.001 <= chosen["optimizer.lr"] <= 0.1
        [final] = [r for r in tried if r.out == config.out / run]
        assert final.optimizer.lr == chosen["optimizer.lr"]
        tested = {r.optimizer.lr for r in trials if type(r) is type(final)}
        assert final.optimizer.lr in tested
    assert "chosen" not in cell_of(config.out / table["run"].iloc[-1])  # the mean


@pytest.mark.parametrize("folds", [1, 3])
def test_trials_never_see_a_test_crystal(config, monkeypatch, folds):
    splits = []
    real = searching._tried

    def watched(kind, config, given, file, work):
        splits.append(pd.read_csv(file, dtype=str))
        return real(kind, config, given, file, work)

    monkeypatch.setattr(searching, "_tried", watched)
    tune = replace(config.tune, folds=folds, trials=2, halving=False)
    axes = {**config.axes, "arm": ["scratch"]}
    given = replace(config, tune=tune, axes=axes, controls=False, weights=None)
    table = study(given, progress=False)
    cell = pd.read_csv(config.out / table["run"][0] / "split.csv", dtype=str)
    own = cell.groupby("subset")["material_id"].agg(set)
    assert len(splits) == 2 * folds
    for split in splits:
        subsets = split.groupby("subset")["material_id"].agg(set)
        assert "test" not in subsets
        if folds == 1:
            assert subsets["train"] == own["train"]
            assert subsets["val"] == own["val"]
        else:
            assert subsets["train"] | subsets["val"] == own["train"]
            assert len(subsets["val"]) == 4


def test_an_interrupted_search_goes_on(config, monkeypatch):
    axes = {**config.axes, "arm": ["scratch"]}
    config = replace(config, axes=axes, controls=False, weights=None)
    real, count = searching._tried, []

    def stopped(*given):
        count.append(given[2])
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "_tried", stopped)
        with pytest.raises(KeyboardInterrupt):
            study(config, progress=False)
    again = []
    monkeypatch.setattr(
        searching, "_tried", lambda *given: again.append(given[2]) or real(*given)
    )
    cut = study(config, progress=False)
    assert len(again) == 2  # the finished trial is not repeated
    assert again[0] == count[1]  # the next trial is the one that was due
    whole = study(replace(config, out=config.out / "whole"), progress=False)
    assert list(cut["value"]) == list(whole["value"])


def test_halving_gives_up_bad_settings(config, monkeypatch):
    """A trial's value is its place in the range, so most trials stop early."""
    calls = []

    def tried(kind, config, given, file, work):
        calls.append(given["optimizer.lr"])
        return given["optimizer.lr"]

    monkeypatch.setattr(searching, "_tried", tried)
    axes = {**config.axes, "arm": ["scratch"]}
    tune = TuneSettings(config.tune.keys, trials=8, folds=4)
    study(
        replace(config, tune=tune, axes=axes, controls=False, weights=None),
        progress=False,
    )
    assert len(set(calls)) == 8
    assert 8 <= len(calls) < 32


def test_ranges():
    found = TuneSettings(
        {"optimizer": {"lr": {"low": "1e-3", "high": "0.1", "log": "true"}},
         "head.layers": {"low": 1, "high": 3}, "head.hidden": "[16, 32]"}
    ).ranges()  # fmt: skip
    assert found == {
        "optimizer.lr": Range(low=0.001, high=0.1, log=True),
        "head.layers": Range(low=1, high=3),
        "head.hidden": Range(("16", "32")),
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "`tune.keys` is empty; give ranges, such as"),
        ({"optimizer.l": [1]}, "unknown key `tune.keys.optimizer.l`"),
        ({"optimizer.lr": 3}, "`tune.keys.optimizer.lr` is 3 but must be {low"),
        ({"optimizer.lr": {"low": 1}}, "is {low: 1} but must be {low: 0.001"),
        ({"optimizer.lr": {"low": 2, "high": 1}}, "`tune.keys.optimizer.lr.low` is 2 "
         "but must be below `high`, 1"),
        ({"optimizer.lr": {"low": 0, "high": 1, "log": True}}, "must be above 0"),
    ],
)  # fmt: skip
def test_mistakes(keys, message):
    with pytest.raises(InputError) as caught:
        TuneSettings(keys).ranges()
    assert message in str(caught.value)


def test_an_axis_cannot_be_searched(config):
    axes = {**config.axes, "optimizer.lr": [0.01]}
    with pytest.raises(InputError, match=r"`optimizer\.lr` is an axis and in `tune"):
        study(replace(config, axes=axes), progress=False)
