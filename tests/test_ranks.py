"""Real runs on several processes give the same result as one process."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from crysdistill.errors import InputError
from crysdistill.layers.normalization import BatchNorm
from crysdistill.objectives import CRYSGNN, OBJECTIVES
from crysdistill.ranks import (
    alone,
    gather_rows,
    on_first_rank,
    rank,
    sum_over_ranks,
    tell_all,
    world_size,
)
from crysdistill.training import launch
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.launch import check_same, resolve
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import (
    OptimizerSettings,
    SplitSettings,
    TrainerSettings,
)
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_encoder, read_header
from tests.forks import Command, run
from tests.processes import children, needs_proc, other_ranks, running, wait_until
from tests.test_layers import ROOT
from tests.together import joined_call, together
from tests.toy_stores import SMALL_ENCODER, labelled, write_store

# Plain gradient descent. Adam divides a gradient by its size, so one that is zero up to
# rounding, as for a bias before a batch norm, would move its weight at full speed.
PLAIN = OptimizerSettings(name="sgd", lr=0.02, schedule="constant")
SHORT = TrainerSettings(
    epochs=2, batch_size=9, accelerator="cpu", progress=False, threads=1
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s.h5"
    return write_store(path, labelled(46), symmetry="spglib")


def log(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [{k: float(v) for k, v in row.items() if v} for row in rows]


def tensors(weights: Path) -> dict[str, torch.Tensor]:
    return load_encoder(weights).state_dict()


def check_alike(one: Path, several: Path) -> None:
    """Compare loss curves, weights and results, up to rounding."""
    for expected, found in zip(log(one.parent), log(several.parent), strict=True):
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)
    theirs = tensors(several)
    for name, tensor in tensors(one).items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)
    results = [
        json.loads((w.parent / "results.json").read_text()) for w in (one, several)
    ]
    assert results[0].keys() == results[1].keys()
    overlaps = [read_header(weights).provenance.overlap for weights in (one, several)]
    assert overlaps[0] == overlaps[1]


# ------------------------------------------------------------------------ whole runs


# 28 of 46 crystals train in batches of 9. The last batch has one crystal and joins the
# batch before. With `batch_size=13` the last has two, fewer than four ranks.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 13},
        {"edge_budget": 300},
        {"accumulate": 2, "clip": 0.1},
    ],
    ids=str,
)
def test_training_does_not_depend_on_the_number_of_processes(store, tmp_path, changes):
    config = TrainConfig(
        dataset=store,
        target=Target("density"),
        encoder=SMALL_ENCODER,
        split=SplitSettings(train=28, val=9, test=9),
        optimizer=PLAIN,
        trainer=replace(SHORT, **changes),
    )
    one = train(replace(config, out=tmp_path / "one"))
    for ranks in (2, 4):
        out = tmp_path / f"{ranks}"
        found = together(ranks, train, replace(config, out=out))
        assert found == [out / "weights.safetensors"] * ranks, found
        check_alike(one, found[0])


MORE = {
    "properties": {
        "targets": [Target("density"), Target("class", task="classification")]
    },
    "teacher": {
        "teachers": ["random"],
        "levels": ["atoms", "crystals"],
        "max_atoms": 3,  # half of the crystals have no answer
        "teacher_encoder": SMALL_ENCODER,
    },
}


@pytest.mark.parametrize("published", [False, True])
def test_pretraining_does_not_depend_on_the_number_of_processes(
    store, tmp_path, published
):
    """All objectives, also contrastive ones, with two views drawn per crystal."""
    names = CRYSGNN if published else OBJECTIVES
    config = PretrainConfig(
        corpus=store,
        encoder=SMALL_ENCODER,
        objectives={
            name: {"published": published, **MORE.get(name, {})} for name in names
        },
        held_out=0.2,
        optimizer=PLAIN,
        trainer=replace(SHORT, batch_size=7),  # the last: fewer crystals than ranks
    )
    one = pretrain(replace(config, out=tmp_path / "one"))
    for ranks in (2, 4):
        found = together(ranks, pretrain, replace(config, out=tmp_path / f"{ranks}"))
        assert [isinstance(weights, Path) for weights in found] == [True] * ranks, found
        check_alike(one, found[0])


def test_classification_drops_the_same_on_any_number_of_processes(store, tmp_path):
    config = TrainConfig(
        dataset=store,
        target=Target("class", task="classification"),
        encoder=SMALL_ENCODER,
        split=SplitSettings(train=28, val=9, test=9),
        optimizer=PLAIN,
        trainer=SHORT,
    )
    one = train(replace(config, out=tmp_path / "one"))
    found = together(2, train, replace(config, out=tmp_path / "two"))
    assert [isinstance(weights, Path) for weights in found] == [True, True], found
    check_alike(one, found[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "published"},
        {"loss": "standardized_atoms", "weighting": "balanced"},
        {"loss": "relations_crystals", "weighting": "fading"},
    ],
    ids=str,
)
def test_distillation_does_not_depend_on_the_number_of_processes(
    store, tmp_path, changes
):
    config = DistillConfig(
        **changes,
        dataset=store,
        target=Target("density"),
        encoder=SMALL_ENCODER,
        teacher="random",
        teacher_encoder={**SMALL_ENCODER, "width": 12},
        split=SplitSettings(train=28, val=9, test=9),
        optimizer=PLAIN,
        trainer=SHORT,
    )
    one = distill(replace(config, out=tmp_path / "one"))
    found = together(2, distill, replace(config, out=tmp_path / "two"))
    assert [isinstance(weights, Path) for weights in found] == [True, True], found
    check_alike(one, found[0])


# ------------------------------------------------------------------------- the parts


def _own_rows(rows: int) -> torch.Tensor:
    torch.manual_seed(0)
    everything = torch.randn(12, 3) * torch.tensor([1.0, 5.0, 0.1]) + 7.0
    return everything.split([rows, 12 - rows])[rank()].requires_grad_()


def _normalize(rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    x = _own_rows(rows)
    norm = BatchNorm(3)
    nn.init.uniform_(norm.weight)
    y = norm(x)
    (y * torch.arange(12.0).view(-1, 1)[rank() * rows :][: len(x)]).sum().backward()
    amounts = [sum_over_ranks(p.grad) for p in norm.parameters()]
    return [y.detach(), x.grad], [*amounts, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("rows", [5, 12])  # with 12, rank 1 has none
def test_batch_norm_sees_the_rows_of_all_ranks(rows):
    one = joined_call(_normalize, 12)
    two = together(2, joined_call, _normalize, rows)
    for k in range(2):
        parts = torch.cat([found[0][k] for found in two])
        torch.testing.assert_close(parts, one[0][k], rtol=1e-4, atol=1e-5)
    for found in two:
        torch.testing.assert_close(found[1], one[1], rtol=1e-4, atol=1e-4)


def _gather(rows: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    x = _own_rows(rows)
    everything, first = gather_rows(x)
    (everything * (rank() + 1)).square().sum().backward()
    return everything.detach(), x.grad / x.detach(), first


def test_gathered_rows_bring_gradients_back_from_all_ranks():
    two = together(2, joined_call, _gather, 5)
    assert [first for _, _, first in two] == [0, 5]
    assert torch.equal(two[0][0], two[1][0])
    # d/dx of x^2 (1 + 4), summed over both ranks
    for _, gradient, _ in two:
        torch.testing.assert_close(gradient, torch.full_like(gradient, 10.0))


def _in_parts() -> list[object]:
    found: list[object] = [world_size(), tell_all(f"of rank {rank()}")]
    with alone():
        found += [world_size(), sum_over_ranks(torch.tensor(1)).item()]
    found.append(on_first_rank(lambda: (rank(), world_size())))
    try:
        on_first_rank(_refuse)
    except InputError as error:
        found.append(str(error))
    return found


def _refuse() -> None:
    raise InputError("no; try another")


def test_what_the_first_rank_finds_or_refuses():
    expected = [2, "of rank 0", 1, 1, (0, 1), "no; try another"]
    assert together(2, joined_call, _in_parts) == [expected, expected]


def _fail() -> None:
    on_first_rank(lambda: 1 // 0)


def test_a_failure_of_the_first_rank_leaves_none_waiting():
    first, second = together(2, joined_call, _fail)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, SystemExit)


def _differ() -> None:
    check_same("dataset", f"{rank()}" * 64)


def test_ranks_that_have_other_files():
    for found in together(2, joined_call, _differ):
        assert isinstance(found, InputError)
        assert str(found).startswith("rank 1 on ")
        assert "has another dataset (111111111111) than rank 0 on" in str(found)


def test_a_folder_that_cannot_be_used_is_refused_by_all(store, tmp_path):
    RunDirectory(tmp_path / "run", "seed: 0\n")
    config = TrainConfig(
        dataset=store,
        target=Target("density"),
        out=tmp_path / "run",
        split=SplitSettings(train=28, val=9, test=9),
        trainer=SHORT,
    )
    for found in together(2, train, config):
        assert isinstance(found, InputError)
        assert "holds an earlier run" in str(found)


# --------------------------------------------------------------------------- devices


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have some GPUs."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


def test_as_many_devices_as_asked_for_or_started(monkeypatch, gpus):
    gpus(0)
    assert resolve(TrainerSettings()).devices == 1
    asked = resolve(TrainerSettings(devices=3, accelerator="cpu"))
    assert (asked.devices, asked.num_nodes) == (3, 1)
    for name, value in (
        ("TORCHELASTIC_RUN_ID", "x"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("WORLD_SIZE", "6"),
    ):
        monkeypatch.setenv(name, value)
    started = resolve(TrainerSettings())
    assert (started.devices, started.num_nodes) == (2, 3)
    message = r"`trainer.devices` is 4 but torchrun started 2; set it to 2, or leave it"
    with pytest.raises(InputError, match=message):
        resolve(TrainerSettings(devices=4))
    message = r"`trainer.num_nodes` is 1 but torchrun started 3"
    with pytest.raises(InputError, match=message):
        resolve(TrainerSettings(num_nodes=1))


def test_a_step_of_slurm(monkeypatch, gpus):
    gpus(0)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    found = resolve(TrainerSettings())
    assert (found.devices, found.num_nodes) == (4, 2)
    with pytest.raises(InputError, match=r"`trainer.devices` is 8 but srun started 4"):
        resolve(TrainerSettings(devices=8))


def test_devices_that_there_are_not(gpus):
    gpus(0)
    message = (
        "`trainer.accelerator` is `gpu` but there is no GPU here .* set it to `cpu`"
    )
    with pytest.raises(InputError, match=message):
        resolve(TrainerSettings(accelerator="gpu"))
    gpus(1)
    message = "`trainer.devices` is 4 but there is 1 GPU here; set it to 1"
    with pytest.raises(InputError, match=message):
        resolve(TrainerSettings(accelerator="gpu", devices=4))
    gpus(2)
    with pytest.raises(InputError, match="is 4 but there are 2 GPUs here; set it to 2"):
        resolve(TrainerSettings(devices=4))
    with pytest.raises(InputError, match="start the command with `torchrun` or `srun`"):
        resolve(TrainerSettings(num_nodes=2, accelerator="cpu"))


# ------------------------------------------------------------------ the command line


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_devices_and_torchrun_on_the_command_line(store, tmp_path):
    """Only one process prints, and a mistake gives one line."""
    line = f"""train dataset={store} target.name=density encoder.width=8
        split.train=28 split.val=9 split.test=9 optimizer.name=sgd optimizer.lr=0.02
        trainer.epochs=2 trainer.batch_size=9 trainer.accelerator=cpu
        trainer.progress=false""".split()
    said = {}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for name in ("one", "devices", "torchrun"):
        more = ["trainer.devices=2"] if name == "devices" else []
        words = [*line, *more, f"out={tmp_path / name}"]
        if name == "torchrun":
            done = command(*torchrun, "-m", "crysdistill", *words)
        else:  # Lightning starts fresh processes
            done = run(*words)
        assert done.returncode == 0, done.stderr
        said[name] = done
        check_alike(*(tmp_path / n / "weights.safetensors" for n in ("one", name)))
    for name in ("devices", "torchrun"):
        for phrase in ("9 to judge", "weights learn", "on validation", "speed: "):
            assert said[name].stdout.count(phrase) == 1, said[name].stdout
    assert said["devices"].stderr == ""
    again = run(*line, "trainer.devices=2", f"out={tmp_path / 'one'}")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "holds an earlier run" in again.stderr


@pytest.mark.slow
@needs_proc
def test_a_process_that_dies_in_training(store, tmp_path):
    """As when memory runs out: one line, and the run can be resumed."""
    line = f"""train dataset={store} target.name=density encoder.width=8
        split.train=28 split.val=9 split.test=9 trainer.epochs=2000 trainer.devices=2
        trainer.accelerator=cpu trainer.progress=false out={tmp_path / "run"}""".split()
    process = Command(*line)
    saved = tmp_path / "run" / "checkpoints"
    assert wait_until(lambda: len(list(saved.glob("step-*.ckpt"))) > 1, 100)
    (other,) = other_ranks(process.pid)
    os.kill(other, signal.SIGKILL)
    done = process.wait(60)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "error: another process of this run died (was there enough memory?); the same "
        "command with `resume=true` goes on from the last checkpoint\n"
    )
    assert any(saved.glob("step-*.ckpt"))


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("delay", [0, 4])
def test_an_interrupt_while_a_run_starts(store, tmp_path, delay):
    """One line at any stage of the start; a terminal interrupts all processes."""
    line = f"""train dataset={store} target.name=density encoder.width=8
        split.train=28 split.val=9 split.test=9 trainer.epochs=9000 trainer.devices=2
        trainer.accelerator=cpu trainer.progress=false out={tmp_path / "run"}""".split()
    process = Command(*line)
    try:
        assert wait_until(lambda: other_ranks(process.pid), 60)
        time.sleep(delay)
        below = children(process.pid)
        process.signal(signal.SIGINT)
        done = process.wait(100)
    finally:
        process.signal(signal.SIGKILL)
    said = done.stderr
    assert done.returncode == 130, said
    assert said.count("\n") == 1, said
    assert said.startswith("interrupted; ")
    assert wait_until(lambda: not any(map(running, below)))


OPENED = 99
"""A file descriptor that started processes do not inherit."""


def _open(path: Path) -> None:
    os.dup2(os.open(path, os.O_RDONLY), OPENED)


@pytest.mark.slow
@needs_proc
def test_an_error_that_only_a_started_process_meets(store, tmp_path):
    """The error is reported, and the waiting process ends."""
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset: {store}\n")
    name = f"/dev/fd/{OPENED}"
    line = f"""train {name} target.name=density trainer.devices=2
        trainer.accelerator=cpu trainer.progress=false out={tmp_path / "run"}"""
    done = run(*line.split(), prepare=partial(_open, config))
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith(f"error: {name}: ")
    assert "terminated with code 2" in done.stderr


def _wait_for_the_first() -> str:
    launch.WAIT = timedelta(seconds=2)
    try:
        with launch.joined(TrainerSettings(accelerator="cpu", threads=1)):
            if rank() == 0:
                time.sleep(6)
            tell_all("late")
    except InputError as error:
        return str(error)
    return "all is well"


def test_one_that_never_answers():
    for said in together(2, _wait_for_the_first):
        assert said.startswith("another process of this run died")
