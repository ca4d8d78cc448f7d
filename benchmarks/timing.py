"""Ratios within one run: candidates take turns, and medians are compared."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of the table of results.

    Args:
        what: what was measured.
        published: the figure of the published program, with its unit.
        ours: the same for ours.
        ratio: how many times better ours is; None if there is nothing to compare.
        goal: the ratio or figure to reach.
    """

    what: str
    published: str
    ours: str
    ratio: float | None
    goal: str


def take_turns(
    candidates: dict[str, Callable[[], object]], repeats: int = 7
) -> dict[str, float]:
    """Return the median seconds of each candidate, run alternately after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def data() -> Path:
    """Return the folder of real data."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CRYSDISTILL_DATA", beside))
    if not folder.is_dir():
        raise SystemExit(
            "real data absent: put it in ../shared/data or set CRYSDISTILL_DATA"
        )
    return folder
