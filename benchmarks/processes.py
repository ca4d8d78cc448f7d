"""Runs of both programs in separate processes, which take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.datasets import TARGET, UNIT


@dataclass(frozen=True)
class Run:
    """What a process reported about its run.

    Args:
        epochs: seconds of each timed epoch.
        processor: the same in processor time.
        peak: peak memory, MB.
        mae: the mean absolute error on validation crystals.
    """

    epochs: list[float]
    processor: list[float]
    peak: float
    mae: float

    @property
    def epoch(self) -> float:
        """Median seconds of an epoch."""
        return statistics.median(self.epochs)


def run(module: str, *arguments: object, threads: int) -> Run:
    """Run `python -m MODULE ARGUMENTS` and return what it prints as JSON.

    Raises:
        SystemExit: it failed; the message ends with its error output.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
        },
    )
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stderr[-3000:]}")
    found = Run(**json.loads(done.stdout.splitlines()[-1]))
    shown = ", ".join(f"{seconds:.1f}" for seconds in found.epochs)
    print(
        f"{module.rpartition('.')[2]}, {threads} threads: epochs of {shown} s, "
        f"{found.peak:.0f} MB, MAE {found.mae:.3f}",
        flush=True,
    )
    return found


def ours(
    verb: str, store: Path, epochs: int, threads: int, *overrides: str, batch: int = 256
) -> Run:
    """Run one of our verbs on a dataset, with the published program's optimizer."""
    return run(
        "benchmarks.our_training",
        verb,
        f"dataset={store}",
        f"target.name={TARGET}",
        f"target.unit={UNIT}",
        f"out={store.parent / 'run'}",
        "overwrite=true",
        "optimizer.name=sgd",
        "optimizer.lr=0.01",
        "optimizer.weight_decay=0",
        "optimizer.schedule=constant",
        f"trainer.epochs={epochs}",
        f"trainer.batch_size={batch}",
        f"trainer.threads={threads}",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        *overrides,
        threads=threads,
    )


def published(source: Path, epochs: int, threads: int, batch: int = 256) -> Run:
    """Run the published program's main loop."""
    module = "benchmarks.published_training"
    return run(module, source, epochs, threads, batch, threads=threads)
