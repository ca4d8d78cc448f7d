"""Stopped, killed or damaged runs that resume to the undisturbed result."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from crysdistill.errors import InputError
from crysdistill.training import engine, supervised
from crysdistill.training.checkpoints import Checkpoints
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.pretrain import pretrain
from crysdistill.training.resume import keeping
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.targets import Target
from tests.forks import Command
from tests.forks import run as forked
from tests.killed_runs import Death, lives, start
from tests.toy_runs import (
    SHORT,
    command,
    history,
    pretraining_config,
    results,
    same,
    shared,
    training_config,
    weights_of,
)
from tests.toy_stores import labelled, write_store

pytestmark = pytest.mark.usefixtures("each_epoch_is_saved")

# --------------------------------------------------------------- stopping and resuming


def stop_at(step: int, how: Callable[[], None]) -> type[engine.SeededSteps]:
    """A callback that calls `how` before a step."""

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
    """Stands for whatever ends a process without a message."""


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

    def test_twice_and_when_all_is_done(self, config, monkeypatch, capsys):
        config.trainer = replace(SHORT, epochs=6)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 4)
        stopped(monkeypatch, train, replace(config, resume=True), 11)
        for _ in range(2):
            assert same(train(replace(config, resume=True)), whole)
        said = capsys.readouterr().out
        places = [line for line in said.splitlines() if "going on" in line]
        assert places == [f"going on from step {n} of 18" for n in (5, 12, 18)]
        assert history(config.out, "val_mae") == history(whole.parent, "val_mae")

    @pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
    def test_signals_that_come_at_once_are_one(self, config, monkeypatch, again):
        """SLURM and torchrun send two; the run finishes the step and saves it."""
        whole = train(replace(config, out=config.out.with_name("whole")))

        def press_twice() -> None:
            press_ctrl_c()
            os.kill(os.getpid(), again)

        stopped(monkeypatch, train, config, 4, press_twice)
        assert [p.name for p in (config.out / "checkpoints").glob("*5.ckpt")]
        assert same(train(replace(config, resume=True)), whole)

    def test_a_second_ctrl_c_leaves_no_half_step(self, config, monkeypatch):
        """It may come within a step, so the run resumes from the last epoch."""
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
            patch.setattr(keeping, "AGAIN", 0.0)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        assert calls == 5
        assert same(train(replace(config, resume=True)), whole)

    @pytest.mark.parametrize(
        ("validation_step", "position"),
        [
            (1, (0, 6)),  # before the last batch of validation: resumes there
            (2, (1, 0)),  # in its last batch: resumes after the epoch
            (6, (3, 0)),  # in the very last: only the test remains
        ],
    )
    def test_a_signal_in_validation(
        self, config, monkeypatch, validation_step, position
    ):
        config.trainer = replace(SHORT, batch_size=4)
        whole = train(replace(config, out=config.out.with_name("whole")))
        calls, real = 0, supervised.SupervisedModule.validation_step

        def signalled(*arguments):
            nonlocal calls
            calls += 1
            if calls == validation_step:
                terminate()
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(supervised.SupervisedModule, "validation_step", signalled)
            with pytest.raises(KeyboardInterrupt, match=r"step \d+ is saved"):
                train(config)
        assert calls == validation_step
        kept = torch.load(checkpoints(config.out)[-1], weights_only=True)["crysdistill"]
        assert (kept["epoch"], kept["batches"]) == position
        assert same(train(replace(config, resume=True)), whole)
        expected = (whole.parent / "metrics.csv").read_bytes()
        assert (config.out / "metrics.csv").read_bytes() == expected

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({}, [3, 6, 9]),
            ({"checkpoint_minutes": None}, [3, 6, 9]),
            ({"checkpoint_minutes": 1e-9}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
            ({"checkpoint_every": 2}, [2, 3, 4, 6, 8, 9]),
            ({"checkpoint_every": 2, "keep_checkpoints": 3}, [6, 8, 9]),
        ],
    )
    def test_how_often(self, config, settings, steps):
        config.trainer = replace(SHORT, **{"keep_checkpoints": 99, **settings})
        train(config)
        found = [path.name for path in checkpoints(config.out)]
        assert found == [f"step-{step:08d}.ckpt" for step in steps]

    def test_short_epochs_are_not_all_saved(self, config, monkeypatch):
        """A checkpoint waits until saving takes no more than its share of time."""
        now = 0.0

        def passes(seconds):
            nonlocal now
            now += seconds

        monkeypatch.setattr(keeping, "SHARE", 0.1)
        monkeypatch.setattr(keeping, "time", SimpleNamespace(monotonic=lambda: now))
        slow, step = Checkpoints.save_checkpoint, torch.optim.AdamW.step
        monkeypatch.setattr(
            Checkpoints, "save_checkpoint", lambda *a, **k: (passes(5.0), slow(*a, **k))
        )
        monkeypatch.setattr(
            torch.optim.AdamW, "step", lambda *a, **k: (passes(6.0), step(*a, **k))[1]
        )
        # An epoch of three steps takes 18 s and a checkpoint 5 s, so checkpoints are
        # at least 50 s apart.
        config.trainer = replace(SHORT, epochs=9, keep_checkpoints=99)
        train(config)
        found = [path.name for path in checkpoints(config.out)]
        assert found == [f"step-{step:08d}.ckpt" for step in (3, 12, 21, 27)]

    def test_signals_are_given_back(self, config, monkeypatch):
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        stopped(monkeypatch, train, config, 4)
        train(replace(config, resume=True))
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before

    @pytest.mark.parametrize("how", [press_ctrl_c, crash])
    def test_the_best_epoch_before_the_stop_is_remembered(
        self, config, monkeypatch, how
    ):
        """Validation errors are set to 3, 1, 2, 4, ..., so the second epoch is best."""
        values = {3: 3.0, 6: 1.0, 9: 2.0, 12: 4.0}

        def log_planned(self):
            self.log("val_mae", values[self.trainer.global_step])
            self.scores.reset()
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
        """Epochs without progress before the stop count as well."""

        def log_planned(self):
            value = max(1.0, 4.0 - self.trainer.global_step)  # best after one epoch
            self.log("val_mae", value)
            self.scores.reset()
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

    # A step that overflows advances the schedule but changes no weight.
    @pytest.mark.filterwarnings(
        "ignore:Detected call of `lr_scheduler.step:UserWarning"
    )
    def test_the_scale_of_small_gradients(self, config, monkeypatch):
        """It starts so large that the first steps overflow and only reduce it."""
        scales, real = [], L.Trainer

        def trainer(precision, **options):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
            scales.append(scaler)
            plugin = MixedPrecision("16-mixed", "cpu", scaler)
            return real(**{**options, "plugins": [plugin]})

        monkeypatch.setattr(engine.L, "Trainer", trainer)
        # On a CPU there is usually no scale, so the guard would stop at such a step.
        monkeypatch.delattr(engine.Guard, "on_before_optimizer_step")
        whole = train(replace(config, out=config.out.with_name("whole")))
        assert 1 < scales[0].get_scale() < 2.0**17
        stopped(monkeypatch, train, config, 5)
        assert same(train(replace(config, resume=True)), whole)
        assert scales[2].get_scale() == scales[0].get_scale()

    def test_distillation(self, config, monkeypatch, pretrained):
        given = {**shared(config), "teacher": str(pretrained)}
        helped = DistillConfig(**given)
        whole = distill(replace(helped, out=config.out.with_name("whole")))
        stopped(monkeypatch, distill, helped, 4)
        assert same(distill(replace(helped, resume=True)), whole)


# ------------------------------------------------------------------- what cannot resume


def checkpoints(run: Path) -> list[Path]:
    return Checkpoints(run / "checkpoints").paths()


class TestNothingToGoOnFrom:
    def test_a_folder_that_is_not_there(self, config):
        config.resume = True
        assert train(config).exists()

    def test_a_run_killed_at_once(self, config):
        config.out.mkdir()
        (config.out / "config.yaml.partial").write_text("half of")
        train(replace(config, resume=True))
        assert not (config.out / "config.yaml.partial").exists()

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
        said = capsys.readouterr().out
        assert f"{config.out} has no checkpoint yet: from the beginning\n" in said
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
            message = r"dataset: .*dataset\.h5 has changed since the run began"
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
    """A power cut may leave the right length with a page of zeros."""
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
        said = capsys.readouterr().out
        assert f"{newest.name} is damaged; going on from {before.name}\n" in said
        assert results(config.out) == results(whole.parent)
        assert history(config.out, "val_mae") == history(whole.parent, "val_mae")

    def test_all_checkpoints(self, config, monkeypatch):
        stopped(monkeypatch, train, config, 7, crash)
        for path in checkpoints(config.out):
            cut(path)
        text = (
            r"step-00000006\.ckpt and step-00000003\.ckpt are damaged and there is no "
            r"other; start anew with `resume=false overwrite=true`"
        )
        with pytest.raises(InputError, match=text):
            train(replace(config, resume=True))

    def test_metrics(self, config, monkeypatch):
        """The checkpoint holds the metrics, so damage to the file does no harm."""
        config.trainer = replace(SHORT, epochs=4)
        whole = train(replace(config, out=config.out.with_name("whole")))
        stopped(monkeypatch, train, config, 8, crash)
        log = config.out / "metrics.csv"
        log.write_bytes(log.read_bytes()[:-7])
        train(replace(config, resume=True))
        expected = (whole.parent / "metrics.csv").read_bytes()
        assert expected.count(b"\n") == 9
        assert log.read_bytes() == expected

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_metrics_on_a_full_disk(self, config, monkeypatch):
        whole = train(replace(config, out=config.out.with_name("whole")))
        log = config.out / "metrics.csv"

        def fill() -> None:
            log.unlink()
            log.symlink_to("/dev/full")

        text = (
            "metrics.csv: No space left on device; the checkpoint of step 6 is kept; "
        )
        with monkeypatch.context() as patch:
            patch.setattr(engine, "SeededSteps", stop_at(5, fill))
            with pytest.raises(InputError, match=text):
                train(config)
        train(replace(config, resume=True))
        assert log.read_bytes() == (whole.parent / "metrics.csv").read_bytes()


# ------------------------------------------------------------------------- kill -9

FILES = ("weights.safetensors", "metrics.csv", "results.json", "predictions.csv")


def left_alike(run: Path, whole: Path) -> None:
    """Check that two runs left equal files, bit for bit, and no unfinished ones."""
    for name in FILES:
        if name == "weights.safetensors":  # its header names the folder
            assert same(run / name, whole / name)
        elif (whole / name).exists():
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(run.rglob("*.partial"))
    assert [p.name for p in checkpoints(run)] == [p.name for p in checkpoints(whole)]


MOMENTS_TO_DIE = {
    "step": 9, "writing": 6, "written": 6, "validation": 3, "logging": 6, "ending": 1
}  # fmt: skip
DEATHS = [Death(w, n) for w, count in MOMENTS_TO_DIE.items() for n in range(count)]


def often(config):
    """Save twice an epoch: after its second step, and at its end."""
    return replace(config, trainer=replace(SHORT, checkpoint_every=2))


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert lives("train", often(training_config(dataset, out)))
    return out


class TestKilled:
    @pytest.mark.parametrize(
        "death", [Death("step", 4), Death("writing", 2), Death("validation", 1)]
    )
    def test_once(self, config, undisturbed, death):
        config = often(config)
        assert not lives("train", config, death)
        assert lives("train", replace(config, resume=True))
        left_alike(config.out, undisturbed)

    @pytest.mark.slow
    def test_at_every_moment(self, config, undisturbed):
        """Before every step, in every write, in every validation."""
        for number, death in enumerate(DEATHS):
            out = config.out.with_name(f"run-{number}")
            run = often(replace(config, out=out))
            assert not lives("train", run, death), death
            train(replace(run, resume=True))
            left_alike(out, undisturbed)

    @pytest.mark.slow
    def test_again_and_again(self, config, undisturbed):
        """A process that dies after a step, or in its second write, still advances."""
        config = replace(often(config), resume=True)
        config.trainer = replace(SHORT, checkpoint_every=1)
        for attempt in range(40):
            death = Death("step", 1) if attempt % 2 else Death("writing", 1)
            if lives("train", config, death):
                break
        assert 8 < attempt < 39
        config.trainer = replace(config.trainer, checkpoint_every=2)
        left_alike(config.out, undisturbed)

    @pytest.mark.parametrize("death", [Death("step", 9), Death("written", 1)])
    def test_gradients_being_added_up(self, config, death):
        """An epoch has six batches; weights change after the 4th and the 6th."""
        config.trainer = replace(
            SHORT, batch_size=4, accumulate=4, checkpoint_every=1, clip=0.5
        )
        whole = replace(config, out=config.out.with_name("whole"))
        assert lives("train", whole)
        assert checkpoints(whole.out)[-1].name == "step-00000006.ckpt"
        assert not lives("train", config, death)
        assert lives("train", replace(config, resume=True))
        left_alike(config.out, whole.out)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
    def test_mixed_precision(self, config, precision):
        config.trainer = replace(SHORT, checkpoint_every=1, precision=precision)
        if precision == "16-mixed":
            if not torch.cuda.is_available():
                pytest.skip("needs a GPU; but see test_the_scale_of_small_gradients")
            config.trainer.accelerator = "gpu"
        whole = replace(config, out=config.out.with_name("whole"))
        assert lives("train", whole)
        assert not lives("train", config, Death("step", 5))
        assert lives("train", replace(config, resume=True))
        left_alike(config.out, whole.out)

    @pytest.mark.slow
    @pytest.mark.parametrize("run", ["pretrain", "distill"])
    def test_other_runs(self, run, dataset, config, tmp_path, pretrained):
        if run == "pretrain":
            begun = often(pretraining_config(dataset, config.out))
        else:
            begun = often(DistillConfig(**shared(config), teacher=str(pretrained)))
        assert lives(run, replace(begun, out=tmp_path / "whole"))
        for death in (Death("step", 4), Death("writing", 1), Death("validation", 1)):
            begun.resume = begun.out.exists()
            assert not lives(run, begun, death)
        assert lives(run, replace(begun, resume=True))
        left_alike(begun.out, tmp_path / "whole")


# ----------------------------------------------------------------- the command of users


def signalled(config: TrainConfig, number: int, *more: str, lines: int = 8, **env: str):
    """Run the command and send a signal after `lines` lines; return its output."""
    log = config.out / "metrics.csv"

    def written() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    wanted = written() + lines
    process = Command(*command(config, *more), **env)
    end = time.monotonic() + 60
    while written() < wanted and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.signal(number)
    done = process.wait()
    return done.stderr, done.returncode


SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.slow
def test_a_command_stopped_by_signals(config):
    """Ctrl-C, then both signals of SLURM, then one that the run cannot catch."""
    config.trainer = replace(SHORT, epochs=40, checkpoint_every=3)
    whole = replace(config, out=config.out.with_name("whole"))
    for number, of_job, more, env in (
        (signal.SIGINT, "", [], {}),
        (signal.SIGTERM, " of SLURM job 17", ["resume=true"], SLURM),
        (signal.SIGUSR1, " of SLURM job 17", ["resume=true"], SLURM),
    ):
        said, code = signalled(config, number, *more, **env)
        assert code == 130, said
        (step,) = re.findall(
            rf"^interrupted; step (\d+){of_job} is saved; the same command with "
            r"`resume=true` goes on$",
            said, re.MULTILINE,
        )  # fmt: skip
        assert checkpoints(config.out)[-1].name == f"step-{int(step):08d}.ckpt"
        assert not (config.out / "weights.safetensors").exists()
    assert signalled(config, signal.SIGKILL, "resume=true")[1] == -signal.SIGKILL
    for run, more in ((config, ["resume=true"]), (whole, [])):
        assert forked(*command(run, *more)).returncode == 0
    left_alike(config.out, whole.out)


@pytest.mark.slow
def test_killed_at_20_random_moments(config):
    """The run always resumes and ends with the bits of an undisturbed run."""
    config.trainer = replace(SHORT, epochs=15, checkpoint_every=2)
    quiet = replace(config, out=config.out.with_name("quiet"))
    begun = time.monotonic()
    assert lives("train", quiet)
    long = time.monotonic() - begun
    rng = random.Random(0)
    kills = finished = 0
    while kills < 20 or not finished:
        run = replace(config, resume=True)
        if kills < 5:  # the real command, killed after its start
            lines = rng.randrange(1, 12)
            code = signalled(run, signal.SIGKILL, "resume=true", lines=lines)[1]
        else:
            process = start("train", run)
            process.join(rng.uniform(0, 0.6 * long) if kills < 20 else 120)
            process.kill()
            process.join()
            code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            left_alike(config.out, quiet.out)
            shutil.rmtree(config.out)
            finished += 1
