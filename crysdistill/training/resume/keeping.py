"""Keeping a run's work: when to save, stopping between steps, and going on there."""

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

_KEY = "crysdistill"  # of what we add to Lightning's checkpoint
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")

AGAIN = 1.0
"""Seconds after which a second Ctrl-C is meant as one."""


class KeepWork(Checkpoint):
    """Saves a run so that it can be killed at any moment and goes on bit for bit.

    A checkpoint is written between two steps: after every epoch, and within one as
    often as the settings say. It counts batches of all ranks together, so that a run
    can go on with another number of them.

    Ctrl-C, and the signals that SLURM sends before a time limit, let the step finish;
    then it is saved and the run stops. A second Ctrl-C, a second later, stops it at
    once. All ranks stop after the same step.

    `with keeper:` stands around `Trainer.fit`. Lightning calls a `Checkpoint` after the
    other callbacks, so that what they know of a step is in it.

    Args:
        run: where checkpoints go.
        loader: the training batches, to go on among them.
        log: the logged numbers, which belong to a checkpoint.
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
        """Give the signals back; say what to do about a stop or a full disk.

        Raises:
            KeyboardInterrupt: the run was asked to stop; the text says what is saved.
            InputError: there is no room to write something.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        # SystemExit is what Lightning makes of Ctrl-C.
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
        # SLURM sends several signals, and torchrun passes each on once more: only who
        # presses Ctrl-C again means it.
        elif number == signal.SIGINT and time.monotonic() > self._asked_at + AGAIN:
            raise KeyboardInterrupt

    # ------------------------------------------------------------------ when to save

    def setup(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str
    ) -> None:
        """Let Lightning write checkpoints our way."""
        trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals, instead of Lightning: it listened from a moment ago on."""
        self._saved_at = time.monotonic()
        self._steps = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in self._handlers:
                signal.signal(number, self._ask)

    def on_train_epoch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Save the epoch that has ended, with all that was logged of it."""
        if self._between_epochs:
            # Of an epoch that has not begun, Lightning has nothing to go on with.
            trainer.fit_loop.epoch_loop.restarting = False
            self._between_epochs = False
        self.loader.go_to(trainer.current_epoch, 0)
        self._position = (trainer.current_epoch, 0)
        self._pause(trainer, pl_module, save=trainer.current_epoch > 0)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save after a step if it is time to."""
        if trainer.global_step == self._steps:
            return  # gradients are still being added up, and no checkpoint holds them
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
        """Stop here if asked to: validation begins again when the run goes on."""
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
        """Return whether any rank is to stop, and whether any is to save.

        Signals reach ranks one after another, and their clocks differ.
        """
        stop = self.asked is not None
        if world_size() == 1:
            return stop, save
        flags = torch.tensor([stop, save], dtype=torch.int64)  # no wait for a GPU
        stops, saves = sum_over_ranks(flags).tolist()
        return stops > 0, saves > 0

    def _save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint, unless this moment has one."""
        if self._saved == self._position:
            return
        step = trainer.global_step
        trainer.save_checkpoint(self.files.path(step))
        self.files.failure = self.files.failure or self.metrics.failure
        self.files.check_written()
        self._saved, self._saved_at = self._position, time.monotonic()
        if trainer.is_global_zero:
            self.files.prune(step, self.settings.keep_checkpoints)

    # --------------------------------------------------------------- what is in there

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Add where the run stands, and what it has logged."""
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
        """Go on where the checkpoint stands.

        Raises:
            InputError: the run was begun with other crystals.
        """
        kept = checkpoint[_KEY]
        if kept["crystals"] != self._crystals:
            raise InputError(
                f"{self.loader.store.path} holds other training crystals than those "
                f"that the run in {self.files.folder.parent} began with; give it back "
                "the same ones, or start anew with `resume=false overwrite=true`"
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
        """Return what tells one set of training crystals from another."""
        rows = hashlib.sha256(self.loader.rows.tobytes()).hexdigest()
        return f"{self.loader.store.hash} {rows}"


# Lightning goes on among the batches of an epoch by itself. At the end of one it would
# pass over the validation, or over hooks; so its counters are set to what they are at a
# moment from which it goes on as if nothing had happened.

_STAGES = ("ready", "started", "processed", "completed")


def _count(progress: dict[str, Any], *counts: int) -> None:
    """Set the counters of one progress that are there."""
    for stage, count in zip(_STAGES, counts, strict=True):
        if stage in progress:
            progress[stage] = count


def _begin_epoch(loops: dict[str, Any], epoch: int) -> None:
    """Let a run go on with the first batch of an epoch."""
    for progress in ("total", "current"):
        _count(loops["epoch_progress"][progress], epoch, epoch, epoch, epoch)
    batches = loops["epoch_loop.batch_progress"]
    _count(batches["current"], 0, 0, 0, 0)
    batches["is_last_batch"] = False


def _begin_validation(loops: dict[str, Any]) -> None:
    """Let a run go on with the validation that follows the last batch of an epoch."""
    batches = loops["epoch_loop.batch_progress"]
    for progress in ("total", "current"):
        done = batches[progress]["processed"]
        _count(batches[progress], done, done, done, done)
        # As if it had been stopped in the first batch.
        _count(loops["epoch_loop.val_loop.batch_progress"][progress], 1, 1, 0, 0)
    batches["is_last_batch"] = True


class BestWeights(Callback):
    """Keeps the weights that validation likes best, in memory and in checkpoints.

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
        """Keep the weights if there were none so good; the first of equal ones stay."""
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
        """Return what belongs into a checkpoint."""
        return {"score": self.score, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.score, self.weights = state_dict["score"], state_dict["weights"]


class Patience(EarlyStopping):
    """Stops a run that no longer improves, and leaves it so when it is resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not begin an epoch that the run before did not begin."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
