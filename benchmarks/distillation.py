"""An epoch of distillation, whose teacher's embeddings are kept, and a plain one."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets import labelled_store
from benchmarks.processes import Run, ours
from benchmarks.timing import Row

TURNS = 3


def measure() -> Iterator[Row]:
    """Compare epochs of `train` and `distill` on the same crystals."""
    with tempfile.TemporaryDirectory() as folder:
        path = labelled_store(Path(folder), 4096)
        runs: dict[str, list[Run]] = {"train": [], "distill": []}
        for _ in range(TURNS):
            runs["train"].append(ours("train", path, 4, 1))
            runs["distill"].append(ours("distill", path, 4, 1, "teacher=random"))
    plain, distilled = (statistics.median(r.epoch for r in g) for g in runs.values())
    yield Row(
        "distillation epoch, teacher's embeddings kept (beside it: a plain epoch)",
        f"{plain:.2f} s",
        f"{distilled:.2f} s",
        distilled / plain,
        "< 1.15x",
    )
