"""Whole training epochs on real crystals: the published program, and ours.

Both train the same model on the same crystals and the same graph. Each epoch is
complete: batches, steps, validation, logs, a checkpoint. The published program has all
crystals in memory as arrays before an epoch is timed. Each run has its own process. The
processes take turns, and medians over epochs are compared.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.datasets import TARGET, labelled_store, write_padded
from benchmarks.processes import Run, ours, published
from benchmarks.timing import Row
from crysdistill.splits import SplitSettings, make_split
from crysdistill.store.store import Store

TURNS = {1: 1, 2: 2}
"""How often both are run, by the number of threads."""


def measure() -> Iterator[Row]:
    """Compare epochs of `mp36k`, and the memory that they take."""
    with tempfile.TemporaryDirectory() as folder:
        path = labelled_store(Path(folder))
        store = Store.open(path)
        split = make_split(store, SplitSettings(), store.property(TARGET))
        arrays = Path(folder) / "arrays.npz"
        rows = {name: np.sort(getattr(split, name)) for name in ("train", "val")}
        write_padded(store, rows, arrays)
        for threads, turns in TURNS.items():
            theirs, mine = [], []
            for _ in range(turns):
                theirs.append(published(arrays, 1, threads))
                mine.append(ours("train", path, 4, threads))
            yield _speed(theirs, mine, split.train, len(split.val), threads)
        peaks = [max(run.peak for run in runs) for runs in (theirs, mine)]
        yield Row(
            f"peak memory of that run, {len(store):,} crystals",
            f"{peaks[0]:,.0f} MB",
            f"{peaks[1]:,.0f} MB",
            peaks[0] / peaks[1],
            ">= 2x",
        )


def _speed(
    theirs: list[Run], mine: list[Run], train: np.ndarray, val: int, threads: int
) -> Row:
    seconds = [statistics.median(r.epoch for r in runs) for runs in (theirs, mine)]
    return Row(
        f"training epoch, {len(train):,} crystals, {val:,} for validation; batches "
        f"of 256, {threads} thread{'s' * (threads > 1)}",
        f"{len(train) / seconds[0]:,.0f} crystals/s",
        f"{len(train) / seconds[1]:,.0f} crystals/s",
        seconds[0] / seconds[1],
        ">= 3.5x (goal 6x)",
    )
