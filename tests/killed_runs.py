"""Runs in separate processes that die midway, as by `kill -9`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from crysdistill.files import PARTIAL
from crysdistill.training import (
    checkpoints,
    distill,
    engine,
    labelled,
    pretrain,
    pretraining,
    supervised,
    train,
)
from crysdistill.training.resume import keeping
from crysdistill.training.resume.metrics_log import MetricsLog
from tests.forks import CONTEXT

RUNS: dict[str, Callable[[Any], Path]] = {
    "train": train.train,
    "distill": distill.distill,
    "pretrain": pretrain.pretrain,
}


@dataclass(frozen=True)
class Death:
    """The moment at which a process dies.

    Args:
        where: `step` is before a training step, `validation` in a validation batch,
            `writing` with half of a checkpoint written, `written` just after that,
            `logging` before a line of metrics, `ending` before the weights are written.
        count: how many such moments the process survives.
    """

    where: str
    count: int = 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _prepare(death: Death) -> None:
    """Make this process die at that moment."""
    keeping.SHARE = 1e9  # save every epoch, however short
    left = death.count

    def passed() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def before(owner: Any, name: str, dies: Callable[..., None] | None = None) -> None:
        real = getattr(owner, name)

        def dying(*args: Any, **options: Any) -> Any:
            if passed():
                if dies is not None:
                    dies(real, *args)
                _die()
            return real(*args, **options)

        setattr(owner, name, dying)

    def half(real: Callable, path: Path, content: memoryview) -> None:
        written = path.with_name(path.name + PARTIAL)
        written.write_bytes(content[: len(content) // 2])

    def whole(real: Callable, path: Path, content: memoryview) -> None:
        real(path, content)

    modules = (supervised.SupervisedModule, pretraining.PretrainModule)
    if death.where == "step":
        before(engine.SeededSteps, "on_train_batch_start")
    elif death.where == "validation":
        for module in modules:
            before(module, "validation_step")
    elif death.where == "writing":
        before(checkpoints, "write_whole", half)
    elif death.where == "written":
        before(checkpoints, "write_whole", whole)
    elif death.where == "logging":
        before(MetricsLog, "log_metrics")
    elif death.where == "ending":
        for module in (labelled, pretrain):
            before(module, "save_weights")
    else:
        raise ValueError(death.where)


def _attempt(run: str, config: Any, death: Death | None) -> None:
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as it runs
    if death is not None:
        _prepare(death)
    RUNS[run](config)


def start(run: str, config: Any, death: Death | None = None) -> BaseProcess:
    """Start a run in a separate process."""
    process = CONTEXT.Process(target=_attempt, args=(run, config, death))
    process.start()
    return process


def lives(run: str, config: Any, death: Death | None = None) -> bool:
    """Run in a separate process; return whether it lives to the end."""
    process = start(run, config, death)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0
