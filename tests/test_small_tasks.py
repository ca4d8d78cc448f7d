"""Probes on small tasks during pretraining."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.splits.settings import SplitSettings
from crysdistill.store.store import Store
from crysdistill.training.pretrain import pretrain
from crysdistill.training.small_tasks import (
    PROBED,
    ProbeSettings,
    SmallTask,
    SmallTasks,
    effective_rank,
    uniformity,
)
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_encoder
from tests.toy_runs import pretraining_config
from tests.toy_stores import labelled, write_store


def settings(dataset, name="density", **changes) -> ProbeSettings:
    return ProbeSettings(
        dataset=dataset, target=Target(name), split=SplitSettings(**changes)
    )


@pytest.fixture
def task(dataset) -> SmallTask:
    return SmallTask.open(settings(dataset), Store.open(dataset))


def test_whoever_knows_the_label_makes_no_error(task):
    rows = np.array([*task.train, *task.val])
    known = torch.from_numpy(task.labels[rows]).unsqueeze(1)
    assert task.errors(known)["ridge"] < 1e-3
    assert task.errors(known)["knn"] < 0.3


def test_whoever_knows_nothing_is_as_good_as_a_constant(task):
    alike = torch.ones(len(task.train) + len(task.val), 3)
    # It predicts the mean of the training labels; the control predicts the median.
    y, wanted = task.labels[task.train], task.labels[task.val]
    expected = np.abs(y.mean() - wanted).mean() / np.abs(np.median(y) - wanted).mean()
    assert task.errors(alike)["ridge"] == pytest.approx(expected)


def test_ridge_is_that_of_scikit_learn(task):
    x = torch.randn(len(task.train) + len(task.val), 4)
    own, asked = x[: len(task.train)].numpy(), x[len(task.train) :].numpy()
    mean, deviation = own.mean(0, dtype=float), own.std(0, dtype=float)
    plain = RidgeCV(np.logspace(-3, 4, 15)).fit(
        (own - mean) / deviation, task.labels[task.train]
    )
    wrong = plain.predict((asked - mean) / deviation) - task.labels[task.val]
    median = np.median(task.labels[task.train])
    expected = np.abs(wrong).mean() / np.abs(task.labels[task.val] - median).mean()
    assert task.errors(x)["ridge"] == pytest.approx(expected, rel=1e-6)


def test_test_crystals_are_not_looked_at(dataset):
    store = Store.open(dataset)
    one = SmallTask.open(settings(dataset, train=20, val=8, test=12), store)
    assert (len(one.train), len(one.val)) == (20, 8)
    few = SmallTask.open(
        replace(settings(dataset, train=20, val=8, test=12), labels=5), store
    )
    assert set(few.train) <= set(one.train)
    assert len(few.train) == 5
    # Even from a split in the order of ids, the drawn crystals are not consecutive.
    ordered = replace(settings(dataset, by="id"), labels=5)
    assert np.ptp(SmallTask.open(ordered, store).train) > 5


def test_a_probe_leaves_the_encoder_as_it_was(dataset, task):
    encoder = CGCNN(width=8, convolutions=2).train()
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    tasks = SmallTasks([task], Store.open(dataset), np.arange(10))
    first, second = tasks.look(encoder), tasks.look(encoder)
    assert first == second
    assert encoder.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_effective_rank_and_uniformity_of_known_shapes():
    line = torch.linspace(-1, 1, 50, dtype=torch.float64).outer(torch.ones(4))
    assert effective_rank(line) == pytest.approx(1)
    axes = torch.cat((torch.eye(6), -torch.eye(6)))
    assert effective_rank(axes) == pytest.approx(6)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0)
    # Two opposite points: one pair at distance 2.
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-8)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A run with two probes, where the loss and the probes favour different epochs."""
    config = pretraining_config(dataset, tmp_path_factory.mktemp("probed") / "run")
    config = replace(config, probes=[settings(dataset)])
    config.trainer = replace(config.trainer, epochs=4)
    pretrain(config)
    return config


def test_the_epoch_is_chosen_by_the_probes(run, dataset):
    with (run.out / "metrics.csv").open(newline="") as file:
        errors = [float(r[PROBED]) for r in csv.DictReader(file) if r[PROBED]]
    assert len(errors) == 4
    results = json.loads((run.out / "results.json").read_text())["probes"]
    assert results["pretrained"][PROBED] == pytest.approx(min(errors), rel=1e-5)
    assert set(results) == {"composition", "untrained", "pretrained"}
    # The file holds the weights of that epoch.
    store = Store.open(dataset)
    encoder = load_encoder(run.out / "weights.safetensors")
    tasks = SmallTasks([SmallTask.open(run.probes[0], store)], store, np.arange(10))
    assert tasks.look(encoder)[PROBED] == pytest.approx(min(errors), rel=1e-5)


def test_the_run_has_a_picture(run):
    picture = (run.out / "probes.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert len(picture) > 5_000


def test_a_set_whose_crystals_the_corpus_may_hold_is_named(dataset, tmp_path, capsys):
    config = replace(
        pretraining_config(dataset, tmp_path / "run"), probes=[settings(dataset)]
    )
    pretrain(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "probe of density: the corpus may hold its crystals; `exclude=[" in said
    assert re.search(r"probes of composition: \d\.\d{3} x the median's error", said)


def test_what_cannot_be_probed_is_refused(dataset, tmp_path):
    store = Store.open(dataset)
    with pytest.raises(InputError, match=r"`probes.labels` is 1 but must be at least"):
        ProbeSettings(dataset=dataset, target=Target("density"), labels=1)
    with pytest.raises(InputError, match="whose task is classification; give a number"):
        ProbeSettings(dataset=dataset, target=Target("c", task="classification"))
    with pytest.raises(InputError, match=r"has 1 crystals to train a probe .*need two"):
        SmallTask.open(settings(dataset, train=0.03, val=5, test=5), store)
    one = SmallTask.open(settings(dataset), store)
    with pytest.raises(InputError, match="`probes` names 'density' twice"):
        SmallTasks([one, one], store, np.arange(3))
    other = write_store(
        tmp_path / "o.h5", labelled(12), graph=GraphSettings(max_neighbors=3)
    )
    with pytest.raises(
        InputError, match=r"has another graph than .* --max-neighbors 6`"
    ):
        SmallTask.open(settings(other), store)
