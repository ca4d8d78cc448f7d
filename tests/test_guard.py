"""Diverging runs stop and name their crystals; healthy runs are not changed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from crysdistill.cli import main
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.watch import guard
from crysdistill.training.watch.culprits import find_culprits
from crysdistill.training.watch.divergence import (
    STREAK,
    LossWatch,
    all_finite,
)
from crysdistill.training.watch.guard import FILE, Guard
from crysdistill.training.watch.throughput import Throughput
from tests.spoiled_runs import run_spoiled
from tests.together import joined_call, together
from tests.toy_fits import ToyRun
from tests.toy_stores import labelled, open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(tmp_path_factory.mktemp("guard") / "s.h5", labelled(40))


def guard_of(toy: ToyRun) -> Guard:
    return Guard(toy.run, toy.train, toy.val)


def record_of(toy: ToyRun) -> dict:
    return json.loads((toy.run.path / FILE).read_text())


def spoil(store: Store, monkeypatch: pytest.MonkeyPatch, *rows: int) -> list[str]:
    """Set the cells of crystals to NaN, as a bug might; return their ids."""
    plain = Store.batch

    def batch(self, chosen, *rest, **options):
        made = plain(self, chosen, *rest, **options)
        for place in np.flatnonzero(np.isin(np.asarray(chosen), rows)):
            made.cell[place] = math.nan
        return made

    monkeypatch.setattr(Store, "batch", batch)
    return [store.material_ids[row] for row in rows]


class Remember(L.Callback):
    """Keeps the weights as they were before each batch."""

    def __init__(self) -> None:
        self.all_weights: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch_idx
        self.rows = batch.rows.tolist()
        self.weights = [p.detach().clone() for p in pl_module.parameters()]
        self.all_weights.append(self.weights)


# ------------------------------------------------------------------------- the watch


class TestLossWatch:
    @pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_has_diverged(self, loss):
        watch = LossWatch()
        assert watch.add(0.3) is None
        assert watch.add(loss) == f"is {loss}"

    def test_an_explosion_needs_a_streak(self):
        watch = LossWatch()
        for _ in range(20):
            assert watch.add(0.5) is None
        for _ in range(STREAK - 1):
            assert watch.add(1e6) is None
        assert watch.add(0.5) is None  # a spike is no explosion
        for _ in range(STREAK - 1):
            assert watch.add(1e6) is None
        said = watch.add(1e6)
        assert said == (
            "is 1e+06, and for 5 steps more than 1,000 times as large as usual (0.5)"
        )

    @pytest.mark.parametrize("growth", [2.0, 1.5])
    def test_steady_growth_is_an_explosion(self, growth):
        watch, loss = LossWatch(), 1.0
        while not watch.add(loss):
            loss *= growth
        assert loss < 1e14  # long before single precision overflows

    def test_an_explosion_at_the_first_steps(self):
        watch = LossWatch()
        said = [watch.add(loss) for loss in (1.0, 1e7, 1e7, 1e8, 1e9, 1e9)]
        assert said[:5] == [None] * 5
        assert said[5]

    @pytest.mark.parametrize(
        "losses",
        [
            np.geomspace(1, 1e-12, 300),  # converges to zero
            np.r_[np.geomspace(1, 1e-9, 200), np.full(50, 0.9)],  # and loses all of it
            np.r_[
                np.geomspace(1e-3, 300, 200), np.geomspace(300, 1e-2, 200)
            ],  # warm-up
            1e7 * np.random.default_rng(0).lognormal(0, 1.5, 2000),  # a sum over pairs
            np.random.default_rng(0).standard_cauchy(5000).clip(-900, 900),
            np.where(np.arange(1000) % 4 == 0, 5e4, 0.1),  # outliers in some batches
            -np.geomspace(1, 900, 300),  # likelihoods
            np.zeros(300),
        ],
        ids=lambda losses: f"{losses[0]:.3g} to {losses[-1]:.3g}",
    )
    def test_healthy_losses(self, losses):
        watch = LossWatch()
        assert not any(watch.add(float(loss)) for loss in losses)


class TestFindCulprits:
    @pytest.mark.parametrize("bad", [{3}, {0}, {99}, {3, 4, 77}, set()])
    def test_finds_what_is_bad_alone(self, bad):
        asked = []

        def is_bad(rows):
            asked.append(rows)
            return bool(bad & set(rows))

        assert find_culprits(range(100), is_bad) == sorted(bad)
        assert len(asked) <= 1 + 2 * 7 * len(bad)

    def test_where_all_are_bad_it_is_none_of_them(self):
        asked = []
        assert find_culprits(range(5000), lambda rows: asked.append(1) or True) == []
        assert len(asked) < 60
        assert find_culprits([1, 2, 3], lambda rows: True) == []

    def test_none_is_bad_alone(self):
        assert find_culprits(range(10), lambda rows: len(rows) > 1) == []
        assert find_culprits([], lambda rows: True) == []
        assert find_culprits([4], lambda rows: True) == [4]


# --------------------------------------------------------------------------- runs


def told_by_ranks(store: Store, out: Path, row: int, lr: float) -> list[dict]:
    """Run on two processes; return the report of each."""
    return together(2, joined_call, run_spoiled, store.path, out, row, lr)


@pytest.mark.slow
def test_ranks_stop_together(store, tmp_path):
    """Only one of two ranks has the crystal, and both name it."""
    first, second = told_by_ranks(store, tmp_path / "run", row=17, lr=0.01)
    assert first["error"] == second["error"]
    name = store.material_ids[17]
    assert first["error"].startswith("the loss is nan in batch")
    record = json.loads((tmp_path / "run" / FILE).read_text())
    assert name in record["material_ids"]
    assert len(record["material_ids"]) == len(set(record["material_ids"])) == 3
    assert str(first["losses"]) == str(second["losses"])
    assert record["history"][-1]["loss"] == "nan"


@pytest.mark.slow
def test_ranks_see_one_loss_and_count_all_crystals(store, tmp_path):
    told = told_by_ranks(store, tmp_path / "run", row=-1, lr=1e-12)
    assert [one["error"] for one in told] == ["", ""]
    assert told[0]["losses"] == told[1]["losses"]
    sgd = OptimizerSettings("sgd", lr=1e-12, schedule="constant")
    toy = ToyRun(store, tmp_path / "one", 3, sgd, "eq5")
    watching, speed = guard_of(toy), Throughput(toy.run, toy.train)
    toy.fit([watching, speed], max_epochs=3)
    expected = [step.loss for step in watching._steps]
    np.testing.assert_allclose(told[0]["losses"], expected, rtol=1e-4)
    report = json.loads((tmp_path / "run" / "throughput.json").read_text())
    for name in ("steps", "crystals", "atoms", "edges"):
        assert report[name] == speed.report[name]
    balance = report["balance"]
    assert balance["ranks"] == 2
    assert balance["busiest_over_mean"] - 1 == pytest.approx(
        toy.train.batches.imbalance(2), rel=0.3
    )
    assert report["covers"] == "all ranks"
    # The maximum and not the sum, which would count shared memory twice.
    peaks = [one["report"]["memory"]["peak_bytes"] for one in told]
    assert peaks[0] == peaks[1]
    assert 2e8 < peaks[0] < 1.5 * speed.report["memory"]["peak_bytes"]


def test_a_crystal_that_spoils_its_batch(store, tmp_path, monkeypatch):
    """It is named, no weight changes, and the last two batches are recorded."""
    toy = ToyRun(store, tmp_path / "run")
    (name,) = spoil(store, monkeypatch, 17)
    remember = Remember()
    message = rf"^the loss is nan in batch \d+ of epoch 0; {name} alone gives a loss"
    with pytest.raises(InputError, match=message) as caught:
        toy.fit([remember, guard_of(toy)])
    assert "\n" not in str(caught.value)
    assert str(toy.run.path / FILE) in str(caught.value)
    moved = zip(remember.weights, toy.module.parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in moved)
    record = record_of(toy)
    ids = store.material_ids
    assert record["material_ids"] == [ids[row] for row in remember.rows]
    assert record["alone_not_finite"] == [name]
    assert record["batch"] == remember.batch
    assert record["in"] == "training"
    assert record["weights_finite"]
    history = record["history"]
    assert history[-1]["loss"] == "nan"
    assert len(history) == remember.batch + 1
    assert all(step["gradient_norm"] > 0 for step in history[:-1])
    assert len(record["material_ids_of_batch_before"]) == (8 if remember.batch else 0)


def test_a_learning_rate_without_measure(store, tmp_path):
    sgd = OptimizerSettings("sgd", lr=1e6, schedule="constant")
    toy = ToyRun(store, tmp_path / "run", optimizer=sgd)
    message = (
        r"^the (loss|gradient's norm) is .*; lower `optimizer.lr` \(here 1e\+06\), "
        r"or set `trainer.clip=1`, and `overwrite=true`; "
    )
    with pytest.raises(InputError, match=message):
        toy.fit([guard_of(toy)], max_epochs=100)
    assert record_of(toy)["lr"] == 1e6
    assert record_of(toy)["alone_not_finite"] == []
    assert all_finite(toy.module)


def test_advice_knows_what_is_set(store, tmp_path):
    sgd = OptimizerSettings("sgd", lr=1e30, schedule="constant")
    toy = ToyRun(store, tmp_path / "run", optimizer=sgd)
    with pytest.raises(InputError) as caught:
        toy.fit([guard_of(toy)], gradient_clip_val=10.0, precision="bf16-mixed")
    said = str(caught.value)
    assert "lower `trainer.clip` (10), or set `trainer.precision=32-true`" in said


def test_a_gradient_that_is_not_finite(store, tmp_path):
    """The loss is the square root of 0, which has no finite gradient."""
    toy = ToyRun(store, tmp_path / "run")
    remember = Remember()
    plain = toy.module.losses

    def losses(batch, seed):
        loss = (0 * plain(batch, seed)["loss"]).sqrt()
        return {"property": loss, "loss": loss}

    toy.module.losses = losses
    with pytest.raises(InputError, match=r"^the gradient's norm is nan in batch 0 of"):
        toy.fit([remember, guard_of(toy)])
    moved = zip(remember.weights, toy.module.parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in moved)


def test_a_crystal_that_spoils_validation(store, tmp_path, monkeypatch):
    toy = ToyRun(store, tmp_path / "run")
    (name,) = spoil(store, monkeypatch, 36)
    message = rf"^the validation loss is nan after epoch 0; {name} alone gives"
    with pytest.raises(InputError, match=message):
        toy.fit([guard_of(toy)])
    record = record_of(toy)
    assert record["in"] == "validation"
    assert name in record["material_ids"]
    assert record["alone_not_finite"] == [name]


def test_no_checkpoint_of_what_has_diverged(store, tmp_path):
    """An infinite weight is found before it reaches a checkpoint."""
    toy = ToyRun(store, tmp_path / "run")
    path = tmp_path / "kept.ckpt"

    class Break(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            next(pl_module.parameters()).data[0] = math.inf
            trainer.save_checkpoint(path)

    with pytest.raises(InputError, match="the weights are not finite in batch 0 of"):
        toy.fit([Break(), guard_of(toy)])
    assert not path.exists()


def test_accumulated_losses_are_those_of_batches(store, tmp_path):
    """Lightning divides each loss by the number of accumulated batches."""
    seen = []
    for accumulate in (1, 3):
        toy = ToyRun(
            store, tmp_path / str(accumulate), optimizer=OptimizerSettings(lr=1e-12)
        )
        watching = guard_of(toy)
        toy.fit([watching], accumulate_grad_batches=accumulate)
        seen.append([step.loss for step in watching._steps])
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-5)


@pytest.fixture
def as_on_gpu(monkeypatch) -> list[torch.Tensor]:
    """Make guards behave as on a GPU; return the losses that they fetch."""
    sent = []

    def send_for(value):
        sent.append(value)
        return value.item

    monkeypatch.setattr(guard, "_runs_ahead", lambda module: True)
    monkeypatch.setattr(guard, "_send_for", send_for)
    return sent


@pytest.mark.parametrize("row", [2, 11, 17])
def test_on_a_gpu_the_loss_is_seen_a_step_later(
    store, tmp_path, monkeypatch, as_on_gpu, row
):
    """The message comes within the epoch and names the bad step."""
    toy = ToyRun(store, tmp_path / "run", batch_size=10)
    (name,) = spoil(store, monkeypatch, row)
    order = toy.train.order(0).tolist()
    bad = order.index(row) // 10
    remember = Remember()
    message = rf"^the loss is nan in batch {bad} of epoch 0; "
    with pytest.raises(InputError, match=message):
        toy.fit([remember, guard_of(toy)])
    assert remember.batch == min(bad + 1, 2)
    record = record_of(toy)
    chosen = order[10 * bad : 10 * bad + 10]
    assert record["material_ids"] == [store.material_ids[r] for r in chosen]
    assert name in record["material_ids"]
    assert len(record["material_ids_of_batch_before"]) == (10 if bad else 0)
    assert record["weights_finite"]
    assert record["alone_not_finite"] == [name]
    before = remember.all_weights[bad]
    moved = zip(before, toy.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in moved)  # restored after the next step


def test_on_a_gpu_healthy_losses_are_all_seen(store, tmp_path, as_on_gpu):
    toy = ToyRun(store, tmp_path / "run", batch_size=10)
    seen = guard_of(toy)
    toy.fit([seen], accumulate_grad_batches=2, limit_val_batches=0)
    assert len(as_on_gpu) == len(seen._steps) == 6
    assert all(step.loss is not None for step in seen._steps)
    assert all(step.gradient_norm is None for step in seen._steps)


@pytest.mark.parametrize("schedule", ["onecycle", "constant", "cosine"])
def test_healthy_runs_are_left_alone(store, tmp_path, schedule):
    """With and without the guard, the weights are equal bit for bit."""
    weights = []
    for guarded in (True, False):
        optimizer = OptimizerSettings(lr=0.02, schedule=schedule)
        toy = ToyRun(store, tmp_path / f"{guarded}", optimizer=optimizer)
        toy.fit([guard_of(toy)] if guarded else [], max_epochs=8)
        weights.append(torch.cat([p.flatten() for p in toy.module.parameters()]))
        assert not (toy.run.path / FILE).exists()
    assert torch.equal(*weights)


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_the_command_says_it_in_one_line(store, tmp_path, capfd, verb):
    out = tmp_path / "run"
    line = (
        f"{verb} out={out} encoder.width=8 encoder.convolutions=2 "
        "trainer.epochs=20 trainer.batch_size=8 trainer.accelerator=cpu "
        "trainer.progress=false trainer.clip=null optimizer.name=sgd optimizer.lr=1e9 "
        "optimizer.schedule=constant "
    )
    if verb == "train":
        line += f"dataset={store.path} target.name=density"
    else:
        line += f"corpus={store.path} objectives.space_group=false"
        line += " objectives.crystal_system=false"
    assert main(line.split()) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the ")
    assert "lower `optimizer.lr` (here 1e+09), or set `trainer.clip=1`" in said
    assert str(out / FILE) in said
    assert json.loads((out / FILE).read_text())["lr"] == 1e9
