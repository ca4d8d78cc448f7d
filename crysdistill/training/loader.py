"""Batches of a store in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from crysdistill.corpus.store import Store
from crysdistill.errors import InputError
from crysdistill.graphs import CrystalBatch


class BatchLoader:
    """Yields batches; Lightning takes it where it takes a DataLoader.

    A batch is one vectorised gather from mapped memory, faster than the queue that a
    worker process would send it through, so there are no workers. The order follows
    from the seed and the epoch, so that a resumed run can go on in the middle of one.

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
        self._next = (0, 0)  # epoch, and batches of it that were seen before

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
        epoch, first = self._next
        # Whoever iterates may stop before the end: the next pass is the next epoch.
        self._next = (epoch + 1, 0)
        order = self.order(epoch)
        for position in range(first, len(self)):
            start = position * self.batch_size
            last = position == len(self) - 1
            chosen = order[start:] if last else order[start : start + self.batch_size]
            yield self.store.batch(chosen, self.targets)

    def go_to(self, epoch: int, batches: int) -> None:
        """Begin the next pass in an epoch, after so many of its batches."""
        self._next = (epoch, batches)
