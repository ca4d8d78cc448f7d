"""A small run in which one crystal has no place in space."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L

from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.watch.guard import Guard
from crysdistill.training.watch.throughput import Throughput
from tests.toy_fits import ToyRun


class Spoil(L.Callback):
    """Gives one crystal no place in space, whichever rank has it."""

    def __init__(self, row: int) -> None:
        self.row = row

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.cell[batch.rows == self.row] = math.nan


def run_spoiled(path: Path, out: Path, row: int, lr: float) -> dict[str, Any]:
    """Train where one crystal (none below 0) spoils its batch; return what is told."""
    optimizer = OptimizerSettings("sgd", lr=lr, schedule="constant")
    toy = ToyRun(Store.open(path), out, 3, optimizer, "eq5")
    guard = Guard(toy.run, toy.train, toy.val)
    speed = Throughput(toy.run, toy.train)
    said = ""
    try:
        toy.fit([Spoil(row), guard, speed], max_epochs=3)
    except InputError as error:
        said = str(error)
    losses = [step.loss for step in guard._steps]
    return {"error": said, "losses": losses, "report": speed.report}
