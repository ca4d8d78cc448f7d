"""Measures a run: its speed, waiting times, memory, and the machine's limits."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import rich
import torch
from lightning.pytorch.callbacks import Callback
from rich.markup import escape

from crysdistill.encoders import Encoder
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import ask_all, rank, sum_over_ranks, world_size
from crysdistill.training.loader import BatchLoader
from crysdistill.training.runs import RunDirectory
from crysdistill.training.watch.ceilings import Ceilings, measure_ceilings
from crysdistill.training.watch.memory import PeakMemory
from crysdistill.training.watch.pace import Pace

FILE = "throughput.json"

WARM_UP = 3
"""The first steps of a process, which compilers and caches slow down."""


class Throughput(Callback):
    """Measures a run; at its end prints a few lines and writes `throughput.json`.

    Measuring a step takes two readings of the clock and a few appends; it does not wait
    for other ranks or a GPU. A step lasts from the end of the previous one to its own
    end, including the wait for its batch. Validation and the writing of checkpoints are
    not included but measured separately. On a GPU a step ends when it is queued; over a
    window of steps this makes no difference.

    Args:
        run: the run directory, for the file.
        loader: of the training batches; its `seconds_waited` is the waiting time.
        ceilings: whether to measure the machine's limits at the end.
    """

    def __init__(
        self, run: RunDirectory, loader: BatchLoader, ceilings: bool = False
    ) -> None:
        self.run = run
        self.loader = loader
        self.ceilings = ceilings
        self.pace = Pace(WARM_UP)
        self.report: dict[str, Any] = {}
        self.validating = self.saving = 0.0
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=50)
        self._begun = self._mark = self._validation_begun = 0.0
        self._saved = self._waited = 0.0  # as they stood at the mark
        self._saved_before = 0.0  # validation
        self._memory: PeakMemory | None = None
        self._columns = _Columns()

    # -------------------------------------------------------------------- measuring

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and measure the time of every checkpoint."""
        self._memory = PeakMemory(trainer.strategy.root_device)
        self._begun = time.perf_counter()
        save = trainer.save_checkpoint

        def timed(*args: Any, **options: Any) -> None:
            begun = time.perf_counter()
            try:
                save(*args, **options)
            finally:
                self.saving += time.perf_counter() - begun

        trainer.save_checkpoint = timed  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the first step of a run that is resumed within an epoch."""
        self._set_mark()

    def on_train_epoch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Start the first step of an epoch."""
        self._set_mark()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: CrystalBatch,
        batch_idx: int,
    ) -> None:
        """Record the size of a step and how long it took."""
        saved = self.saving - self._saved
        seconds = time.perf_counter() - self._mark - saved
        waited = self.loader.seconds_waited - self._waited
        crystals = batch.num_graphs
        self._columns.add(
            seconds, waited, crystals, len(batch.batch), batch.edge_index.shape[1]
        )
        of_all = getattr(batch, "crystals_of_all", crystals)
        self._recent.append((seconds, of_all, waited))
        self._set_mark()

    def _set_mark(self) -> None:
        self._mark = time.perf_counter()
        self._saved = self.saving
        self._waited = self.loader.seconds_waited

    def on_validation_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Stop the clock of the steps."""
        self._validation_begun = time.perf_counter()
        self._saved_before = self.saving

    def on_validation_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Start the clock of the steps again."""
        saved = self.saving - self._saved_before
        self.validating += time.perf_counter() - self._validation_begun - saved
        self._set_mark()

    def on_train_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Add up the numbers of all ranks, once in an epoch."""
        self.pace.add(*self._columns.of_all_ranks(trainer.strategy.root_device))
        self._columns = _Columns()

    @property
    def recent(self) -> tuple[float, float]:
        """Recent crystals per second, and the share of time spent waiting."""
        seconds = sum(step[0] for step in self._recent)
        if not seconds:
            return 0.0, 0.0
        crystals = sum(step[1] for step in self._recent)
        return crystals / seconds, sum(step[2] for step in self._recent) / seconds

    # -------------------------------------------------------------------- reporting

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the report together while all ranks are still there."""
        if not self.pace.steps or self._memory is None:
            return
        device = trainer.strategy.root_device
        peaks = [self._memory.of_process(), self._memory.of_gpu()]
        whole = time.perf_counter() - self._begun
        training = self.pace.seconds
        ceilings = None
        if self.ceilings:
            ceilings = measure_ceilings(device, str(trainer.precision), world_size())
        peak, gpu_peak = _largest(peaks)
        rates = self.pace.rates()
        self.report = {
            "covers": _covers(self.run.resumed, world_size()),
            "steps": self.pace.steps,
            "crystals": self.pace.crystals,
            "atoms": self.pace.atoms,
            "edges": self.pace.edges,
            "seconds": {
                "training": training,
                "waiting_for_batches": self.pace.waited,
                "validation": self.validating,
                "checkpoints": self.saving,
                "other": max(0.0, whole - training - self.validating - self.saving),
            },
            "rates": rates,
            "stall": self.pace.stall,
            "memory": {
                "peak_bytes": peak,
                "peak_of": "the run" if self._memory.of_run else "the process",
                "gpu_peak_bytes": gpu_peak if device.type == "cuda" else None,
            },
            "balance": {
                "ranks": world_size(),
                "busiest_over_mean": self.pace.imbalance,
                "mean_over_heaviest_batch": self.pace.fill,
                "edge_budget": self.loader.batches.edge_budget,
            },
            "device": _device_name(device),
            "precision": str(trainer.precision),
            "work": _work(pl_module, self.pace, rates, ceilings),
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and write the report."""
        if not self.report or rank() > 0:
            return
        self.run.write_json(FILE, self.report)
        for line in lines(self.report):
            rich.print(escape(line))


class _Columns:
    """The steps of an epoch on this rank, a column for each number."""

    def __init__(self) -> None:
        self.seconds, self.waited = array("d"), array("d")
        self.counts = array("q")  # crystals, atoms, edges of the first step, ...

    def add(self, seconds: float, waited: float, *counts: int) -> None:
        self.seconds.append(seconds)
        self.waited.append(waited)
        self.counts.extend(counts)

    def of_all_ranks(self, device: torch.device) -> tuple[np.ndarray, ...]:
        """Return the arguments of `Pace.add`."""
        ranks = world_size()
        mine = torch.tensor(self.counts, dtype=torch.int64).reshape(-1, 3)  # (S, 3)
        clock = torch.tensor([self.seconds, self.waited], dtype=torch.float64)  # (2, S)
        each = torch.zeros(ranks, *mine.shape, dtype=torch.int64)
        each[rank() if ranks > 1 else 0] = mine
        if ranks > 1:
            each, clock = each.to(device), clock.to(device)
        each = sum_over_ranks(each).cpu()  # (R, S, 3)
        # Ranks wait for each other in every step, so their step times agree; only the
        # time spent waiting for batches differs, and each wait delays all.
        seconds, waited = (sum_over_ranks(clock).cpu() / ranks).numpy()
        counts, edges = each.sum(0).numpy(), each[:, :, 2].numpy()
        return seconds, waited, counts, edges


def _largest(values: list[int]) -> list[int]:
    """Return the largest of each number on all ranks."""
    return [max(of_all) for of_all in zip(*ask_all(values), strict=True)]


def _covers(resumed: bool, ranks: int) -> str:
    """Return which part of the run the numbers cover."""
    what = "all ranks" if ranks > 1 else "the run"
    if resumed:
        return f"{what}, since the run was resumed"
    return what


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _work(
    module: L.LightningModule,
    pace: Pace,
    rates: dict[str, Any],
    ceilings: Ceilings | None,
) -> dict[str, Any] | None:
    """Estimate the encoder's work per second, beside the machine's limits."""
    encoder = next((m for m in module.modules() if isinstance(m, Encoder)), None)
    if encoder is None or not all(p.requires_grad for p in encoder.parameters()):
        return None  # the estimate is for layers that learn
    mean = [round(n / pace.steps) for n in (pace.crystals, pace.atoms, pace.edges)]
    work = encoder.work(*mean)
    if work is None:
        return None
    views = _views(module)
    per_second = views * rates["crystals_per_s"] * pace.steps / pace.crystals
    done = {
        "estimate": "encoder, forward and backward, for a batch of mean size",
        "encoder_passes": views,
        "gflops": work.flops * per_second / 1e9,
        "gbytes": work.bytes * per_second / 1e9,
        "ceiling": None,
    }
    if ceilings:
        done["ceiling"] = {
            "gflops": ceilings.gflops,
            "gbytes": ceilings.gbytes,
            "dtype": ceilings.dtype,
            "threads": ceilings.threads,
            "share_of_gflops": done["gflops"] / ceilings.gflops,
            "share_of_gbytes": done["gbytes"] / ceilings.gbytes,
        }
    return done


def _views(module: L.LightningModule) -> int:
    """Return how often a step runs the encoder: once for each view of its crystals."""
    objectives = getattr(module, "objectives", None)
    if objectives is None:
        return 1
    return len({view for one in objectives.values() for view in one.views})


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield a summary of a report, in a few lines."""
    rates, seconds, memory = report["rates"], report["seconds"], report["memory"]
    yield (
        f"speed: {rates['crystals_per_s']:,.0f} crystals/s, "
        f"{rates['atoms_per_s']:,.0f} atoms/s, {rates['edges_per_s']:,.0f} edges/s "
        f"({rates['basis']}; {report['covers']}); {report['stall']:.1%} of the time "
        "waiting for batches"
    )
    balance = report["balance"]
    said = []
    if balance["ranks"] > 1:
        said.append(
            f"the busiest of {balance['ranks']} ranks had "
            f"{balance['busiest_over_mean'] - 1:.1%} more edges than the mean"
        )
    if budget := balance["edge_budget"]:
        share = report["edges"] / report["steps"] / budget
        said.append(f"batches held {share:.1%} of `trainer.edge_budget`")
    if said:
        yield f"balance: {'; '.join(said)}"
    parts = ("training", "validation", "checkpoints", "other")
    spent = ", ".join(f"{part} {seconds[part]:,.1f} s" for part in parts)
    peak = f"at most {memory['peak_bytes'] / 2**20:,.0f} MiB" + (
        " in each process" if balance["ranks"] > 1 else ""
    )
    peak += "" if memory["peak_of"] == "the run" else " (of the process)"
    if memory["gpu_peak_bytes"] is not None:
        peak += f", {memory['gpu_peak_bytes'] / 2**20:,.0f} MiB on the GPU"
    yield f"time: {spent}; memory: {peak}"
    work = report["work"]
    if work and work["ceiling"]:
        most = work["ceiling"]
        yield (
            f"work of the encoder, by estimate: {work['gflops']:,.1f} of "
            f"{most['gflops']:,.0f} GFLOP/s ({most['share_of_gflops']:.0%}), "
            f"{work['gbytes']:,.1f} of {most['gbytes']:,.0f} GB/s "
            f"({most['share_of_gbytes']:.0%}) that this machine was measured to do "
            f"({most['dtype']})"
        )
