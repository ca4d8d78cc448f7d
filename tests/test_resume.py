"""Runs that are stopped, killed or damaged, and go on as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.training import engine, supervised
from crysdistill.training.checkpoints import Checkpoints
from crysdistill.training.plans import DistillConfig, TrainConfig
from crysdistill.training.pretraining import pretrain
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.supervised import distill, train
from crysdistill.transfer.targets import Target
from tests.toy_runs import (
    SHORT,
    history,
    pretraining_config,
    results,
    same,
    shared,
    training_config,
    weights_of,
)
from tests.toy_stores import labelled, write_store


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    return write_store(path, labelled(40), symmetry="fast")


@pytest.fixture
def config(dataset, tmp_path) -> TrainConfig:
    return training_config(dataset, tmp_path / "run")


@pytest.fixture(scope="module")
def pretrained(dataset, tmp_path_factory) -> Path:
    """An encoder that learned a little."""
    return pretrain(pretraining_config(dataset, tmp_path_factory.mktemp("p") / "run"))


# --------------------------------------------------------------- stopping and resuming


def stop_at(step: int, how: Callable[[], None]) -> type[engine.SeededSteps]:
    """A callback of the engine that does something before a step."""

    class Stopping(engine.SeededSteps):
        def on_train_batch_start(self, trainer, *rest):
            if trainer.global_step == step:
                how()
            super().on_train_batch_start(trainer, *rest)

    return Stopping


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class CrashError(Exception):
    """Stands for whatever ends a process without a word."""


def crash() -> None:
    raise CrashError


def stopped(monkeypatch, run: Callable, config, step: int, how=press_ctrl_c) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "SeededSteps", stop_at(step, how))
        with pytest.raises((KeyboardInterrupt, CrashError)):
            run(config)


# 24 crystals in batches of 8 are 3 steps an epoch.
MOMENTS = [(4, press_ctrl_c), (5, terminate), (6, press_ctrl_c), (7, crash), (8, crash)]


class TestResume:
    @pytest.mark.parametrize(("step", "how"), MOMENTS)
    def test_training(self, config, monkeypatch, step, how):
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, step, how)
        assert not (config.out / "weights.safetensors").exists()
        assert same(train(replace(config, resume=True)), whole)
        one, other = results(config.out), results(whole.parent)
        assert one == other
        for name in ("val_mae", "val_loss"):
            assert history(config.out, name) == history(whole.parent, name)

    @pytest.mark.parametrize(("step", "how"), MOMENTS)
    def test_every_logged_number(self, config, monkeypatch, step, how):
        config.trainer = replace(SHORT, checkpoint_every=1)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, step, how)
        train(replace(config, resume=True))
        expected = (whole.parent / "metrics.csv").read_bytes()
        assert (config.out / "metrics.csv").read_bytes() == expected

    def test_twice(self, config, monkeypatch):
        config.trainer = replace(SHORT, epochs=6)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 4)
        stopped(monkeypatch, train, replace(config, resume=True), 11)
        assert same(train(replace(config, resume=True)), whole)
        assert history(config.out, "val_mae") == history(whole.parent, "val_mae")

    def test_a_second_ctrl_c_leaves_no_half_step(self, config, monkeypatch):
        """It may come in the middle of a step: the last epoch's checkpoint counts."""
        whole = train(replace(config, out=config.out.with_name("whole")))
        real = torch.optim.AdamW.step
        calls = 0

        def interrupted(self, closure=None):
            nonlocal calls
            calls += 1
            if calls == 5:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)  # half of a step
                press_ctrl_c()
                press_ctrl_c()
            return real(self, closure)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        assert calls == 5
        assert same(train(replace(config, resume=True)), whole)

    def test_signals_are_given_back(self, config, monkeypatch):
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        stopped(monkeypatch, train, config, 4)
        train(replace(config, resume=True))
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before

    @pytest.mark.parametrize("how", [press_ctrl_c, crash])
    def test_the_best_epoch_before_the_stop_is_remembered(
        self, config, monkeypatch, how
    ):
        """Validation is made to be 3, 1, 2, 4, ...: the second epoch is the best."""
        values = {3: 3.0, 6: 1.0, 9: 2.0, 12: 4.0}

        def log_planned(self):
            self.log("val_mae", values[self.trainer.global_step])
            self.val_metric.reset()
            self.val_means.compute()

        monkeypatch.setattr(
            supervised.SupervisedModule, "on_validation_epoch_end", log_planned
        )
        config.trainer = replace(SHORT, epochs=4)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 6, how)
        assert same(train(replace(config, resume=True)), whole)

    @pytest.mark.parametrize("step", [6, 7, 9])
    @pytest.mark.parametrize("how", [press_ctrl_c, crash])
    def test_patience(self, config, monkeypatch, step, how):
        """The epochs that did not help before the stop count as well."""

        def log_planned(self):
            value = max(1.0, 4.0 - self.trainer.global_step)  # best after one epoch
            self.log("val_mae", value)
            self.val_metric.reset()
            self.val_means.compute()

        monkeypatch.setattr(
            supervised.SupervisedModule, "on_validation_epoch_end", log_planned
        )
        config.trainer = replace(SHORT, epochs=9, patience=3)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, step, how)
        assert same(train(replace(config, resume=True)), whole)
        for run in (config.out, whole.parent):
            assert len(history(run, "val_mae")) == 4

    def test_a_run_that_patience_ended_does_not_go_on(self, config):
        config.optimizer = OptimizerSettings(lr=0.3, schedule="constant")
        config.trainer = replace(SHORT, epochs=20, patience=1)
        train(config)
        before = weights_of(config.out / "weights.safetensors")
        epochs = history(config.out, "val_mae")
        assert len(epochs) < 20
        train(replace(config, resume=True))
        after = weights_of(config.out / "weights.safetensors")
        assert history(config.out, "val_mae") == epochs
        assert all(torch.equal(before[n], after[n]) for n in before)

    def test_a_finished_run_resumed_stays_as_it_is(self, config):
        train(config)
        before = weights_of(config.out / "weights.safetensors")
        validation = history(config.out, "val_mae")
        config.resume = True
        train(config)
        after = weights_of(config.out / "weights.safetensors")
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert history(config.out, "val_mae") == validation

    @pytest.mark.parametrize(("step", "how"), [(3, press_ctrl_c), (5, crash)])
    def test_dropout(self, config, monkeypatch, step, how):
        config.target = Target("class", task="classification")
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, step, how)
        assert same(train(replace(config, resume=True)), whole)

    @pytest.mark.parametrize(("step", "how"), [(5, press_ctrl_c), (6, crash)])
    def test_pretraining(self, dataset, tmp_path, monkeypatch, step, how):
        config = pretraining_config(dataset, tmp_path / "run")
        whole = pretrain(replace(config, out=tmp_path / "whole"))
        stopped(monkeypatch, pretrain, config, step, how)
        assert same(pretrain(replace(config, resume=True)), whole)
        assert results(config.out)["numbers"] == results(whole.parent)["numbers"]

    def test_distillation(self, config, monkeypatch, pretrained):
        given = {**shared(config), "teacher": str(pretrained)}
        helped = DistillConfig(**given)
        whole = distill(replace(helped, out=config.out.with_name("whole")))
        stopped(monkeypatch, distill, helped, 4)
        assert same(distill(replace(helped, resume=True)), whole)


# -------------------------------------------------------------- what does not go on


def checkpoints(run: Path) -> list[Path]:
    return Checkpoints(run / "checkpoints").paths()


class TestNothingToGoOnFrom:
    def test_a_folder_that_is_not_there(self, config):
        config.resume = True
        assert train(config).exists()

    def test_a_finished_run_without_checkpoints(self, config):
        train(config)
        for path in checkpoints(config.out):
            path.unlink()
        with pytest.raises(InputError, match="has no checkpoint to resume; start anew"):
            train(replace(config, resume=True))

    def test_something_else(self, config):
        config.out.mkdir()
        (config.out / "thesis.tex").write_text("years of work")
        with pytest.raises(InputError, match="has no checkpoint to resume; start anew"):
            train(replace(config, resume=True))

    def test_a_run_killed_before_its_first_checkpoint_begins_again(
        self, config, monkeypatch, capsys
    ):
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 2, crash)
        (config.out / "config.yaml.partial").write_text("half")
        assert same(train(replace(config, resume=True)), whole)
        said = " ".join(capsys.readouterr().out.split())
        assert "has no checkpoint yet: from the beginning" in said
        assert not list(config.out.rglob("*.partial"))


class TestAnotherConfiguration:
    def test_the_differences_are_listed(self, config):
        train(config)
        config.optimizer = OptimizerSettings(lr=0.5, milestones=(1,))
        config.encoder = {**config.encoder, "bias": True}
        config.seed, config.resume = 4, True
        text = (
            r"run was begun with another configuration; now different: "
            r"optimizer\.lr: 0\.003 -> 0\.5; optimizer\.milestones: \[\] -> \[1\]; "
            r"seed: 0 -> 4; encoder\.bias: absent -> true; give the old values, or "
        )
        with pytest.raises(InputError, match=text):
            train(config)
        del config.encoder["bias"], config.encoder["width"]
        with pytest.raises(InputError, match=r"encoder\.width: 8 -> absent"):
            train(config)

    def test_some_settings_may_change(self, config, monkeypatch):
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 4)
        before = (config.out / "config.yaml").read_text()
        moved = config.out.rename(config.out.with_name("moved"))
        config.trainer = replace(
            SHORT, threads=1, checkpoint_every=1, checkpoint_minutes=None,
            keep_checkpoints=5,
        )  # fmt: skip
        assert same(train(replace(config, out=moved, resume=True)), whole)
        assert (moved / "config.yaml").read_text() == before
        assert len(checkpoints(moved)) == 5

    def test_a_damaged_one(self, config):
        train(config)
        (config.out / "config.yaml").write_text("}{")
        with pytest.raises(InputError, match=r"config\.yaml is damaged; start anew"):
            train(replace(config, resume=True))

    def test_other_crystals(self, config, tmp_path, monkeypatch):
        stopped(monkeypatch, train, config, 4)
        config.dataset.rename(tmp_path / "old.h5")
        try:
            write_store(config.dataset, labelled(40, first=40), symmetry="fast")
            message = r"dataset\.h5 holds other training crystals than those that the"
            with pytest.raises(InputError, match=message):
                train(replace(config, resume=True))
        finally:
            (tmp_path / "old.h5").replace(config.dataset)


# ------------------------------------------------------------------- damaged files


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def zeros(path: Path) -> None:
    """What a power cut may leave: the right length, a page of zeros."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)


class TestDamage:
    @pytest.mark.parametrize("damage", [cut, empty, garbage, zeros])
    def test_the_newest_checkpoint(self, config, monkeypatch, capsys, damage):
        config.trainer = replace(SHORT, checkpoint_every=2)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 7, crash)
        before, newest = checkpoints(config.out)
        damage(newest)
        capsys.readouterr()
        assert same(train(replace(config, resume=True)), whole)
        said = capsys.readouterr().out.replace("\n", "")
        assert (
            f"checkpoints: {newest.name} damaged; going on from {before.name}" in said
        )
        assert results(config.out) == results(whole.parent)
        assert history(config.out, "val_mae") == history(whole.parent, "val_mae")

    def test_all_checkpoints(self, config, monkeypatch):
        stopped(monkeypatch, train, config, 7, crash)
        for path in checkpoints(config.out):
            cut(path)
        text = (
            r"step-00000006\.ckpt, step-00000003\.ckpt is damaged and there is no "
            r"other; start anew with `resume=false overwrite=true`"
        )
        with pytest.raises(InputError, match=text):
            train(replace(config, resume=True))

    def test_metrics(self, config, monkeypatch):
        """A checkpoint holds them: what became of the file does not matter."""
        config.trainer = replace(SHORT, epochs=4)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 8, crash)
        log = config.out / "metrics.csv"
        log.write_bytes(log.read_bytes()[:-7])
        train(replace(config, resume=True))
        expected = (whole.parent / "metrics.csv").read_bytes()
        assert expected.count(b"\n") == 9
        assert log.read_bytes() == expected
