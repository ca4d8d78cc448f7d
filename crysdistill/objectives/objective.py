"""The interface between pretraining objectives and the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from crysdistill.encoders.encoder import Embeddings
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.views import Clean, View
from crysdistill.ranks import sum_over_ranks
from crysdistill.store.store import Store
from crysdistill.transfer.seen import Learned

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
    """A view of a batch and its embeddings.

    Args:
        batch: the view; it has `masked_atoms` if it hides some atoms, and `copy_of` if
            it repeats some.
        embeddings: the encoder's output for it.
    """

    batch: CrystalBatch
    embeddings: Embeddings

    @property
    def atoms(self) -> Tensor:
        """(N, F), of the atoms of the view."""
        return self.embeddings.atoms

    @property
    def crystals(self) -> Tensor:
        """(B, F'), of the crystals."""
        return self.embeddings.crystals


class Objective(nn.Module, ABC):
    """A loss on embeddings, and the numbers that judge it.

    An objective names the views that the encoder should see (`views`). It is called
    with one `Embedded` for each of its views, in their order, with the batch before any
    view, and with the seed of the step. It returns a scalar that is connected to the
    embeddings. If no crystal of the batch is of use to it, that scalar is zero. With
    several ranks, each rank has a part of the batch and returns its share of the loss
    of the whole batch (`crysdistill.ranks`). In validation, `update` adds a batch to
    the numbers, `compute` returns them over all batches and ranks, and `reset` starts
    again. Their states are not part of the weights.

    A subclass is one file. The arguments of its constructor are its settings, except
    `encoder_width` and `crystal_width`, the widths of the encoder's embeddings; it
    names these if it needs them. An argument `elements` is the encoder's element table
    unless a configuration sets another.

    Attributes:
        name: the key in `OBJECTIVES`.
        PUBLISHED: the settings that reproduce CrysGNN; the defaults correct it.
        views: what the encoder sees. Equal views of several objectives cost one pass.
        columns: the labels of the corpus that it reads; see `labels`.
        learned: what its teachers, if any, were trained on; known after `prepare`. The
            weights files keep it.
    """

    name: ClassVar[str]
    PUBLISHED: ClassVar[Mapping[str, Any]] = {}
    views: tuple[View, ...] = (Clean(),)
    columns: tuple[str, ...] = ()
    learned: tuple[Learned, ...] = ()
    _places: tuple[int, ...] = ()

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Learn from the training part of the corpus, once before the first step.

        Every rank calls it with the same rows and must get the same result.
        `crysdistill.store.kept` can keep slow results for the next run.

        Args:
            store: the corpus.
            rows: its training crystals.
        """
        return

    def speaks_of(self, rows: np.ndarray) -> np.ndarray:
        """Return which crystals this objective can use, (R,) bool; by default, all.

        Batches leave out crystals that no objective can use. It is called after
        `prepare`.

        Args:
            rows: (R,) of the corpus.
        """
        return np.ones(len(rows), dtype=bool)

    def begin(
        self,
        store: Store,
        train: np.ndarray,
        held_out: np.ndarray,
        *,
        folder: Path,
        device: torch.device,
        progress: bool,
    ) -> None:
        """Compute what takes too long for `prepare`, once the run has its folder.

        Every rank calls it with the same rows.

        Args:
            store: the corpus.
            train: its training crystals.
            held_out: its held-out crystals.
            folder: of the run; used if nothing can be written beside the store.
            device: to compute on.
            progress: whether to show a progress bar.
        """
        return

    def place(self, columns: list[str]) -> None:
        """Take note of the columns of `batch.targets`.

        Args:
            columns: their names, among them all that this objective reads.
        """
        self._places = tuple(columns.index(name) for name in self.columns)

    def labels(self, batch: CrystalBatch) -> Tensor:
        """Return the labels that it reads, (B, len(columns)); NaN where unknown."""
        return batch.targets[:, list(self._places)]

    @abstractmethod
    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the loss, a scalar."""

    @abstractmethod
    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the numbers, and beside each `x` its chance level, `x_chance`.

        A number is NaN if no batch contributed to it. Every rank must call it.
        """

    def reset(self) -> None:
        """Forget the validation batches seen so far."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()


def mean_over_ranks(total: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's share of a weighted mean over all ranks; 0 for 0 / 0.

    Args:
        total: this rank's part of the numerator.
        weight: this rank's part of the denominator.
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
        """Add to each named sum an amount, a scalar or of the sum's length."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)

    def compute(self) -> dict[str, Tensor]:
        """Return the sums."""
        return {name: getattr(self, name) for name in self.names}


def ratio(part: Tensor, whole: Tensor) -> float:
    """Return part / whole as a plain number; NaN for 0 / 0."""
    return (part.double() / whole.double()).item()


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float32, or in its own type if that is wider."""
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
