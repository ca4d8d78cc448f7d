"""Batches of a store, in an order that depends only on the seed and the epoch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.store.store import Store
from crysdistill.training.batches import Batches, share

AHEAD = 2
"""Batches that are prepared for a device while it is busy."""

ROOM = 0.4
"""The share of a device's free memory that a store may take up."""


class BatchLoader:
    """Yields batches; Lightning accepts it as a DataLoader.

    A batch is one compiled gather from mapped memory. That is faster than the queue of
    a worker process, so there are no workers. If the store fits into a device's memory,
    it is copied there and batches are gathered there. Otherwise a thread gathers
    batches ahead into pinned memory. Each rank yields its part of every batch, which
    may be empty.

    Args:
        store: the store with the crystals.
        rows: the rows to use.
        batch_size: crystals in a batch of all ranks together.
        targets: properties to put into `batch.targets`.
        shuffle: whether to draw a new order for each epoch.
        seed: of the order.
        edge_budget: the most edges in a batch of all ranks together; it replaces
            `batch_size`.

    Attributes:
        batches: assigns crystals to batches.
        seconds_waited: how long the loop has waited for batches.

    Raises:
        InputError: see `Batches`.
    """

    def __init__(
        self,
        store: Store,
        rows: np.ndarray,
        batch_size: int,
        targets: Sequence[str] = (),
        shuffle: bool = False,
        seed: int = 0,
        edge_budget: int | None = None,
    ) -> None:
        self.store = store
        self.rows = np.asarray(rows)
        self.targets = tuple(targets)
        offsets = store.edge_offsets
        edges = offsets[self.rows + 1] - offsets[self.rows]
        self.batches = Batches(edges, batch_size, edge_budget, shuffle, seed)
        self.seconds_waited = 0.0
        self._rank, self._ranks = 0, 1
        self._near = store  # the store, or its copy on a device
        self._device = torch.device("cpu")
        self._next = (0, 0)  # epoch, and the number of its batches to skip

    def __len__(self) -> int:
        return len(self.batches)

    def divide(self, rank: int, ranks: int) -> None:
        """From now on, yield one rank's part of every batch."""
        self._rank, self._ranks = rank, ranks

    def place(self, device: torch.device, near: Store | None) -> None:
        """From now on, yield batches on a device.

        Args:
            device: where batches go.
            near: the copy of the store there, if it fits.
        """
        self._device = device
        self._near = near or self.store

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows in the order of an epoch."""
        return self.rows[self.batches.epoch(epoch)[0]]

    def go_to(self, epoch: int, batches: int) -> None:
        """Let the next pass start in an epoch, after the given number of batches."""
        self._next = (epoch, batches)

    def heaviest(self, epochs: int) -> tuple[CrystalBatch, int, int]:
        """Return the batch with the most edges.

        Args:
            epochs: the epochs of the run, which are searched.

        Returns:
            This rank's part of it, and its crystals and edges on all ranks.
        """
        chosen = self.batches.heaviest(epochs)
        edges = int(self.batches.edges[chosen].sum())
        return self._batch(chosen).to(self._device), len(chosen), edges

    def few(self) -> CrystalBatch:
        """Return a batch of two crystals, the same on all ranks."""
        batch = self._near.batch(self.rows[:2], self.targets)
        batch.crystals_of_all = batch.num_graphs
        return batch.to(self._device)

    def __iter__(self) -> Iterator[CrystalBatch]:
        epoch, first = self._next
        # The next pass is the next epoch, even if this one is not finished.
        self._next = (epoch + 1, 0)
        begun = time.perf_counter()
        order, starts = self.batches.epoch(epoch)
        self.seconds_waited += time.perf_counter() - begun
        parts = (
            order[starts[number] : starts[number + 1]]
            for number in range(first, len(self))
        )
        near = self._near is not self.store or self._device.type == "cpu"
        source = map(self._batch, parts) if near else self._ahead(parts)
        while True:
            begun = time.perf_counter()
            batch = next(source, None)
            self.seconds_waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def _batch(self, chosen: np.ndarray) -> CrystalBatch:
        """Gather this rank's part of a batch."""
        mine = chosen
        if self._ranks > 1:
            taken = share(self.batches.edges[chosen], self._ranks)
            mine = chosen[taken == self._rank]
        batch = self._near.batch(self.rows[mine], self.targets)
        batch.crystals_of_all = len(chosen)
        return batch

    def _ahead(self, parts: Iterator[np.ndarray]) -> Iterator[CrystalBatch]:
        """Gather batches in a thread, into pinned memory for copies without waiting."""
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Future[CrystalBatch]] = deque()
            for part in parts:
                waiting.append(pool.submit(self._pinned, part))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result().to(self._device, non_blocking=True)
            while waiting:
                yield waiting.popleft().result().to(self._device, non_blocking=True)

    def _pinned(self, part: np.ndarray) -> CrystalBatch:
        batch = self._batch(part)
        return batch.pin_memory() if torch.cuda.is_available() else batch


def place(loaders: Sequence[BatchLoader], device: torch.device) -> bool:
    """Let loaders yield batches on a device; copy their stores there if they fit.

    Returns:
        Whether batches are gathered on the device.
    """
    stores = {id(loader.store): loader.store for loader in loaders}
    fits = device.type != "cpu" and (
        sum(store.nbytes for store in stores.values()) < ROOM * free_memory(device)
    )
    near = {key: store.to(device) for key, store in stores.items()} if fits else {}
    for loader in loaders:
        loader.place(device, near.get(id(loader.store)))
    return fits


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a GPU; 0 for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0
