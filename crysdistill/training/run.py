"""One run of any kind: prepare and train on all ranks, judge on the first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from crysdistill.ranks import rank
from crysdistill.schema import dump_config
from crysdistill.store.store import Store
from crysdistill.training.engine import fit
from crysdistill.training.launch import check_same, joined
from crysdistill.training.loader import BatchLoader
from crysdistill.training.runs import RunDirectory, open_run
from crysdistill.training.settings import OptimizerSettings, TrainerSettings


@dataclass(kw_only=True)
class RunConfig:
    """The settings of all runs.

    Args:
        out: the run directory.
        optimizer: the optimizer and its schedule.
        trainer: how long to train, and on which devices.
        seed: of the weights and all other random choices.
        resume: continue an interrupted run.
        overwrite: delete the files of an earlier run.
    """

    out: Path
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    seed: int = 0
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class Learning:
    """All that a plan has prepared for `fit`.

    Args:
        module: the module to train.
        train: training batches.
        val: validation batches.
        monitor: the validation number that chooses the epoch.
        mode: whether its `min` or its `max` is best.
        callbacks: further callbacks of the run.
    """

    module: L.LightningModule
    train: BatchLoader
    val: BatchLoader
    monitor: str
    mode: Literal["min", "max"]
    callbacks: Sequence[Callback] = ()


Config = TypeVar("Config", bound=RunConfig)


class Plan(ABC, Generic[Config]):
    """The steps of one kind of run, which `execute` carries out.

    Args:
        config: the user's configuration.
    """

    data: ClassVar[str]
    """The name of the store in messages: `corpus` or `dataset`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def open(self) -> Store:
        """Open the store, and refuse unusable input before anything starts."""

    @abstractmethod
    def prepare(self, store: Store, trainer: TrainerSettings) -> Learning:
        """Make the module and its batches on all ranks; write no files.

        Args:
            store: the store that `open` returned.
            trainer: the settings, with the number of devices filled in.
        """

    @abstractmethod
    def begin(self, learning: Learning, run: RunDirectory) -> None:
        """Print what is trained on which data, on all ranks; the folder now exists.

        Slow computations, such as the answers of a teacher, belong here.
        """

    @abstractmethod
    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Judge the best weights and write them, on the first rank only."""


def execute(plan: Plan) -> Path:
    """Carry out a plan and return the path of its weights file.

    Raises:
        InputError: the data or a setting cannot be used.
    """
    config = plan.config
    with ExitStack() as held:  # keeps the run directory locked to the end
        store = plan.open()
        with joined(config.trainer) as trainer:
            check_same(plan.data, store.hash)
            L.seed_everything(config.seed, verbose=False)
            learning = plan.prepare(store, trainer)
            # Only now, so that a mistake in the configuration leaves no folder behind.
            run = held.enter_context(
                open_run(
                    config.out, dump_config(config), config.resume, config.overwrite
                )
            )
            plan.begin(learning, run)
            fit(
                learning.module,
                learning.train,
                learning.val,
                run,
                trainer,
                monitor=learning.monitor,
                mode=learning.mode,
                callbacks=learning.callbacks,
                seed=config.seed,
            )
            first = rank() == 0
        if first:  # only it judges and writes
            plan.judge(learning, run)
            run.print_tree()
        return run.weights
