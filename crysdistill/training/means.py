"""Means over an epoch, the same after a resume and on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import rank, sum_over_ranks

State = tuple[dict[str, float], float]
"""Sums by name, and their weight."""


class EpochMeans:
    """Means of each step's values over the crystals of an epoch.

    Lightning's own means forget the steps before a checkpoint within the epoch.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, values: Mapping[str, Tensor], batch: CrystalBatch) -> None:
        """Add the values of a step, each this rank's share of the batch's value."""
        # The crystals of all ranks: the batch knows, so no rank has to be asked.
        weight = getattr(batch, "crystals_of_all", batch.num_graphs)
        self._weight += weight
        for name, value in values.items():
            amount = value.detach().double() * weight
            before = self._sums.get(name)
            self._sums[name] = amount if before is None else before.to(amount) + amount

    def compute(self) -> dict[str, float]:
        """Return the means over all ranks, and start again."""
        sums, weight = self.state()
        self._sums, self._weight = {}, 0.0
        return {name: total / weight for name, total in sums.items()} if weight else {}

    def state(self) -> State:
        """Return the sums of all ranks and their weight, for a checkpoint."""
        if not self._sums:
            return {}, 0.0
        total = sum_over_ranks(torch.stack(list(self._sums.values()))).tolist()
        return dict(zip(self._sums, total, strict=True)), self._weight

    def restore(self, state: State, device: torch.device) -> None:
        """Continue from a checkpoint, on any number of ranks."""
        sums, self._weight = state
        mine = float(rank() == 0)
        self._sums = {
            name: torch.tensor(total * mine, dtype=torch.float64, device=device)
            for name, total in sums.items()
        }
