"""One process on one core, and two on two: the same run by the same command."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets import TARGET, UNIT, labelled_store
from benchmarks.timing import Row

TURNS = 3
EPOCHS = 3
SETTINGS = {
    "optimizer.schedule": "constant",
    "trainer.accelerator": "cpu",
    "trainer.batch_size": "256",
    "trainer.progress": "false",
    "trainer.threads": "1",
}


def measure() -> Iterator[Row]:
    """Compare `trainer.devices=1` with `trainer.devices=2`."""
    with tempfile.TemporaryDirectory() as folder:
        path = labelled_store(Path(folder), 8192)
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(TURNS):
            for devices, found in rates.items():
                found.append(_rate(path, devices))
                print(f"{devices} processes: {found[-1]:,.0f} crystals/s", flush=True)
    one, two = (statistics.median(found) for found in rates.values())
    yield Row(
        "training by two processes with a core each (beside it: by one)",
        f"{one:,.0f} crystals/s",
        f"{two:,.0f} crystals/s",
        two / one,
        ">= 1.7x",
    )


def _rate(store: Path, devices: int) -> float:
    """Train by the command line; return crystals per second of a whole epoch.

    Two runs of different length: what their times differ by are epochs alone.
    """
    seconds = [_run(store, devices, epochs) for epochs in (1, 1 + EPOCHS)]
    return _training_crystals(store) * EPOCHS / (seconds[1] - seconds[0])


def _run(store: Path, devices: int, epochs: int) -> float:
    """Return the seconds of a run from the start of its process to its end."""
    settings = {
        **SETTINGS,
        "dataset": store,
        "target.name": TARGET,
        "target.unit": UNIT,
        "out": store.parent / "run",
        "overwrite": "true",
        "trainer.devices": devices,
        "trainer.epochs": epochs,
    }
    begun = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "crysdistill", "train"),
            *(f"{key}={value}" for key, value in settings.items()),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )
    if done.returncode:
        raise SystemExit(f"{devices} processes: {done.stderr[-3000:]}")
    return time.perf_counter() - begun


def _training_crystals(store: Path) -> int:
    """Return how many crystals the last run learned from."""
    with (store.parent / "run" / "split.csv").open() as file:
        return sum(row["subset"] == "train" for row in csv.DictReader(file))
