"""Several processes stop together, and resume, also with another number."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.ranks import rank
from crysdistill.training import checkpoints, engine
from crysdistill.training.checkpoints import Checkpoints
from crysdistill.training.settings import OptimizerSettings, SplitSettings
from crysdistill.training.train import TrainConfig, train
from tests.together import together
from tests.toy_runs import SHORT, results, rows, same, training_config, weights_of
from tests.toy_stores import labelled, write_store


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    return write_store(path, labelled(40))


@pytest.fixture
def config(dataset, tmp_path) -> TrainConfig:
    config = training_config(dataset, tmp_path / "run")
    config.split = SplitSettings(train=25, val=7, test=8)
    config.trainer = replace(SHORT, batch_size=7, checkpoint_every=3)
    # Steps that do not amplify rounding, see test_ranks.py.
    config.optimizer = OptimizerSettings(name="sgd", lr=0.02, schedule="cosine")
    return config


def _with_signal(config: TrainConfig, who: int, number: int, step: int) -> Path:
    """Train, and send a signal to one rank, or to all (-1)."""

    class Sending(engine.SeededSteps):
        def on_train_batch_start(self, trainer, *rest):
            if trainer.global_step == step and who in (rank(), -1):
                os.kill(os.getpid(), number)
            super().on_train_batch_start(trainer, *rest)

    engine.SeededSteps = Sending
    return train(config)


def left_alike(run: Path, whole: Path) -> None:
    assert same(run / "weights.safetensors", whole / "weights.safetensors")
    for name in ("metrics.csv", "predictions.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert results(run) == results(whole)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The folder of an undisturbed run on two processes."""
    made = {}

    def find(config: TrainConfig) -> Path:
        if not made:
            out = tmp_path_factory.mktemp("whole") / "run"
            together(2, train, replace(config, out=out))
            made["run"] = out
        return made["run"]

    return find


def _leave_another_behind(config: TrainConfig) -> Path:
    """All ranks are asked to stop, but rank 1 stops at once."""

    class Leaving(engine.SeededSteps):
        def on_train_batch_start(self, trainer, *rest):
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGINT)
                if rank() == 1:
                    raise KeyboardInterrupt
            super().on_train_batch_start(trainer, *rest)

    engine.SeededSteps = Leaving
    return train(config)


def test_who_was_interrupted_does_not_speak_of_a_death(config):
    said = together(2, _leave_another_behind, config)
    assert [type(error) for error in said] == [KeyboardInterrupt] * 2, said


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_stops_all_after_the_same_step(config, undisturbed, who):
    said = together(2, _with_signal, config, who, signal.SIGTERM, 5)
    assert [type(each) for each in said] == [KeyboardInterrupt] * 2, said
    assert [str(each) for each in said] == ["step 6 is saved"] * 2
    assert Checkpoints(config.out / "checkpoints").paths()[-1].name.endswith("06.ckpt")
    together(2, train, replace(config, resume=True))
    left_alike(config.out, undisturbed(config))


def test_killed_and_gone_on_with_another_number(config, undisturbed):
    with pytest.raises(AssertionError, match="processes ended"):
        together(2, _with_signal, config, -1, signal.SIGKILL, 7)
    other = config.out.with_name("other")
    other.mkdir()
    for path in config.out.rglob("*"):
        if path.is_file():
            copy = other / path.relative_to(config.out)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    together(2, train, replace(config, resume=True))
    whole = undisturbed(config)
    left_alike(config.out, whole)
    # One process has the same crystals in the same order; only sums round differently.
    train(replace(config, resume=True, out=other))
    for expected, found in zip(
        rows(whole / "metrics.csv"), rows(other / "metrics.csv"), strict=True
    ):
        known = {k: float(v) for k, v in expected.items() if v}
        assert {k: float(v) for k, v in found.items() if v} == pytest.approx(
            known, rel=2e-4, abs=1e-6
        )
    theirs = weights_of(other / "weights.safetensors")
    for name, tensor in weights_of(whole / "weights.safetensors").items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def _on_a_full_disk(config: TrainConfig) -> Path:
    written = checkpoints.write_whole
    calls = 0

    def write(path, content):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return written(path, content)

    checkpoints.write_whole = write
    return train(config)


def test_a_full_disk_stops_all(config, undisturbed):
    """Only rank 0 writes, and the others wait for it."""
    said = together(2, _on_a_full_disk, config)
    for each in said:
        assert isinstance(each, InputError), each
        assert str(each) == (
            f"{config.out}/checkpoints/step-00000006.ckpt: No space left on device; "
            "the checkpoint of step 4 is kept; make room, and the same command with "
            "`resume=true` goes on there"
        )
    together(2, train, replace(config, resume=True))
    left_alike(config.out, undisturbed(config))
