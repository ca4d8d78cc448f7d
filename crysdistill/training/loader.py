"""Batches of a store in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from crysdistill.corpus.store import Store
from crysdistill.errors import InputError
from crysdistill.graphs import CrystalBatch


class BatchLoader:
    """Yields batches; Lightning takes it where it takes a DataLoader.

    A batch is one vectorised gather from mapped memory, faster than the queue that a
    worker process would send it through, so there are no workers. The position is
    part of a checkpoint: a resumed run sees the batches that it has not yet seen.

    Args:
        store: where the crystals are.
        rows: which of them.
        batch_size: crystals in a batch.
        targets: properties to put into `batch.targets`.
        shuffle: whether to draw a new order for each epoch.
        seed: of the order.

    Raises:
        InputError: the batch size is not positive.
    """

    def __init__(
        self,
        store: Store,
        rows: np.ndarray,
        batch_size: int,
        targets: Sequence[str] = (),
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size} but must be at least 1")
        self.store = store
        self.rows = rows
        self.batch_size = batch_size
        self.targets = tuple(targets)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        if self.shuffle:
            # Batch norm cannot use a batch of one: a last one of that size is joined
            # to the batch before it.
            return max(1, -(-(len(self.rows) - 1) // self.batch_size))
        return -(-len(self.rows) // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows in the order of an epoch."""
        if not self.shuffle:
            return self.rows
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)

    def __iter__(self) -> Iterator[CrystalBatch]:
        if self._resumed:
            self._resumed = False
        else:
            self._position = 0
        order = self.order(self.epoch)
        while self._position < len(self):
            start = self._position * self.batch_size
            last = self._position == len(self) - 1
            chosen = order[start:] if last else order[start : start + self.batch_size]
            self._position += 1
            yield self.store.batch(chosen, self.targets)
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands; Lightning puts it into checkpoints."""
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stands."""
        self.epoch, self._position = state["epoch"], state["position"]
        self._resumed = self._position < len(self)
        if not self._resumed:  # the epoch was complete
            self.epoch += 1
            self._position = 0
