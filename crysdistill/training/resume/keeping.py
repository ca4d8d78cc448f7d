"""Keeping a run's work: saves it, stops it between steps, and resumes it there."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from functools import cached_property
from types import TracebackType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping

from crysdistill.errors import InputError
from crysdistill.files import FULL
from crysdistill.pipes import ProcessLostError
from crysdistill.ranks import sum_over_ranks, tell_all, world_size
from crysdistill.training.checkpoints import Checkpoints
from crysdistill.training.loader import BatchLoader
from crysdistill.training.resume.metrics_log import MetricsLog
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import TrainerSettings

_KEY = "crysdistill"  # of our entry in Lightning's checkpoint
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")

AGAIN = 1.0
"""Seconds after which another Ctrl-C counts as a second one."""

SHARE = 0.05
"""The largest share of the time for checkpoints between epochs.

An epoch on a hundred crystals takes no longer than its checkpoint."""


class KeepWork(Checkpoint):
    """Saves a run, so that it can be killed at any moment and resumed bit for bit.

    A checkpoint is written between two steps: after an epoch, unless that would take
    more than `SHARE` of the time; within an epoch as often as the settings say. It
    counts batches of all ranks together, so a run can continue on another number of
    ranks.

    After Ctrl-C, or a signal that SLURM sends before a time limit, the step finishes;
    then the run is saved and stops. A second Ctrl-C, at least a second later, stops it
    at once. All ranks stop after the same step.

    Call `Trainer.fit` inside `with keeper:`. Lightning calls a `Checkpoint` after the
    other callbacks, so a checkpoint includes their state after the step.

    Args:
        run: the run directory for the checkpoints.
        loader: the training batches; a resumed run continues among them.
        log: the logged numbers; a checkpoint includes them.
        settings: how often to save, and how many checkpoints to keep.
    """

    def __init__(
        self,
        run: RunDirectory,
        loader: BatchLoader,
        log: MetricsLog,
        settings: TrainerSettings,
    ) -> None:
        self.files = Checkpoints(run.checkpoints)
        self.loader = loader
        self.metrics = log
        self.settings = settings
        self.asked: int | None = None  # the signal that asked to stop
        self._asked_at = 0.0
        self._stopped_after: int | None = None
        self._position = (0, 0)  # epoch, and batches of it that are done
        self._saved: tuple[int, int] | None = None  # position of the last checkpoint
        self._saved_at = 0.0
        self._took = 0.0  # seconds for the last checkpoint
        self._steps = 0  # of the optimizer, when last looked at
        self._between_epochs = False  # resumed there
        self._handlers: dict[int, Any] = {}

    # ------------------------------------------------------------ around Trainer.fit

    def __enter__(self) -> KeepWork:
        self._handlers = {
            number: signal.getsignal(number)
            for name in _SIGNALS
            if (number := getattr(signal, name, None)) is not None
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the signal handlers; report a stop or a full disk.

        Raises:
            KeyboardInterrupt: the run was asked to stop; the text says what is saved.
            InputError: the disk is full.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        # Lightning turns Ctrl-C into SystemExit.
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt):
            if self._stopped_after is not None:
                raise KeyboardInterrupt(self._kept()) from None
            if error is not None:
                raise KeyboardInterrupt from None
        if self.asked is not None and isinstance(error, ProcessLostError):
            raise KeyboardInterrupt from None  # it was asked to stop, too
        if isinstance(error, OSError) and error.errno in FULL:
            raise self.files.refusal(error) from None

    def _kept(self) -> str:
        job = os.environ.get("SLURM_JOB_ID")
        of_job = f" of SLURM job {job}" if job else ""
        return f"step {self._stopped_after}{of_job} is saved"

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is None:
            self.asked, self._asked_at = number, time.monotonic()
        # SLURM sends several signals, and torchrun repeats each. Only a later Ctrl-C
        # shows that the user wants to stop at once.
        elif number == signal.SIGINT and time.monotonic() > self._asked_at + AGAIN:
            raise KeyboardInterrupt

    # ------------------------------------------------------------------ when to save

    def setup(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str
    ) -> None:
        """Let Lightning write checkpoints with `Checkpoints`."""
        trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle signals; Lightning has set its own handlers just before."""
        self._saved_at = time.monotonic()
        self._steps = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in self._handlers:
                signal.signal(number, self._ask)

    def on_train_epoch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Save the epoch that has ended, with all numbers logged for it."""
        if self._between_epochs:
            # The epoch has not begun, so Lightning must not restart within it.
            trainer.fit_loop.epoch_loop.restarting = False
            self._between_epochs = False
        self.loader.go_to(trainer.current_epoch, 0)
        self._position = (trainer.current_epoch, 0)
        cheap = self._took <= SHARE * (time.monotonic() - self._saved_at)
        due = cheap or self.settings.checkpoint_every is not None
        self._pause(trainer, pl_module, due and trainer.current_epoch > 0)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save after a step if a checkpoint is due."""
        if trainer.global_step == self._steps:
            return  # gradients are still being added up; checkpoints do not hold them
        self._steps = trainer.global_step
        self._position = (trainer.current_epoch, batch_idx + 1)
        every, minutes = (
            self.settings.checkpoint_every,
            self.settings.checkpoint_minutes,
        )
        due = every is not None and self._steps % every == 0
        if minutes is not None:
            due = due or time.monotonic() - self._saved_at > 60 * minutes
        self._pause(trainer, pl_module, due)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop here if asked to; a resumed run starts validation again."""
        self._pause(trainer, pl_module, save=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of the run."""
        self._position = (trainer.current_epoch, 0)
        stop, _ = self._agree(pl_module, save=True)
        self._save(trainer)
        if stop:
            self._stopped_after = trainer.global_step

    def _pause(
        self, trainer: L.Trainer, pl_module: L.LightningModule, save: bool
    ) -> None:
        """Save or stop between two steps, on all ranks or on none."""
        stop, save = self._agree(pl_module, save)
        if save or stop:
            self._save(trainer)
        if stop:
            self._stopped_after = trainer.global_step
            raise KeyboardInterrupt

    def _agree(self, pl_module: L.LightningModule, save: bool) -> tuple[bool, bool]:
        """Return whether any rank must stop, and whether any must save.

        Signals reach the ranks at different times, and their clocks differ.
        """
        stop = self.asked is not None
        if world_size() == 1:
            return stop, save
        flags = torch.tensor([stop, save], dtype=torch.int64)  # no wait for a GPU
        stops, saves = sum_over_ranks(flags).tolist()
        return stops > 0, saves > 0

    def _save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint, unless this position already has one."""
        if self._saved == self._position:
            return
        step, begun = trainer.global_step, time.monotonic()
        trainer.save_checkpoint(self.files.path(step))
        self.files.failure = self.files.failure or self.metrics.failure
        self.files.check_written()
        self._saved, self._saved_at = self._position, time.monotonic()
        self._took = self._saved_at - begun
        if trainer.is_global_zero:
            self.files.prune(step, self.settings.keep_checkpoints)

    # --------------------------------------------------------------- what is in there

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Add the position of the run and its logged numbers."""
        epoch, batches = self._position
        checkpoint[_KEY] = {
            "epoch": epoch,
            "batches": batches,
            "metrics": self.metrics.rows,
            "crystals": self._crystals,
        }

    def on_load_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Continue from the checkpoint's position.

        Raises:
            InputError: the run was begun with other crystals.
        """
        kept = checkpoint[_KEY]
        if kept["crystals"] != self._crystals:
            raise InputError(
                f"{self.loader.store.path} holds other training crystals than the run "
                f"in {self.files.folder.parent} began with; give the same store, or "
                "start anew with `resume=false overwrite=true`"
            )
        self.metrics.restore(kept["metrics"])
        self._position = self._saved = (kept["epoch"], kept["batches"])
        self.loader.go_to(*self._position)
        loops = checkpoint["loops"]["fit_loop"]
        if kept["batches"] == 0:
            _begin_epoch(loops, kept["epoch"])
            self._between_epochs = True
        elif kept["batches"] == len(self.loader):
            _begin_validation(loops)

    @cached_property
    def _crystals(self) -> str:
        """Return a text that identifies the set of training crystals."""
        rows = hashlib.sha256(self.loader.rows.tobytes()).hexdigest()
        return f"{self.loader.store.hash} {rows}"


# Lightning itself can resume among the batches of an epoch. At the end of an epoch it
# would skip the validation, or hooks. Its counters are therefore set to those of a
# moment from which it continues correctly.

_STAGES = ("ready", "started", "processed", "completed")


def _count(progress: dict[str, Any], *counts: int) -> None:
    """Set those counters of a progress that it has."""
    for stage, count in zip(_STAGES, counts, strict=True):
        if stage in progress:
            progress[stage] = count


def _begin_epoch(loops: dict[str, Any], epoch: int) -> None:
    """Let a run continue with the first batch of an epoch."""
    for progress in ("total", "current"):
        _count(loops["epoch_progress"][progress], epoch, epoch, epoch, epoch)
    batches = loops["epoch_loop.batch_progress"]
    _count(batches["current"], 0, 0, 0, 0)
    batches["is_last_batch"] = False


def _begin_validation(loops: dict[str, Any]) -> None:
    """Let a run continue with the validation after the last batch of an epoch."""
    batches = loops["epoch_loop.batch_progress"]
    for progress in ("total", "current"):
        done = batches[progress]["processed"]
        _count(batches[progress], done, done, done, done)
        # As if the run had stopped in the first validation batch.
        _count(loops["epoch_loop.val_loop.batch_progress"][progress], 1, 1, 0, 0)
    batches["is_last_batch"] = True


class BestWeights(Callback):
    """Keeps the weights with the best validation number, in memory and checkpoints.

    Args:
        monitor: the validation number.
        mode: `min` or `max`.
    """

    def __init__(self, monitor: str, mode: str) -> None:
        self.monitor = monitor
        self.sign = {"min": -1.0, "max": 1.0}[mode]
        self.score: float | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def on_validation_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Keep the weights if they are better than all before."""
        if trainer.sanity_checking:
            return
        score = self.sign * float(trainer.callback_metrics[self.monitor])
        best = self.score
        if tell_all(best is None or score > best or best != best):  # NaN is the worst
            self.score = score
            self.weights = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in pl_module.state_dict().items()
            }

    def put_into(self, module: L.LightningModule) -> None:
        """Give a module the best weights, if there was a validation."""
        if self.weights:
            module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"score": self.score, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.score, self.weights = state_dict["score"], state_dict["weights"]


class Patience(EarlyStopping):
    """Stops a run that no longer improves, and keeps it stopped when resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once if the run had already stopped for lack of improvement."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
