"""Means of an epoch that a resumed run and any number of ranks find the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import rank, sum_over_ranks

State = tuple[dict[str, float], float]
"""Sums by name, and their weight."""


class EpochMeans:
    """Means over the crystals of an epoch of what each step found.

    Lightning's own means forget what was before a checkpoint in the middle of an epoch.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, values: Mapping[str, Tensor], batch: CrystalBatch) -> None:
        """Add the values of a step, each this rank's share of that of the batch."""
        # How many crystals all ranks have: no question to them, and no waiting.
        weight = getattr(batch, "crystals_of_all", batch.num_graphs)
        self._weight += weight
        for name, value in values.items():
            amount = value.detach().double() * weight
            before = self._sums.get(name)
            self._sums[name] = amount if before is None else before.to(amount) + amount

    def compute(self) -> dict[str, float]:
        """Return the means over all ranks, and begin anew."""
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
        """Go on from what a checkpoint holds, on however many ranks."""
        sums, self._weight = state
        mine = float(rank() == 0)
        self._sums = {
            name: torch.tensor(total * mine, dtype=torch.float64, device=device)
            for name, total in sums.items()
        }
