"""Computes the steady speed of a run from its steps."""

from __future__ import annotations

from typing import Any

import numpy as np

WINDOW = 0.5
"""Seconds of a window; longer in very long runs, to limit the number of windows."""

FEWEST = 5
"""The fewest steps in a window."""

_MOST = 2000


class Pace:
    """Adds up steps, and finds their speed as a median over windows.

    A window lasts half a second and has at least five steps. The median over windows is
    the long-term speed of a run: a pause, or another program for a while, does not
    change it.

    Args:
        warm_up: the number of first steps that belong to no window.

    Attributes:
        steps: the number of all steps, including the warm-up.
        crystals: of all steps.
        atoms: of all steps.
        edges: of all steps.
        seconds: of all steps.
        waited: seconds of all steps that were spent waiting for batches.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.steps = self.crystals = self.atoms = self.edges = 0
        self.seconds = self.waited = 0.0
        self._steady = np.zeros(6)  # of the steps after the warm-up
        self._windows: list[np.ndarray] = []  # columns as in `add`
        self._open = np.zeros(6)
        self._length = WINDOW
        self._imbalance, self._heaviest = 0.0, 0

    def add(
        self,
        seconds: np.ndarray,
        waited: np.ndarray,
        counts: np.ndarray,
        edges: np.ndarray,
    ) -> None:
        """Add steps.

        Args:
            seconds: (S,) the time of each step.
            waited: (S,) the part of it spent waiting for the batch.
            counts: (S, 3) crystals, atoms and edges of all ranks.
            edges: (R, S) edges of each rank.
        """
        number = len(seconds)
        if not number:
            return
        first = max(0, self.warm_up - self.steps)
        table = np.column_stack((np.ones(number), seconds, waited, counts))  # (S, 6)
        self.steps += number
        self.seconds += float(seconds.sum())
        self.waited += float(waited.sum())
        for name, total in zip(
            ("crystals", "atoms", "edges"), counts.sum(0), strict=True
        ):
            setattr(self, name, getattr(self, name) + int(total))
        mean = np.maximum(edges.mean(0), 1e-9)
        self._imbalance += float(np.where(mean > 1e-9, edges.max(0) / mean, 1.0).sum())
        self._heaviest = max(self._heaviest, int(edges.sum(0).max()))
        self._steady += table[first:].sum(0)
        for row in table[first:]:
            self._open += row
            if self._open[0] >= FEWEST and self._open[1] >= self._length:
                self._windows.append(self._open)
                self._open = np.zeros(6)
        if len(self._windows) > _MOST:
            pairs = len(self._windows) // 2
            self._windows = [
                self._windows[2 * k] + self._windows[2 * k + 1] for k in range(pairs)
            ]
            self._length *= 2

    @property
    def imbalance(self) -> float:
        """Edges of the busiest rank over the mean of all, averaged over steps."""
        return self._imbalance / self.steps if self.steps else 1.0

    @property
    def fill(self) -> float:
        """Edges of the mean batch over those of the heaviest one."""
        return self.edges / self.steps / self._heaviest if self._heaviest else 1.0

    @property
    def stall(self) -> float:
        """The share of the steps' time spent waiting, without the warm-up."""
        _, seconds, waited = self._chosen()[:3]
        return float(waited / seconds) if seconds else 0.0

    def _chosen(self) -> np.ndarray:
        """Return the sums of the steps after the warm-up, or else of all."""
        if self._steady[0]:
            return self._steady
        counts = (self.crystals, self.atoms, self.edges)
        return np.array([self.steps, self.seconds, self.waited, *counts])

    def rates(self) -> dict[str, Any]:
        """Return crystals, atoms and edges per second, and how they were computed."""
        names = ("crystals_per_s", "atoms_per_s", "edges_per_s")
        if self._windows:
            table = np.array(self._windows)
            speeds = table[:, 3:] / table[:, 1:2]  # (windows, 3)
            low, high = np.quantile(speeds[:, 0], (0.25, 0.75))
            basis = f"median of {len(table)} windows" if len(table) > 1 else "1 window"
            found = np.median(speeds, axis=0)
            spread = [float(low), float(high)]
        else:
            chosen = self._chosen()
            found, spread = chosen[3:] / max(chosen[1], 1e-9), None
            left_out = self.steps - int(chosen[0])
            basis = f"mean of {int(chosen[0])} steps"
            basis += (
                f" after the first {left_out}" if left_out else ", the first included"
            )
        return {
            **{name: float(rate) for name, rate in zip(names, found, strict=True)},
            "basis": basis,
            "crystals_per_s_quartiles": spread,
        }
