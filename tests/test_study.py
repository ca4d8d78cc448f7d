"""Studies: all arms on the same crystals, each cell once, crashes reported."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from crysdistill.cli import main
from crysdistill.configs import load_config
from crysdistill.errors import InputError
from crysdistill.splits import read_split
from crysdistill.store.store import Store
from crysdistill.studies import kinds, running
from crysdistill.studies.axes import read_axes
from crysdistill.studies.cells import make_cells
from crysdistill.studies.kinds import KINDS
from crysdistill.studies.search import TuneSettings
from crysdistill.studies.study import StudyConfig, _command, study
from tests.toy_stores import labelled, write_store
from tests.toy_studies import BASE, cell_of, pretrained, results, with_base


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("dataset") / "d.h5", labelled(40))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture
def config(dataset, weights, tmp_path) -> StudyConfig:
    return StudyConfig(
        base={"dataset": dataset, **BASE},
        weights=weights,
        out=tmp_path / "study",
        axes={"arm": ["scratch", "finetuned"], "labels": [10], "seed": [0, 1]},
        controls=["mean"],
        workers=1,
    )


def with_axes(config: StudyConfig, **axes) -> StudyConfig:
    return replace(config, axes={**config.axes, **axes})


@pytest.fixture
def run(monkeypatch) -> list[str]:
    """The names of the folders of all runs, in order."""
    done: list[str] = []
    real = running.KINDS
    for name, kind in real.items():

        def watched(config, run=kind.run):
            done.append(config.out.name)
            return run(config)

        monkeypatch.setitem(KINDS, name, kind._replace(run=watched))
    return done


def test_the_command_in_the_report_plans_the_same_runs(config):
    """Also with settings that leave out cells, change an arm, or start a search."""
    arms = ["scratch", {"gentle one": {"like": "finetuned", "encoder_lr": 0.1}}]
    told = replace(
        with_axes(config, arm=arms, **{"freeze.convolutions": [None, 1]}),
        exclude=[{"arm": "gentle one", "seed": 1}],
        tune=TuneSettings(keys={"optimizer.lr": [0.001, 0.01]}, trials=2),
    )
    program, verb, *words = shlex.split(_command(told))
    assert (program, verb) == ("crysdistill", "study")
    again = load_config(None, words, StudyConfig)

    def cells(given):
        axes = read_axes(given.axes)
        return make_cells(given.shared, axes, given.exclude, given.controls, given.tune)

    assert [c.name for c in cells(again)] == [c.name for c in cells(told)]
    assert [c.search for c in cells(again)] == [c.search for c in cells(told)]
    assert len(cells(told)) < len(cells(replace(told, exclude=[])))
    assert again.out == told.out


def test_teachers_are_compared_along_an_axis(dataset, weights):
    """They teach instead of the study's weights, and no other arm knows of them."""
    axes = read_axes(
        {
            "arm": ["scratch", "distilled", "finetuned"],
            "teacher": ["random", "ewald"],
            "seed": [0],
        }
    )
    base = {"dataset": str(dataset), "target": {"name": "density"}}
    cells = make_cells(base, {**axes, "weights": [weights]}, controls=False)
    found = {(c.arm.name, getattr(c.config, "teacher", None)) for c in cells}
    assert found == {
        ("scratch", None), ("finetuned", None),
        ("distilled", "random"), ("distilled", "ewald"),
    }  # fmt: skip
    # Without the other arm it needs no weights; one teacher for all is no axis.
    del axes["teacher"]
    axes["arm"] = {"distilled": None}
    [cell] = make_cells({**base, "teacher": "ewald"}, axes, controls=False)
    assert cell.config.teacher == "ewald"
    # So does a task, and then there are the controls that need no weights.
    axes["task"] = {"a": {"teacher": "ewald"}, "b": {"teacher": "random"}}
    found = {(c.arm.name, c.task, getattr(c.config, "teacher", None))
             for c in make_cells(base, axes)}  # fmt: skip
    assert {("distilled", "a", "ewald"), ("distilled", "b", "random")} <= found
    names = {name for name, _, _ in found}
    assert {"scratch", "scratch-longer", "shuffled-teacher", "forest"} <= names
    assert ("shuffled-teacher", "a", "ewald") in found
    assert not {"random-teacher", "pretrained-ridge"} & names
    del axes["task"]
    with pytest.raises(InputError, match="`weights` is missing, and the arm `distil"):
        make_cells(base, axes, controls=False)


class TestResults:
    def test_one_row_for_each_cell(self, config):
        table = study(config, progress=False)
        assert list(table) == [
            "arm", "task", "target", "unit", "metric", "labels", "seed", "value",
            "validation", "processor", "run", "error",
        ]  # fmt: skip
        assert list(table["arm"]) == ["scratch", "finetuned", "mean"] * 2
        assert list(table["seed"]) == [0, 0, 0, 1, 1, 1]
        assert set(table["task"]) == {"density"}
        assert set(table["labels"]) == {10}
        assert (table["processor"] > 0).all()
        written = pd.read_csv(config.out / "results.csv", keep_default_na=False)
        pd.testing.assert_frame_equal(written, table, check_dtype=False)
        for row in table.itertuples():
            found = results(config.out / row.run)
            assert (row.value, row.validation) == (found["test"], found["val"])
            about = {"arm": row.arm, "labels": 10, "seed": row.seed}
            assert cell_of(config.out / row.run)["cell"] == about

    def test_arms_of_a_seed_see_the_same_crystals(self, config):
        table = study(config, progress=False)
        table["split"] = [results(config.out / run)["split"] for run in table["run"]]
        assert list(table.groupby("seed")["split"].nunique()) == [1, 1]
        assert table["split"].nunique() == 2

    def test_fewer_labels_are_part_of_more_and_tests_are_the_same(self, config):
        config = with_axes(config, arm=["scratch"], labels=[5, 10], seed=[0])
        table = study(replace(config, controls=False), progress=False)
        store = Store.open(config.base["dataset"])
        few, many = (
            read_split(
                config.out / run / "split.csv", store.material_ids, np.arange(40)
            )
            for run in table["run"]
        )
        assert (len(few.train), len(many.train)) == (5, 10)
        assert set(few.train) < set(many.train)
        assert set(few.test) == set(many.test)
        assert set(few.val) == set(many.val)

    def test_the_facts(self, config):
        study(config, progress=False)
        facts = json.loads((config.out / "study.json").read_text("utf-8"))
        assert facts["controls"] == ["scratch", "mean"]
        assert facts["roles"] == {"finetuned": "teacher"}
        assert facts["arms"]["mean"] == "predicts the mean of the training labels"
        assert facts["tasks"]["density"]["crystals"] == 40
        assert facts["tasks"]["density"]["target"] == "density"
        assert facts["overlap"].startswith("unknown (nobody has compared")
        assert facts["epochs"] == 2
        assert facts["command"].startswith("crysdistill study out=")

    @pytest.mark.slow
    def test_workers_find_the_same(self, config, forked_workers):
        one = study(config, progress=False)
        for name, more in {
            "two": {"workers": 2},
            "dask": {"workers": None, "cluster": "local:1"},
        }.items():
            out = config.out.with_name(name)
            two = study(replace(config, out=out, **more), progress=False)
            same = ["arm", "seed", "value", "validation", "run"]
            pd.testing.assert_frame_equal(one[same], two[same], rtol=1e-12)


class TestGoingOn:
    def test_nothing_runs_twice(self, config, run):
        first = study(config, progress=False)
        count = len(run)
        second = study(config, progress=False)
        assert len(run) == count == 6
        pd.testing.assert_frame_equal(first, second)

    def test_after_an_interruption(self, config, monkeypatch):
        real, count = KINDS["finetune"], []

        def stopped(given):
            count.append(given.out.name)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setitem(KINDS, "finetune", real._replace(run=stopped))
            with pytest.raises(KeyboardInterrupt):
                study(config, progress=False)
        assert len(list((config.out / "runs").iterdir())) == 1
        table = study(config, progress=False)
        whole = study(replace(config, out=config.out / "whole"), progress=False)
        same = ["arm", "seed", "value", "run"]
        pd.testing.assert_frame_equal(table[same], whole[same])

    def test_an_interruption_leaves_a_table_of_what_is_finished(
        self, config, monkeypatch
    ):
        first = study(with_axes(config, arm=["scratch"], seed=[1]), progress=False)

        def stopped(given):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setitem(KINDS, "finetune", KINDS["finetune"]._replace(run=stopped))
            with pytest.raises(KeyboardInterrupt):
                study(with_axes(config, arm=["finetuned", "scratch"]), progress=False)
        kept = pd.read_csv(config.out / "results.csv")
        assert list(kept["run"]) == list(first["run"])
        assert list(kept["value"]) == pytest.approx(list(first["value"]))

    def test_a_run_without_its_numbers_is_finished(self, config):
        first = study(config, progress=False)
        folder = config.out / first["run"][0]
        (folder / "results.json").unlink()
        (folder / "split.csv").write_text("half")
        second = study(config, progress=False)
        assert list(second["value"]) == list(first["value"])

    def test_wider_axes_recompute_nothing(self, config, run):
        first = study(with_axes(config, arm=["finetuned"], seed=[0]), progress=False)
        assert len(run) == 2  # including the control
        run.clear()
        wider = with_axes(
            config, arm=["finetuned"], seed=[0, 1],
            **{"freeze.convolutions": [None, 1]},
        )  # fmt: skip
        second = study(wider, progress=False)
        assert len(run) == 4
        old = second[second["run"] == first["run"][0]].iloc[0]
        assert old["value"] == first["value"][0]
        cell = cell_of(config.out / old["run"])
        assert cell["cell"]["freeze.convolutions"] is None
        assert cell["processor"] == first["processor"][0]
        run.clear()
        study(with_axes(config, arm=["finetuned"], seed=[0]), progress=False)
        assert run == []

    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            ({"trainer": {"epochs": 2}}, {"trainer": {"epochs": 3}},
             "trainer.epochs: 2 -> 3"),
            # A removed key has its default again.
            ({"optimizer": {"lr": 0.01}}, {}, "optimizer.lr: 0.01 -> 0.003"),
            ({}, {"optimizer": {"lr": 0.01}}, "optimizer.lr: 0.003 -> 0.01"),
        ],
    )  # fmt: skip
    def test_other_settings_are_named_and_refused(self, config, before, after, said):
        config = with_axes(config, arm=["scratch"], seed=[0])
        study(with_base(config, **before), progress=False)
        with pytest.raises(InputError) as caught:
            study(with_base(config, **after), progress=False)
        text = str(caught.value)
        assert text.startswith(f"{config.out} holds a study whose runs shared other")
        assert f"now different: {said}" in text or f"; {said}" in text
        assert text.endswith("; give the old values, or another `out`")

    def test_an_axis_must_keep_the_old_value(self, config):
        study(with_axes(config, arm=["scratch"], seed=[0]), progress=False)
        other = with_axes(config, arm=["scratch"], seed=[0])
        lost = with_axes(other, **{"optimizer.lr": [0.1, 0.2]})
        with pytest.raises(
            InputError, match=r"optimizer\.lr: 0\.003 -> 0\.1 or 0\.2; give"
        ):
            study(lost, progress=False)

    def test_a_file_with_other_content(self, config, tmp_path):
        copy = write_store(tmp_path / "d.h5", labelled(40))
        config = with_axes(with_base(config, dataset=copy), seed=[0])
        study(config, progress=False)
        copy.unlink()
        write_store(copy, labelled(41))
        with pytest.raises(InputError, match=r"dataset .*d\.h5 has other content"):
            study(config, progress=False)

    def test_a_study_of_version_0_1(self, config):
        config.out.mkdir()
        (config.out / "shared.yaml").write_text("")
        with pytest.raises(InputError, match=r"of version 0\.1, whose runs cannot be"):
            study(config, progress=False)

    def test_two_at_once(self, config):
        from crysdistill.studies.study import _alone

        with (
            _alone(config.out),
            pytest.raises(
                InputError,
                match="another study is running there; wait, or give another `out`",
            ),
        ):
            study(config, progress=False)


class TestCrashes:
    def test_the_rest_goes_on(self, config, monkeypatch, capsys):
        real = KINDS["finetune"]

        def broken(given):
            if given.seed == 0:
                raise RuntimeError("no luck\ntoday")
            return real.run(given)

        with monkeypatch.context() as patch:
            patch.setitem(KINDS, "finetune", real._replace(run=broken))
            table = study(config, progress=False)
        assert list(table["error"] != "") == [False, True, *[False] * 4]
        failed = table.iloc[1]
        assert failed["error"] == "RuntimeError: no luck today"
        assert np.isnan(failed["value"])
        assert (failed["labels"], failed["metric"], failed["unit"]) == (
            10, "mae", "1/Å³",
        )  # fmt: skip
        [log] = (config.out / "errors").iterdir()
        assert "in broken" in log.read_text()
        again = study(config, progress=False)
        assert set(again["error"]) == {""}
        assert not list((config.out / "errors").iterdir())

    def test_the_command_ends_with_1(self, config, monkeypatch, capsys):
        def broken(given):
            raise InputError("cannot be trained")

        monkeypatch.setitem(KINDS, "train", KINDS["train"]._replace(run=broken))
        argv = [
            "study", f"base.dataset={config.base['dataset']}",
            "base.target.name=density", "base.split={train: 20, val: 8, test: 8}",
            f"out={config.out}", "axes.arm=[scratch]", "axes.seed=[0]",
            "axes.labels=[10]", "controls=[mean]", "workers=1",
        ]  # fmt: skip
        assert main(argv) == 1
        out, err = capsys.readouterr()
        assert "failed: runs/scratch-density-10-0" in err
        assert "cannot be trained" in err
        assert "mean" in out


class TestBeforeAnythingRuns:
    def test_fewer_labels_than_asked_for(self, config, run):
        with pytest.raises(
            InputError,
            match=r"density, seed 0: 21 labels are asked for, but the split leaves 20 "
            r"crystals for training; lower `axes\.labels`, or enlarge",
        ):
            study(with_axes(config, labels=[10, 21]), progress=False)
        assert run == []
        assert not (config.out / "runs").exists()

    def test_a_class_that_a_fold_lacks(self, config, run):
        target = {"name": "class", "task": "classification"}
        config = with_axes(
            with_base(config, target=target, split={"train": 30, "val": 2, "test": 8}),
            labels=["all"], seed=list(range(8)),
        )  # fmt: skip
        with pytest.raises(InputError, match=r"^class, seed \d: all `val` crystals"):
            study(config, progress=False)
        assert run == []

    def test_no_test_crystals(self, config):
        config = with_base(config, split={"train": 0.8, "val": 0.2, "test": 0})
        with pytest.raises(InputError, match="there are no test crystals, but a study"):
            study(config, progress=False)

    def test_what_is_not_fair_is_said_first(self, config, capsys):
        arms = {
            "scratch": None,
            "more": {"like": "scratch", "split.train": 24},
        }
        config = with_axes(config, arm=arms, labels=["all"], seed=[0])
        study(replace(config, weights=None), progress=True)
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith("not fair, density: `more` have another split than")
        facts = json.loads((config.out / "study.json").read_text("utf-8"))
        assert len(facts["not_fair"]) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms=[scratch]", "`arms` is now `axes.arm`; give it there"),
        ("labels=[10]", "`labels` is now `axes.labels`; give it there"),
        ("seeds=[0]", "`seeds` is now `axes.seed`; give it there"),
        ("baselines=[mean]", "`baselines` is now `controls`; give it there"),
        ("axes.freez.convolutions=[0]",
         "unknown key `axes.freez.convolutions`; did you mean "
         "`axes.freeze.convolutions`?"),
        ("base.trainer.epoch=3",
         "unknown key `base.trainer.epoch`; did you mean `base.trainer.epochs`?"),
        ("base.seed=3", "`base.seed` is set by the study; give `axes.seed`"),
        ("axes.arm=[scrach]", "unknown arm 'scrach'; choose one of scratch"),
        ("axes.seed=0", "`axes.seed` is 0 but must be a list, such as [0]"),
        ("axes.seed=[]", "`axes.seed` is empty; give a value or leave it out"),
        ("axes.seed=[0, 0]", "`axes.seed` names 0 twice; remove one"),
        ("axes.seed=[a]", "`axes.seed` holds a but must hold whole numbers from 0 on"),
        ("axes.labels=[0]",
         "`axes.labels` holds 0 but must hold whole numbers from 1 on, or `all`"),
        ("axes.alpha=[0.1]", "`axes.alpha` applies to none of the arms (scratch); leave"
         " it out, or add an arm that has it"),
        ("axes.trainer.epochs=[x]", "`trainer.epochs` is 'x' but must be an integer"),
        ("axes.task=[gap]", "the task `gap` must hold keys, as in"),
        ("exclude=[{arm: mean, sed: 1}]",
         "`exclude[0]` names `sed`, which is not an axis of this study; did you mean "
         "`seed`?"),
        ("exclude=[{seed: 9}]", "`exclude[0]` matches no cell; correct it, or leave"),
        ("controls=[finetuned]", "`controls` names finetuned, which is not a control"),
        ("workers=0", "`workers` is 0 but must be at least 1"),
        ("axes.arm=[finetuned]", "`weights` is missing, and the arm `finetuned` needs "
         "it; give `weights=...`"),
        ("base=3", "`base` must hold keys of runs"),
        ("base.weights=w.safetensors  weights=w.safetensors",
         "`weights` and `base.weights` are both given; leave one out"),
    ],
)  # fmt: skip
def test_mistakes(dataset, tmp_path, capsys, override, message):
    argv = [
        "study", f"base.dataset={dataset}", "base.target.name=density",
        f"out={tmp_path / 's'}", "axes.arm=[scratch]", "axes.seed=[0]", "workers=1",
    ]  # fmt: skip
    assert main([*argv, *override.split("  ")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_dataset_must_be_given(tmp_path, capsys):
    argv = ["study", "base.target.name=gap", f"out={tmp_path}", "axes.arm=[scratch]"]
    assert main(argv) == 2
    assert "`base.dataset` is missing; give it" in capsys.readouterr().err


def test_kinds_know_their_keys():
    assert kinds.takes("finetune", "freeze.convolutions")
    assert not kinds.takes("train", "freeze.convolutions")
    assert kinds.takes("train", "encoder.width")
    assert not kinds.applies("finetune", "encoder.width")  # the weights define this
    assert not kinds.takes("readout", "trainer.epochs")
