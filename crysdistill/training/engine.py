"""One Lightning trainer for every kind of run: logs, checkpoints, Ctrl-C, resume."""

from __future__ import annotations

import logging
import warnings
from types import TracebackType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from crysdistill.training.checkpoints import (
    EpochCheckpoint,
    KeepWork,
    Patience,
    earlier_metrics,
)
from crysdistill.training.loader import BatchLoader
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import TrainerSettings


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
    earlier = earlier_metrics(run, len(train)) if run.resumed else []
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
