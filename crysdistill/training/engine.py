"""One Lightning trainer for every kind of run: logs, checkpoints, Ctrl-C, resume."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import lightning as L
import rich
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.ranks import rank, world_size
from crysdistill.training.averaging import AveragedWeights
from crysdistill.training.checkpoints import step_of
from crysdistill.training.launch import environment
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.resume.keeping import BestWeights, KeepWork, Patience
from crysdistill.training.resume.metrics_log import MetricsLog
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import TrainerSettings
from crysdistill.training.trial import HeaviestFirst
from crysdistill.training.watch.guard import Guard
from crysdistill.training.watch.progress import EpochLines, ProgressBar
from crysdistill.training.watch.throughput import Throughput


class SeededSteps(Callback):
    """Seeds torch before each step, so that dropout repeats in a resumed run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Seed torch from the run's seed and the number of the batch."""
        torch.manual_seed(step_seed(self.seed, batches_before(trainer, batch_idx)))


def device_of(settings: TrainerSettings) -> torch.device:
    """Return the device on which one process judges the trained model."""
    gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def batches_before(trainer: L.Trainer, batch_idx: int) -> int:
    """Return the number of training batches before batch `batch_idx` of this epoch."""
    return trainer.current_epoch * int(trainer.num_training_batches) + batch_idx


def shared_loss(share: Tensor) -> Tensor:
    """Return a rank's share of a loss times the number of ranks, for gradients.

    The shares of all ranks must be added up, but gradients are averaged over ranks.
    """
    return share * world_size()


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one training step."""
    return (seed * 1_000_003 + step) % 2**63


def fit(
    module: L.LightningModule,
    train: BatchLoader,
    val: BatchLoader,
    run: RunDirectory,
    settings: TrainerSettings,
    *,
    monitor: str,
    mode: str,
    seed: int,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train, choose the best epoch on validation, and put its weights into `module`.

    With several processes each calls this (see `launch.joined`), and each has the best
    weights afterwards.

    Args:
        module: what to train; see `trial.Learner`.
        train: training batches.
        val: validation batches.
        run: where logs and checkpoints go.
        settings: how long to train and on which devices.
        monitor: the validation number that chooses the epoch.
        mode: `min` or `max`.
        seed: of the steps.
        callbacks: further callbacks.

    Raises:
        InputError: the heaviest batch does not fit into memory, or the settings need
            something that is not there.
    """
    log = MetricsLog(run.path / "metrics.csv")
    keeper = KeepWork(run, train, log, settings)
    best = BestWeights(monitor, mode)
    everyone: list[Callback] = [
        *callbacks,
        HeaviestFirst(train, settings.epochs),
        SeededSteps(seed),
        Throughput(run, train, settings.ceilings),
        Guard(run, train, val),  # before a step's results are kept
        best,
        keeper,
    ]
    if settings.average != "none":
        everyone.append(AveragedWeights(train, settings.average, settings.average_span))
    if settings.patience is not None:
        everyone.append(Patience(monitor, mode=mode, patience=settings.patience))
    bar = settings.progress and sys.stdout.isatty()
    if bar:
        everyone.append(ProgressBar(refresh_rate=10))
    elif settings.progress:
        everyone.append(EpochLines())
    with _Quiet():
        resume = keeper.files.newest() if run.resumed else None
        if resume:
            steps = settings.epochs * math.ceil(len(train) / settings.accumulate)
            rich.print(f"going on from step {step_of(resume):,} of {steps:,}")
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices or 1,
            num_nodes=settings.num_nodes or 1,
            strategy=_strategy(),
            plugins=environment(),
            precision=settings.precision,
            deterministic=settings.deterministic or None,
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip,
            callbacks=everyone,
            logger=[
                log,
                TensorBoardLogger(run.path, name=None, version="tensorboard"),
            ],
            enable_progress_bar=bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, len(train)),
            use_distributed_sampler=False,
            default_root_dir=run.path,
        )
        device = trainer.strategy.root_device
        for loader in (train, val):
            loader.divide(rank(), world_size())
        place((train, val), device)
        if settings.compile:
            _compile(module, device)
        try:
            with keeper:
                trainer.fit(module, train, val, ckpt_path=resume)
        finally:
            if settings.deterministic:
                torch.use_deterministic_algorithms(False)
            for part in module.modules():
                # Judging on the CPU would compile again what a GPU has compiled.
                part._compiled_call_impl = None
    best.put_into(module)


def _strategy() -> Strategy | str:
    """Return how processes add up their gradients."""
    if world_size() == 1:
        return "auto"
    # Batch norms keep buffers equal on all ranks, so none need be broadcast.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def _compile(module: L.LightningModule, device: torch.device) -> None:
    """Compile the encoder with torch.compile.

    Raises:
        InputError: there is no compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError(
            "`trainer.compile` needs a C++ compiler (g++ or clang++) on the CPU, and "
            "there is none; install one, or leave `trainer.compile` out"
        )
    for part in module.modules():
        if isinstance(part, Encoder):
            part.compile(dynamic=True)


_NOT_FOR_US = (
    ".*does not have many workers.*",  # a batch is one gather: workers would slow it
    ".*GPU available but not used.*",
    ".*in eval mode at the start of training.*",  # frozen stages are meant to be
    ".*isinstance.treespec, LeafSpec.*",
    ".*dataloader is not resumable.*",  # it is: see KeepWork
    ".*`broadcast_buffers`.*",
    ".*sync_dist=True.*",  # what is logged is the same on all ranks
)


class _Quiet:
    """Keeps start-up notices and advice that does not apply off the screen."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("lightning.pytorch")
        self._level = self._logger.level
        self._logger.setLevel(logging.WARNING)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        for message in _NOT_FOR_US:
            warnings.filterwarnings("ignore", message)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._warnings.__exit__(kind, error, trace)
        self._logger.setLevel(self._level)
