"""Stopping between two steps, and going on there: signals, checkpoints, resume."""

from __future__ import annotations

import csv
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping

from crysdistill.errors import InputError
from crysdistill.training.loader import BatchLoader
from crysdistill.training.runs import RunDirectory


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
    if trainer.is_global_zero:
        partial.replace(path)


class Patience(EarlyStopping):
    """Stops a run that no longer improves, and leaves it so when it is resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not begin an epoch that the run before did not begin."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def earlier_metrics(run: RunDirectory, batches: int) -> list[dict[str, str]]:
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
