"""Measure everything and print the table: `python -m benchmarks [NAME ...]`."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import (
    batching,
    building,
    cold,
    distillation,
    encoders,
    epochs,
    graph_building,
    ingest,
    overlap,
    pretraining,
    reading,
    scaling,
    sharing,
    step,
    teacher_table,
)

BENCHMARKS = {
    "graphs": graph_building.measure,
    "ingest": ingest.measure,
    "step": step.measure,
    "batching": batching.measure,
    "building": building.measure,
    "reading": reading.measure,
    "sharing": sharing.measure,
    "epochs": epochs.measure,
    "cold": cold.measure,
    "distillation": distillation.measure,
    "encoders": encoders.measure,
    "teacher_table": teacher_table.measure,
    "scaling": scaling.measure,
    "pretraining": pretraining.measure,
    "overlap": overlap.measure,
}


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    table = Table("what", "published", "ours", "ratio", "goal")
    for name in sys.argv[1:] or BENCHMARKS:
        for row in BENCHMARKS[name]():
            ratio = "" if row.ratio is None else f"{row.ratio:.{_digits(row.ratio)}f}x"
            cells = (row.what, row.published, row.ours, ratio, row.goal)
            table.add_row(*cells)
            print(f"| {' | '.join(cells)} |", flush=True)
    Console().print(table)


def _digits(ratio: float) -> int:
    """Return the number of decimals of a ratio: two for ratios near 1, else one."""
    return 2 if ratio < 2 else 1


if __name__ == "__main__":
    main()
