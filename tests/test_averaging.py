"""Averaged weights: in validation, batch norms, resumed runs, and over ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crysdistill.splits import make_split
from crysdistill.store.store import Store
from crysdistill.training import labelled as labelled_runs
from crysdistill.training import supervised
from crysdistill.training.finetune import finetune
from crysdistill.training.loader import BatchLoader
from crysdistill.training.pretrain import pretrain
from crysdistill.training.settings import (
    AugmentSettings,
    FreezeSettings,
    HeadSettings,
)
from crysdistill.training.train import train
from crysdistill.transfer.weights import load_predictor
from tests.test_resume import press_ctrl_c, stopped, terminate
from tests.together import together
from tests.toy_runs import (
    PLAIN,
    SHORT,
    Watched,
    pretraining_config,
    same,
    tuning,
    weights_of,
)

RIDGE = HeadSettings(hidden=8, start="ridge")


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_validation_sees_the_average(config, monkeypatch, kind):
    monkeypatch.setattr(labelled_runs, "SupervisedModule", Watched)
    config.trainer = replace(SHORT, average=kind, average_span=0.5)
    config.optimizer = PLAIN
    weights = train(config)
    parameters = {n for n, _ in load_predictor(weights).named_parameters()}
    assert len(Watched.steps) == 9  # three epochs of three steps
    for epoch, seen in enumerate(Watched.seen):
        done = Watched.steps[: 3 * (epoch + 1)]
        if kind == "swa":
            used = done[4:]  # 4.5 steps are half of the run
            used = used or done[-1:]
            expected = {
                n: torch.stack([s[n] for s in used]).mean(0) for n in parameters
            }
        else:
            expected = {n: done[0][n].clone() for n in parameters}
            for n, step in enumerate(done[1:], start=1):
                decay = min(1 - 1 / 4.5, (1 + n) / (10 + n))
                for name in parameters:
                    expected[name].lerp_(step[name], 1 - decay)
        for name in parameters:
            torch.testing.assert_close(seen[name], expected[name], rtol=1e-5, atol=1e-6)


def test_batch_norms_of_the_average_have_its_statistics(config):
    """The same as from torch's `update_bn` over the batches of an epoch."""
    config.trainer = replace(SHORT, epochs=1, average="ema")
    predictor = load_predictor(train(config))
    store = Store.open(config.dataset)
    split = make_split(store, config.split, store.property("density"))
    loader = BatchLoader(store, split.train, 8, ["density"], True, config.seed)
    found = {n: b.clone() for n, b in predictor.named_buffers() if "running" in n}
    assert found
    torch.optim.swa_utils.update_bn(loader, predictor)
    for name, buffer in predictor.named_buffers():
        if name in found:
            torch.testing.assert_close(buffer, found[name], rtol=1e-4, atol=1e-5)


def test_frozen_batch_norms_keep_their_statistics(config, pretrained):
    config.trainer = replace(SHORT, average="ema")
    weights = finetune(
        tuning(config, pretrained, freeze=FreezeSettings(convolutions="all"))
    )
    before, after = weights_of(pretrained), weights_of(weights)
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("kind", "step"), [("ema", 4), ("ema", 6), ("swa", 5), ("swa", 6), ("swa", 8)]
)
def test_averages_go_on_bit_for_bit(config, monkeypatch, kind, step):
    config.trainer = replace(SHORT, average=kind, average_span=0.5)
    whole = train(replace(config, out=config.out.with_name("whole")))
    stopped(monkeypatch, train, config, step, press_ctrl_c)
    assert same(train(replace(config, resume=True)), whole)
    expected = (whole.parent / "metrics.csv").read_bytes()
    assert (config.out / "metrics.csv").read_bytes() == expected


@pytest.mark.parametrize("validation_step", [1, 3, 6])
def test_averages_when_validation_is_interrupted(config, monkeypatch, validation_step):
    """The module then holds the average; the checkpoint holds the trained weights."""
    config.trainer = replace(SHORT, batch_size=4, average="ema")
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
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert same(train(replace(config, resume=True)), whole)
    expected = (whole.parent / "metrics.csv").read_bytes()
    assert (config.out / "metrics.csv").read_bytes() == expected


def test_pretraining_averages_too(dataset, tmp_path):
    made = [
        pretrain(
            pretraining_config(
                dataset, tmp_path / kind, trainer=replace(SHORT, average=kind)
            )
        )
        for kind in ("none", "ema")
    ]
    assert not same(*made)


def test_averages_do_not_depend_on_the_number_of_processes(config, tmp_path):
    config.optimizer = PLAIN
    config.head = RIDGE
    config.augment = AugmentSettings(moved=0.05, strain=0.01)
    config.trainer = replace(SHORT, average="ema", average_span=0.5, threads=1)
    one = train(replace(config, out=tmp_path / "one"))
    found = together(2, train, replace(config, out=tmp_path / "two"))
    assert found == [tmp_path / "two" / "weights.safetensors"] * 2, found
    theirs = weights_of(found[0])
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)
