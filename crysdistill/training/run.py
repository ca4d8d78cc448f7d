"""One run of any kind: prepare, learn on all ranks, judge on the first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import lightning as L

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
    """What all runs share.

    Args:
        out: the run directory.
        optimizer: how weights move.
        trainer: how long and on what.
        seed: of weights and of everything drawn.
        resume: go on with an interrupted run.
        overwrite: delete what an earlier run left.
    """

    out: Path
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    seed: int = 0
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class Learning:
    """What a plan has prepared for `fit`.

    Args:
        module: what learns.
        train: training batches.
        val: validation batches.
        monitor: the validation number that chooses the epoch.
        mode: whether a `min` or a `max` of it is best.
    """

    module: L.LightningModule
    train: BatchLoader
    val: BatchLoader
    monitor: str
    mode: Literal["min", "max"]


Config = TypeVar("Config", bound=RunConfig)


class Plan(ABC, Generic[Config]):
    """What one kind of run does at each point of `execute`.

    Args:
        config: what the user asked for.
    """

    data: ClassVar[str]
    """What the store is called in messages: `corpus` or `dataset`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def open(self) -> Store:
        """Open the store, and refuse what can be refused before anything starts."""

    @abstractmethod
    def prepare(self, store: Store, trainer: TrainerSettings) -> Learning:
        """Make what learns and its batches, on all ranks; leave no file behind.

        Args:
            store: what `open` returned.
            trainer: with the number of devices filled in.
        """

    @abstractmethod
    def begin(self, learning: Learning, run: RunDirectory) -> None:
        """Say what will be learned from what, once the folder is there; on all ranks.

        What takes long to compute, such as the answers of a teacher, belongs here.
        """

    @abstractmethod
    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Judge the best weights and write them; on the first rank alone."""


def execute(plan: Plan) -> Path:
    """Carry out a plan and return the path of its weights file.

    Raises:
        InputError: the data or a setting cannot be used.
    """
    config = plan.config
    with ExitStack() as held:  # the run directory, to the end
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
                seed=config.seed,
            )
            first = rank() == 0
        if first:  # it alone judges and writes
            plan.judge(learning, run)
            run.print_tree()
        return run.weights
