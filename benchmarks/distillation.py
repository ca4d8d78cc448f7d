"""An epoch of distillation with kept teacher embeddings, and a plain epoch."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets import labelled_store
from benchmarks.processes import Run, ours
from benchmarks.timing import Row

TURNS = 2


def measure() -> Iterator[Row]:
    """Compare epochs of `train` and `distill` on the same crystals.

    Two processes cannot take turns on a core epoch by epoch. So processor time is
    compared, because other programs disturb it least.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = labelled_store(Path(folder), 4096)
        runs: dict[str, list[Run]] = {"train": [], "distill": []}
        for _ in range(TURNS):
            runs["train"].append(ours("train", path, 4, 1))
            runs["distill"].append(ours("distill", path, 4, 1, "teacher=random"))
    plain, distilled = (
        statistics.median(seconds for run in some for seconds in run.processor)
        for some in runs.values()
    )
    yield Row(
        "distillation epoch, teacher's embeddings kept (against a plain epoch), "
        "one thread, processor time",
        f"{plain:.2f} s",
        f"{distilled:.2f} s",
        distilled / plain,
        "< 1.15x",
    )
