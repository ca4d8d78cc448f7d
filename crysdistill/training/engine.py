"""One Lightning trainer for every kind of run: logs, checkpoints, Ctrl-C, resume."""

from __future__ import annotations

import csv
import logging
import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from crysdistill.errors import InputError
from crysdistill.training.loader import BatchLoader
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import OptimizerSettings, TrainerSettings


class KeepWork(Callback):
    """Stops between two steps when told to, and leaves what `resume` goes on from.

    Ctrl-C, and SIGTERM as SLURM sends it before a time limit, let the step finish:
    in the middle of one, half of the weights may have moved. A second Ctrl-C stops at
    once, with the checkpoint of the last epoch.

    Args:
        run: where the checkpoint goes.
        loader: the training batches, to go on among them.
    """

    def __init__(self, run: RunDirectory, loader: BatchLoader) -> None:
        self.run = run
        self.loader = loader
        self.asked = False
        self._between_steps = False
        self._handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop here if asked to: the last step is complete, the next not begun."""
        if self.asked:
            self._between_steps = True
            raise KeyboardInterrupt

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save where the run stopped between two steps."""
        if self._between_steps:
            save_checkpoint(trainer, self.run.last_checkpoint)

    def on_load_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Go on among the batches where the checkpoint stands."""
        self.loader.go_to(*divmod(_batches_done(checkpoint), len(self.loader)))

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class EpochCheckpoint(Checkpoint):
    """Writes `last.ckpt` after every epoch, whole or not at all.

    Lightning calls a `Checkpoint` after the other callbacks: what they know of this
    epoch, such as which one is the best so far, must be in it.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_train_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Save what `resume` needs."""
        save_checkpoint(trainer, self.run.last_checkpoint)


def save_checkpoint(trainer: L.Trainer, path: Path) -> None:
    """Write a checkpoint so that a kill while writing leaves the one before it."""
    partial = path.with_suffix(".partial")
    trainer.save_checkpoint(partial)
    partial.replace(path)


class Patience(EarlyStopping):
    """Stops a run that no longer improves, and leaves it so when it is resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not begin an epoch that the run before did not begin."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


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
        """Draw the step's randomness from the run's seed and the step alone."""
        torch.manual_seed(step_seed(self.seed, trainer.global_step))


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
) -> None:
    """Train, choose the best epoch on validation, and put its weights into `module`.

    Args:
        module: what to train.
        train: training batches.
        val: validation batches.
        run: where logs and checkpoints go.
        settings: how long and on what.
        monitor: the validation number that chooses the epoch.
        mode: `min` or `max`.
        seed: of the steps.
    """
    best = ModelCheckpoint(
        run.checkpoints, filename="best", monitor=monitor, mode=mode,
        save_weights_only=True, enable_version_counter=False,
    )  # fmt: skip
    keeper = KeepWork(run, train)
    callbacks: list[Callback] = [best, EpochCheckpoint(run), keeper, SeededSteps(seed)]
    if settings.patience is not None:
        callbacks.append(Patience(monitor, mode=mode, patience=settings.patience))
    if settings.progress:
        callbacks.append(ProgressBar(refresh_rate=10))
    earlier = _earlier_metrics(run, len(train)) if run.resumed else []
    with _Quiet():
        log = CSVLogger(run.path, name=None, version="")
        log.experiment.metrics.extend(earlier)  # making it deleted the file
        log.save()
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            precision=settings.precision,
            max_epochs=settings.epochs,
            gradient_clip_val=settings.clip,
            callbacks=callbacks,
            logger=[
                log,
                TensorBoardLogger(run.path, name=None, version="tensorboard"),
            ],
            enable_progress_bar=settings.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, len(train)),
            use_distributed_sampler=False,
            default_root_dir=run.path,
        )
        resume = run.last_checkpoint if run.resumed else None
        try:
            trainer.fit(module, train, val, ckpt_path=resume)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt(
                f"stopped after {trainer.global_step} steps; `resume=true` goes on "
                "there"
            ) from None
        finally:
            keeper.restore()
    if best.best_model_path:
        state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
        module.load_state_dict(state)


def _earlier_metrics(run: RunDirectory, batches: int) -> list[dict[str, str]]:
    """Return what a run had logged of the epochs that its checkpoint has behind it.

    Args:
        run: the run to resume.
        batches: of an epoch.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    path = run.last_checkpoint
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise InputError(
            f"{path} is damaged ({type(error).__name__}); start anew with "
            "`resume=false overwrite=true`"
        ) from None
    epochs = _batches_done(checkpoint) // batches
    log = run.path / "metrics.csv"
    if not log.exists():
        return []
    with log.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) < epochs]


def _batches_done(checkpoint: dict[str, Any]) -> int:
    """Return how many batches a run had trained on."""
    loop = checkpoint["loops"]["fit_loop"]
    return loop["epoch_loop.batch_progress"]["total"]["completed"]


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without the logger's version number."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands at the end of the bar."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown


_NOT_FOR_US = (
    ".*does not have many workers.*",  # a batch is one gather: workers would slow it
    ".*Checkpoint directory.*",
    ".*Experiment logs directory.*",  # the run directory holds other files
    ".*GPU available but not used.*",
    ".*in eval mode at the start of training.*",  # frozen stages are meant to be
    ".*isinstance.treespec, LeafSpec.*",
    ".*dataloader is not resumable.*",  # it is: see KeepWork.on_load_checkpoint
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


def make_optimizer(
    groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]],
    settings: OptimizerSettings,
    steps: int,
    steps_per_epoch: int,
) -> OptimizerLRSchedulerConfig:
    """Return the optimizer and schedule in the form that Lightning takes.

    Args:
        groups: parameters with their learning rates; frozen ones are left out.
        settings: which optimizer and schedule.
        steps: of the whole run.
        steps_per_epoch: of one epoch.
    """
    trained: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.requires_grad], "lr": lr}
        for parameters, lr in groups
    ]
    trained = [group for group in trained if group["params"]]
    rates = [group["lr"] for group in trained]
    decay, lr = settings.weight_decay, settings.lr
    optimizer: torch.optim.Optimizer
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(trained, lr, settings.momentum, weight_decay=decay)
    elif settings.name == "adam":
        optimizer = torch.optim.Adam(trained, lr, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(trained, lr, weight_decay=decay)
    schedules = torch.optim.lr_scheduler
    schedule: torch.optim.lr_scheduler.LRScheduler
    if settings.schedule == "onecycle":
        schedule = schedules.OneCycleLR(optimizer, rates, steps, pct_start=0.1)
    elif settings.schedule == "cosine":
        schedule = schedules.CosineAnnealingLR(optimizer, steps)
    elif settings.schedule == "milestones":
        at = [epoch * steps_per_epoch for epoch in settings.milestones]
        schedule = schedules.MultiStepLR(optimizer, at)
    else:
        schedule = schedules.ConstantLR(optimizer, factor=1.0, total_iters=0)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }
