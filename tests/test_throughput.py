"""A run reports its speed: counts, clocks, waiting, memory, estimates."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from crysdistill.encoders.encoder import Work
from crysdistill.store.store import Store
from crysdistill.training import loader
from crysdistill.training.settings import SplitSettings, TrainerSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.training.watch import ceilings, throughput
from crysdistill.training.watch.ceilings import Ceilings, measure_ceilings
from crysdistill.training.watch.guard import Guard
from crysdistill.training.watch.memory import PeakMemory
from crysdistill.training.watch.pace import Pace
from crysdistill.training.watch.progress import EpochLines, ProgressBar
from crysdistill.training.watch.throughput import FILE, Throughput, lines
from crysdistill.transfer.targets import Target
from tests.toy_fits import ToyRun
from tests.toy_stores import SMALL_ENCODER, labelled, open_store, write_store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(tmp_path_factory.mktemp("speed") / "s.h5", labelled(40))


def speed_of(toy: ToyRun) -> Throughput:
    return Throughput(toy.run, toy.train)


def steps(*seconds: float, crystals: int = 10, waited: float = 0.0) -> tuple:
    """The arguments of `Pace.add` for one rank."""
    number = len(seconds)
    counts = np.tile([crystals, 3 * crystals, 36 * crystals], (number, 1))
    edges = counts[:, 2][None]
    return np.array(seconds), np.full(number, waited), counts, edges


# ------------------------------------------------------------------------- the pace


class TestPace:
    def test_a_steady_run(self):
        pace = Pace(warm_up=3)
        for _ in range(4):
            pace.add(*steps(*[0.1] * 25, waited=0.02))
        rates = pace.rates()
        assert rates["crystals_per_s"] == pytest.approx(100)
        assert rates["atoms_per_s"] == pytest.approx(300)
        assert rates["edges_per_s"] == pytest.approx(3600)
        assert rates["basis"] == "median of 19 windows"
        assert pace.stall == pytest.approx(0.2)
        assert (pace.steps, pace.crystals, pace.edges) == (100, 1000, 36000)
        assert pace.seconds == pytest.approx(10)

    def test_compilation_and_pauses_do_not_count(self):
        pace = Pace(warm_up=3)
        pace.add(*steps(30.0, 5.0, 1.0, *[0.1] * 40))
        pace.add(*steps(*[0.1] * 20, 60.0, *[0.1] * 40))
        assert pace.rates()["crystals_per_s"] == pytest.approx(100)
        assert pace.seconds == pytest.approx(106)  # the total includes slow steps

    def test_short_runs_say_what_they_are(self):
        pace = Pace(warm_up=3)
        pace.add(*steps(9.0, 0.1))
        rates = pace.rates()
        assert rates["crystals_per_s"] == pytest.approx(20 / 9.1)
        assert rates["basis"] == "mean of 2 steps, the first included"
        pace.add(*steps(0.1, 0.1, 0.1))
        rates = pace.rates()
        assert rates["crystals_per_s"] == pytest.approx(100)
        assert rates["basis"] == "mean of 2 steps after the first 3"
        assert rates["crystals_per_s_quartiles"] is None

    def test_windows_stay_few(self, monkeypatch):
        monkeypatch.setattr("crysdistill.training.watch.pace._MOST", 10)
        pace = Pace(warm_up=0)
        for _ in range(20):
            pace.add(*steps(*[0.2] * 20))
        assert len(pace._windows) <= 10
        assert pace.rates()["crystals_per_s"] == pytest.approx(50)

    def test_ranks_and_batches_of_unequal_weight(self):
        pace = Pace(warm_up=0)
        counts = np.array([[2, 4, 40], [2, 4, 20]])
        edges = np.array([[30, 20], [10, 0]])
        pace.add(np.ones(2), np.zeros(2), counts, edges)
        assert pace.imbalance == pytest.approx((30 / 20 + 20 / 10) / 2)
        assert pace.fill == pytest.approx(30 / 40)

    def test_nothing_and_empty_batches(self):
        pace = Pace(warm_up=3)
        none = np.zeros(0)
        pace.add(none, none, np.zeros((0, 3), int), np.zeros((1, 0), int))
        assert (pace.steps, pace.stall, pace.imbalance, pace.fill) == (0, 0, 1, 1)
        pace.add(np.ones(1), np.zeros(1), np.zeros((1, 3), int), np.zeros((2, 1), int))
        assert pace.imbalance == 1


# -------------------------------------------------------------------------- runs


def test_counts_are_those_of_the_store(store, tmp_path, capsys):
    toy = ToyRun(store, tmp_path / "run")
    speed = speed_of(toy)
    toy.fit([speed], max_epochs=3)
    report = json.loads((toy.run.path / FILE).read_text())
    rows = toy.train.rows
    atoms = sum(len(store.batch([row]).batch) for row in rows)
    edges = sum(store.batch([row]).edge_index.shape[1] for row in rows)
    assert report["crystals"] == 3 * len(rows)
    assert report["atoms"] == 3 * atoms
    assert report["edges"] == 3 * edges
    assert report["steps"] == 3 * len(toy.train)
    assert report["covers"] == "the run"
    assert report["balance"]["ranks"] == 1
    assert report["balance"]["busiest_over_mean"] == 1
    assert 0.5 < report["balance"]["mean_over_heaviest_batch"] <= 1
    assert report["memory"]["peak_bytes"] > 50e6
    assert report["memory"]["gpu_peak_bytes"] is None
    assert report["device"].startswith("cpu")
    seconds = report["seconds"]
    assert all(value >= 0 for value in seconds.values())
    assert 0 < seconds["validation"] < seconds["training"] + seconds["other"]
    said = capsys.readouterr().out
    assert "crystals/s" in said
    assert "waiting for batches" in said
    assert report["work"]["gflops"] > 0
    assert report["work"]["ceiling"] is None
    assert "work of the encoder" not in said


class Slow(L.Callback):
    """Makes one part of a run take 0.125 s on a clock that otherwise stands still."""

    def __init__(self, toy: ToyRun, what: str, patch: pytest.MonkeyPatch) -> None:
        self.what, self.now = what, 0.0
        for module in (throughput, loader):
            clock = SimpleNamespace(perf_counter=lambda: self.now)
            patch.setattr(module, "time", clock)
        if what == "batches":
            gather = toy.train._batch
            toy.train._batch = lambda chosen: (self.pass_time(), gather(chosen))[1]
        if what == "checkpoints":  # slow within Lightning's method
            patch.setattr(L.Trainer, "save_checkpoint", lambda *_: self.pass_time())

    def pass_time(self) -> None:
        self.now += 0.125

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.what == "steps":
            self.pass_time()

    def on_validation_batch_start(self, *_):
        if self.what == "validation":
            self.pass_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.what == "checkpoints":
            trainer.save_checkpoint("unused")


@pytest.mark.parametrize("what", ["batches", "steps", "validation", "checkpoints"])
def test_time_goes_where_it_belongs(store, tmp_path, what, monkeypatch):
    toy = ToyRun(store, tmp_path / "run", batch_size=10)
    speed = speed_of(toy)
    toy.fit([Slow(toy, what, monkeypatch), speed])
    slowed = {"validation": 2}.get(what, 6)  # batches of two epochs
    expected = dict.fromkeys(speed.report["seconds"], 0.0)
    expected["training" if what in ("batches", "steps") else what] = 0.125 * slowed
    if what == "batches":
        expected["waiting_for_batches"] = 0.125 * slowed
    assert speed.report["seconds"] == expected
    assert speed.report["stall"] == (what == "batches")
    if what in ("batches", "steps"):
        assert speed.report["rates"]["crystals_per_s"] == 80


# It is resumable by `go_to`, but Lightning looks for methods with other names.
@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
def test_a_run_that_goes_on_within_an_epoch(store, tmp_path):
    """Its clock starts at its own first step, and earlier steps do not count."""
    path = tmp_path / "middle.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(path)

    first = ToyRun(store, tmp_path / "first")
    first.fit([Save()], max_epochs=1)
    second = ToyRun(store, tmp_path / "second")
    second.train.go_to(0, 2)
    speed = speed_of(second)
    begun = time.perf_counter()
    second.fit([speed], path, max_epochs=1)
    assert speed.report["steps"] == len(second.train) - 2
    assert 0 < speed.report["seconds"]["training"] < time.perf_counter() - begun


def test_an_epoch_without_steps(store, tmp_path):
    """A run may resume within a validation."""
    speed = speed_of(ToyRun(store, tmp_path / "run"))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=CPU))
    speed.on_train_epoch_end(trainer, None)
    assert speed.pace.steps == 0


def test_the_share_of_an_edge_budget_that_is_used(store, tmp_path):
    toy = ToyRun(store, tmp_path / "run")
    toy.train.batches.edge_budget = 400
    speed = speed_of(toy)
    toy.fit([speed], max_epochs=1)
    edges = sum(int(toy.train.batches.edges[row]) for row in range(30))
    share = edges / len(toy.train) / 400
    said = list(lines(speed.report))
    assert f"balance: batches held {share:.1%} of `trainer.edge_budget`" in said


def test_a_resumed_run_says_so(store, tmp_path):
    toy = ToyRun(store, tmp_path / "run")
    toy.run.resumed = True
    speed = speed_of(toy)
    toy.fit([speed])
    assert speed.report["covers"] == "the run, since the run was resumed"


def test_estimates_beside_what_was_measured(store, tmp_path, monkeypatch):
    """Twice the work, or half the ceiling, doubles the share."""
    monkeypatch.setattr(
        throughput, "measure_ceilings", lambda *_: Ceilings(50.0, 10.0, "float32", 1)
    )
    toy = ToyRun(store, tmp_path / "run", batch_size=10)
    encoder = toy.module.predictor.encoder
    asked = []

    def work(crystals: int, atoms: int, edges: int) -> Work:
        asked.append((crystals, atoms, edges))
        return Work(flops=2e6 * crystals, bytes=1e6 * crystals)

    encoder.work = work
    speed = Throughput(toy.run, toy.train, ceilings=True)
    toy.fit([speed])
    report = speed.report
    pace = speed.pace
    assert asked == [
        (10, round(pace.atoms / pace.steps), round(pace.edges / pace.steps))
    ]
    rate = report["rates"]["crystals_per_s"]
    assert report["work"]["gflops"] == pytest.approx(2e6 * rate / 1e9)
    assert report["work"]["gbytes"] == pytest.approx(1e6 * rate / 1e9)
    most = report["work"]["ceiling"]
    assert most["share_of_gflops"] == pytest.approx(2e6 * rate / 50e9)
    assert most["share_of_gbytes"] == pytest.approx(1e6 * rate / 10e9)
    assert any("of 50 GFLOP/s" in line for line in lines(report))


def test_the_machine_is_measured_on_request(tmp_path, monkeypatch):
    most = Ceilings(50.0, 10.0, "float32", 1)
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *_: most)
    config = TrainConfig(
        dataset=write_store(tmp_path / "s.h5", labelled(20)),
        target=Target("density"),
        out=tmp_path / "run",
        encoder=SMALL_ENCODER,
        split=SplitSettings(train=12, val=4, test=4),
        trainer=TrainerSettings(
            epochs=1, batch_size=4, accelerator="cpu", progress=False, ceilings=True
        ),
    )
    train(config)
    work = json.loads((config.out / FILE).read_text())["work"]
    assert (work["ceiling"]["gflops"], work["ceiling"]["gbytes"]) == (50.0, 10.0)


def test_no_estimate_where_none_can_be_made(store, tmp_path):
    toy = ToyRun(store, tmp_path / "run")
    encoder = toy.module.predictor.encoder
    encoder.work = lambda *_: None
    speed = speed_of(toy)
    toy.fit([speed])
    assert speed.report["work"] is None
    encoder.work = lambda *_: Work(1.0, 1.0)
    next(encoder.parameters()).requires_grad = False  # trains less than estimated
    assert throughput._work(toy.module, speed.pace, speed.pace.rates(), None) is None


def test_each_view_is_a_pass_of_the_encoder():
    views = {"a": SimpleNamespace(views=(1,)), "b": SimpleNamespace(views=(1,))}
    assert throughput._views(SimpleNamespace(objectives=views)) == 1
    views["c"] = SimpleNamespace(views=(1, 2))
    assert throughput._views(SimpleNamespace(objectives=views)) == 2
    assert throughput._views(SimpleNamespace()) == 1


# ------------------------------------------------------------------------ the bar


def trainer_with(*callbacks: L.Callback) -> SimpleNamespace:
    return SimpleNamespace(
        callbacks=callbacks, progress_bar_metrics={"val_mae": 0.1}, loggers=[],
        lightning_module=None, current_epoch=2, max_epochs=9,
        callback_metrics={"val_loss": 0.25, "val_mae": 0.1},
    )  # fmt: skip


def shown(*callbacks: L.Callback) -> dict:
    return ProgressBar().get_metrics(trainer_with(*callbacks), None)


@pytest.mark.parametrize(("waited", "expected"), [(0.019, None), (0.07, "7%")])
def test_the_bar_shows_a_stall_only_where_there_is_one(
    store, tmp_path, waited, expected
):
    speed = speed_of(ToyRun(store, tmp_path / "run"))
    assert shown(speed) == {"val_mae": 0.1}
    speed._recent.append((1.0, 1234, waited))
    found = shown(speed)
    assert found["crystals/s"] == "1,234"
    assert found.get("stall") == expected
    assert found["val_mae"] == 0.1


def test_the_loss_shown_is_that_of_all_ranks(store, tmp_path, capsys):
    """The bar shows the guard's loss; without a terminal, each epoch's line does."""
    toy = ToyRun(store, tmp_path / "run")
    guard, speed = Guard(toy.run, toy.train, toy.val), speed_of(toy)
    assert shown(guard, speed) == {"val_mae": 0.1}
    toy.fit([guard], max_epochs=1)
    expected = f"{guard._steps[-1].loss:.4g}"
    assert shown(guard, speed) == {"loss": expected, "val_mae": 0.1}
    speed._recent.append((1.0, 1234, 0.0))
    EpochLines().on_train_epoch_end(trainer_with(guard, speed), None)
    line = (
        f"epoch 3 of 9: loss {expected}, crystals/s 1,234, val_loss 0.25, val_mae 0.1\n"
    )
    assert capsys.readouterr().out.endswith(line)


# -------------------------------------------------------------- memory, ceilings


def test_the_peak_is_that_of_the_run():
    before = torch.ones(60_000_000)
    del before
    memory = PeakMemory(CPU)
    first = memory.of_process()
    during = torch.ones(30_000_000)
    del during
    assert memory.of_gpu() == 0
    grown = memory.of_process() - first
    if memory.of_run:
        assert 100e6 < grown < 200e6
    else:
        assert grown >= 0


def test_a_peak_where_the_system_does_not_forget(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "crysdistill.training.watch.memory._CLEAR", tmp_path / "no" / "file"
    )
    memory = PeakMemory(CPU)
    assert not memory.of_run
    assert memory.of_process() > 50e6


def test_ceilings_are_those_of_a_machine(monkeypatch):
    monkeypatch.setattr(ceilings, "PATIENCE", 0.02)
    ceilings._measure.cache_clear()
    begun = time.perf_counter()
    found = measure_ceilings(CPU, "32-true")
    assert found
    assert time.perf_counter() - begun < 3
    assert 0.5 < found.gflops < 1e5
    assert 0.2 < found.gbytes < 1e4
    assert (found.dtype, found.threads) == ("float32", torch.get_num_threads())
    begun = time.perf_counter()
    assert measure_ceilings(CPU, "32-true") == found  # cached
    assert time.perf_counter() - begun < 0.01
    ceilings._measure.cache_clear()


def test_no_memory_to_measure_in(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't allocate memory")

    ceilings._measure.cache_clear()
    monkeypatch.setattr(ceilings, "_gbytes", refuse)
    monkeypatch.setattr(ceilings, "_gflops", refuse)
    assert measure_ceilings(CPU, "bf16-mixed") is None
    ceilings._measure.cache_clear()


def test_a_step_costs_next_to_nothing(store, tmp_path):
    toy = ToyRun(store, tmp_path / "run")
    speed = speed_of(toy)
    batch = store.batch([0, 1])
    rounds = 200
    begun = time.perf_counter()
    for _ in range(rounds):
        speed.on_train_batch_end(None, None, None, batch, 0)
    each = (time.perf_counter() - begun) / rounds
    assert each < 1e-3
    assert math.isfinite(speed.recent[0])
