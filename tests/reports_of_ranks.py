"""A small run on two processes, for tests: `python -m tests.reports_of_ranks ...`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import lightning as L

from crysdistill.corpus.store import Store
from crysdistill.errors import InputError
from crysdistill.ranks import rank
from crysdistill.training.launch import joined
from crysdistill.training.settings import OptimizerSettings, TrainerSettings
from crysdistill.training.watch.guard import Guard
from crysdistill.training.watch.throughput import Throughput
from tests.toy_fits import ToyRun


class Spoil(L.Callback):
    """Gives one crystal no place in space, whichever rank has it."""

    def __init__(self, row: int) -> None:
        self.row = row

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.cell[batch.rows == self.row] = math.nan


def main(path: str, out: str, row: int, lr: float) -> None:
    with joined(TrainerSettings(accelerator="cpu", devices=2)):
        optimizer = OptimizerSettings("sgd", lr=lr, schedule="constant")
        toy = ToyRun(Store.open(Path(path)), Path(out), 3, optimizer, "eq5")
        guard = Guard(toy.run, toy.train, toy.val)
        speed = Throughput(toy.run, toy.train)
        said = ""
        try:
            toy.fit([Spoil(row), guard, speed], max_epochs=3)
        except InputError as error:
            said = str(error)
        told = {"error": said, "losses": [step.loss for step in guard._steps]}
        told["report"] = speed.report
        Path(f"{out}-{rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
