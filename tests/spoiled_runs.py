"""A small run in which the cell of one crystal is NaN."""

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
    """Sets the cell of one crystal to NaN, on whichever rank has it."""

    def __init__(self, row: int) -> None:
        self.row = row

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.cell[batch.rows == self.row] = math.nan


def run_spoiled(path: Path, out: Path, row: int, lr: float) -> dict[str, Any]:
    """Train with one spoiled crystal (none if `row` < 0); return what is reported."""
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
