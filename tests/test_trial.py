"""A trial of the heaviest batch comes first, and changes nothing."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.training import trial
from crysdistill.training.settings import SplitSettings, TrainerSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_encoder
from tests.together import together
from tests.toy_stores import SMALL_ENCODER, labelled, write_store


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("trial")
    return TrainConfig(
        dataset=write_store(folder / "s.h5", labelled(40)),
        target=Target("density"),
        out=folder / "run",
        encoder=SMALL_ENCODER,
        split=SplitSettings(train=24, val=8, test=8),
        trainer=TrainerSettings(
            epochs=2, batch_size=8, accelerator="cpu", progress=False, threads=1
        ),
    )


def _with_little_memory(config: TrainConfig) -> Path:
    """Train with a limit of one more megabyte, set once the heaviest batch is known."""
    heaviest = trial.BatchLoader.heaviest

    def limited(self, epochs):
        found = heaviest(self, epochs)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return found

    trial.BatchLoader.heaviest = limited
    try:
        return train(config)
    finally:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_batch_that_does_not_fit_gives_advice(config, tmp_path):
    config = replace(
        config,
        encoder={**SMALL_ENCODER, "width": 2048},
        trainer=replace(config.trainer, batch_size=24),
        out=tmp_path / "run",
    )
    (found,) = together(1, _with_little_memory, config)
    assert isinstance(found, InputError), found
    edges = re.fullmatch(
        r"the heaviest batch \(24 crystals, (\d+) edges\) does not fit into the memory "
        r"of cpu; set `trainer.edge_budget` to (\d+), or `trainer.batch_size` to 12, "
        r"and `trainer.accumulate` to 2 for the same steps",
        str(found),
    )
    assert edges, str(found)
    assert int(edges[2]) == int(edges[1]) // 2


def test_the_trial_leaves_nothing_behind(config, tmp_path, monkeypatch):
    with_trial = train(replace(config, out=tmp_path / "with"))
    monkeypatch.setattr(trial.HeaviestFirst, "on_train_start", lambda *_: None)
    without = train(replace(config, out=tmp_path / "without"))
    expected = load_encoder(without).state_dict()
    for name, tensor in load_encoder(with_trial).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_heaviest_batch_is_tried(config, tmp_path, monkeypatch):
    seen = []
    losses = trial.BatchLoader.heaviest

    def watched(self, epochs):
        found = losses(self, epochs)
        seen.append((found[0].num_edges, found[2], self.batches.loads.max()))
        return found

    monkeypatch.setattr(trial.BatchLoader, "heaviest", watched)
    trainer = replace(config.trainer, edge_budget=200)
    train(replace(config, out=tmp_path / "run", trainer=trainer))
    assert len(seen) == 1
    assert len(set(seen[0])) == 1


def test_what_an_encoder_says_it_needs_is_held_against_memory(
    config, tmp_path, monkeypatch
):
    """Otherwise Linux kills the process without a message."""
    monkeypatch.setattr(
        "crysdistill.encoders.cgcnn.CGCNN.memory", lambda self, batch: 10**16
    )
    with pytest.raises(
        InputError, match=r"heaviest batch .* does not fit into the mem"
    ):
        train(replace(config, out=tmp_path / "run"))


def test_other_errors_are_not_about_memory(config, tmp_path, monkeypatch):
    def fail(self, batch, seed):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("crysdistill.training.supervised.SupervisedModule.losses", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(replace(config, out=tmp_path / "run"))
