"""One process on one core, and two on two cores: the same run by the same command."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets import TARGET, UNIT, labelled_store
from benchmarks.timing import Row
from crysdistill.training.watch.throughput import FILE

TURNS = 5
BATCHES = {1024: ">= 1.7x", 256: ""}
EPOCHS = 3
SETTINGS = {
    "optimizer.schedule": "constant",
    "trainer.accelerator": "cpu",
    "trainer.progress": "false",
    "trainer.threads": "1",
}


def measure() -> Iterator[Row]:
    """Compare `trainer.devices=1` with `trainer.devices=2`."""
    with tempfile.TemporaryDirectory() as folder:
        path = labelled_store(Path(folder), 8192)
        for batch, goal in BATCHES.items():
            rates: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(TURNS):
                for devices, found in rates.items():
                    found.append(_rate(path, devices, batch))
                    print(
                        f"{devices} processes: {found[-1]:,.0f} crystals/s", flush=True
                    )
            one, two = (statistics.median(found) for found in rates.values())
            yield Row(
                "training by two processes with a core each (against one process), "
                f"batch {batch}",
                f"{one:,.0f} crystals/s",
                f"{two:,.0f} crystals/s",
                two / one,
                goal,
            )


def _rate(store: Path, devices: int, batch: int) -> float:
    """Train by the command line; return the run's reported crystals per second."""
    settings = {
        **SETTINGS,
        "dataset": store,
        "target.name": TARGET,
        "target.unit": UNIT,
        "out": store.parent / "run",
        "overwrite": "true",
        "trainer.batch_size": batch,
        "trainer.devices": devices,
        "trainer.epochs": EPOCHS,
    }
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
    told = json.loads((store.parent / "run" / FILE).read_text())
    return float(told["rates"]["crystals_per_s"])
