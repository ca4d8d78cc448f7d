"""What every pretraining objective offers to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.views import Clean, View
from crysdistill.ranks import sum_over_ranks

__all__ = [
    "Embedded",
    "Objective",
    "Totals",
    "balanced_weights",
    "full_precision",
    "mean_over_ranks",
    "ratio",
]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A view of a batch and what the encoder made of it.

    Args:
        batch: the view, with `masked_atoms` where it hides some.
        atoms: (N, F), atom embeddings as the encoder returns them.
        crystals: (B, F), crystal embeddings as `Encoder.pool` returns them.
    """

    batch: CrystalBatch
    atoms: Tensor
    crystals: Tensor


class Objective(nn.Module, ABC):
    """A loss on embeddings that needs no labels, and the numbers that judge it.

    An objective is called with the `Embedded` of its `view`, the batch as it was
    before the view, and the seed of the step. It returns a scalar that is connected
    to the embeddings even where a batch has nothing to say (zero, then). With several
    ranks, each of which has a part of the batch, it returns this rank's share of the
    loss of the whole batch (`crysdistill.ranks`). In validation `update` adds a batch
    to the numbers, `compute` returns them over all batches and ranks, `reset` starts
    again; their states are no part of the weights.

    Attributes:
        name: the key in `OBJECTIVES`.
        PUBLISHED: the settings that reproduce CrysGNN; the defaults correct it.
        view: what the encoder is shown. Objectives with equal views share a pass.
    """

    name: ClassVar[str]
    PUBLISHED: ClassVar[Mapping[str, Any]] = {}
    view: View = Clean()

    @classmethod
    def published(cls, encoder_width: int, **settings: Any) -> Self:
        """Return the objective as CrysGNN published it.

        Args:
            encoder_width: F, the width of the embeddings.
            settings: what shall differ from `PUBLISHED`.
        """
        return cls(encoder_width, **{**cls.PUBLISHED, **settings})

    def prepare(self, space_group_counts: Tensor) -> None:
        """Learn from the training part of the corpus, before the first step.

        Args:
            space_group_counts: (231,), crystals of each space group; entry 0
                counts those whose space group is not known.
        """
        return

    @abstractmethod
    def forward(self, embedded: Embedded, batch: CrystalBatch, seed: int) -> Tensor:
        """Return the loss, a scalar."""

    @abstractmethod
    def update(self, embedded: Embedded, batch: CrystalBatch, seed: int) -> None:
        """Add a validation batch to the numbers."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the numbers; beside each `x` its chance level, `x_chance`.

        NaN where no batch had anything to say. Every rank must call it.
        """

    def reset(self) -> None:
        """Forget the validation batches seen so far."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()


def mean_over_ranks(total: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's share of a weighted mean over all ranks; 0 for 0 / 0.

    Args:
        total: its numerator, of this rank.
        weight: its denominator, of this rank.
    """
    weight = sum_over_ranks(weight)
    return total / torch.where(weight > 0, weight, torch.ones_like(weight))


class Totals(Metric):
    """Named sums of integers over batches and ranks.

    Args:
        sizes: the length of each sum.
    """

    full_state_update = False

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        for name, size in sizes.items():
            zero = torch.zeros(size, dtype=torch.int64)
            self.add_state(name, zero, dist_reduce_fx="sum")
        self.names = tuple(sizes)

    def update(self, **amounts: Tensor) -> None:
        """Add an amount, a scalar or of the sum's length, to each sum named."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)

    def compute(self) -> dict[str, Tensor]:
        """Return the sums."""
        return {name: getattr(self, name) for name in self.names}


def ratio(part: Tensor, whole: Tensor) -> float:
    """Return part / whole as a plain number; NaN for 0 / 0."""
    return (part.double() / whole.double()).item()


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float32, or in what it has if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def balanced_weights(counts: Tensor, balance: float) -> Tensor:
    """Return class weights that rise with rarity, count^-balance, (C,) float32.

    Only their ratios matter. A class that was never counted weighs as much as one
    counted once.

    Args:
        counts: (C,), examples of each class.
        balance: 0 gives equal weights, 1 equal shares of the loss to all classes.

    Raises:
        InputError: `balance` is not in [0, 1].
    """
    if not 0 <= balance <= 1:
        raise InputError(f"`balance` is {balance} but must be between 0 and 1")
    return counts.clamp(min=1).float() ** -balance
