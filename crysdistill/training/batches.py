"""Which crystals make a batch, and which of them each rank takes.

A batch is shared by all ranks. Its crystals depend only on the seed and the epoch, so
any number of ranks sees the same batches in the same order.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np

from crysdistill.errors import InputError
from crysdistill.machine_code import machine_code

_A_MOMENT = 20_000_000
"""Crystals that can be dealt to batches within a second or two."""


class Batches:
    """The batches of every epoch, by number of crystals or by number of edges.

    By number, an epoch is a random order that is cut into pieces. By edges, crystals
    are dealt to batches, the largest first, each to the batch with the fewest edges so
    far. Batches then differ by about the smallest crystals, each has its share of large
    ones, and their number is the same in every epoch. Crystals with equally many edges
    are dealt in random order, and batches come in random order.

    Source: the dealing, R. L. Graham, SIAM J. Appl. Math. 17, 416 (1969),
    doi:10.1137/0117039.

    Args:
        edges: (R,) the number of edges of each crystal.
        batch_size: crystals in a batch; not used with `edge_budget`.
        edge_budget: the most edges in a batch.
        shuffle: whether each epoch has a new order. Without it crystals keep their
            order, and batches by edges are filled one after the other.
        seed: of the order.

    Raises:
        InputError: a size is not positive, or a crystal does not fit into the budget.
    """

    def __init__(
        self,
        edges: np.ndarray,
        batch_size: int,
        edge_budget: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size} but must be at least 1")
        self.edges = np.ascontiguousarray(edges, np.int64)
        self.batch_size = batch_size
        self.edge_budget = edge_budget
        self.shuffle = shuffle
        self.seed = seed
        if edge_budget is not None and len(edges) and edge_budget < edges.max():
            raise InputError(
                f"`trainer.edge_budget` is {edge_budget:,} but the largest crystal has "
                f"{edges.max():,} edges; give at least that, or build the store with "
                "`--max-atoms`"
            )

    def __len__(self) -> int:
        if self.edge_budget is None:
            count = len(self.edges)
            # Batch norm needs two crystals: a last batch of one is joined to the batch
            # before it.
            left = count - 1 if self.shuffle else count
            return max(min(1, count), -(-left // self.batch_size))
        return self._fixed if self.shuffle else len(self._filled) - 1

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the crystals of an epoch, batch by batch, and where batches begin.

        Args:
            epoch: counted from 0.

        Returns:
            (R,) positions in `edges`, each once, and (batches + 1,) offsets.
        """
        rng = np.random.default_rng((self.seed, epoch))
        count = len(self.edges)
        if self.edge_budget is None:
            order = rng.permutation(count) if self.shuffle else np.arange(count)
            starts = np.minimum(np.arange(len(self) + 1) * self.batch_size, count)
            starts[-1] = count
            return order, starts
        if not self.shuffle:
            return np.arange(count), self._filled
        order = rng.permutation(count)
        order = order[np.argsort(-self.edges[order], kind="stable")]
        place = rng.permutation(self._fixed)
        batch = place[_deal(self.edges[order], self._fixed)]
        sizes = np.bincount(batch, minlength=self._fixed)
        starts = np.concatenate(([0], np.cumsum(sizes)))
        return order[np.argsort(batch, kind="stable")], starts

    @cached_property
    def _fixed(self) -> int:
        """The number of batches that dealing needs; the same for every random order.

        The edges of the batches depend only on the sizes, which are dealt in the same
        order every time.
        """
        budget = self.edge_budget or 1
        sizes = np.sort(self.edges)[::-1]
        number = -(-int(sizes.sum()) // budget)
        while len(sizes) and _loads(sizes, number).max() > budget:
            number += max(1, number // 200)
        return number

    @cached_property
    def _filled(self) -> np.ndarray:
        """The first crystal of each batch, when filled in order up to the budget."""
        return _fill(self.edges, self.edge_budget or 1)

    @cached_property
    def loads(self) -> np.ndarray:
        """(batches,) edges of each batch of the first epoch."""
        return self._loads_of(*self.epoch(0))

    def _loads_of(self, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
        total = np.concatenate(([0], np.cumsum(self.edges[order])))
        return np.diff(total[starts])

    def heaviest(self, epochs: int = 1) -> np.ndarray:
        """Return the crystals of the batch with the most edges.

        Args:
            epochs: how many epochs to search. With an edge budget the first is enough;
                for a very large corpus fewer are searched, to take only a moment.
        """
        if self.edge_budget is not None or not self.shuffle:
            epochs = 1
        epochs = max(1, min(epochs, _A_MOMENT // max(1, len(self.edges))))
        best, most = np.zeros(0, np.int64), -1
        for epoch in range(epochs):
            order, starts = self.epoch(epoch)
            loads = self._loads_of(order, starts)
            if len(loads) and loads.max() > most:
                number = int(loads.argmax())
                best, most = order[starts[number] : starts[number + 1]], loads[number]
        return best

    def imbalance(self, ranks: int) -> float:
        """Return how much more work the busiest rank has than the average one.

        The mean over batches of (most edges of a rank / mean of all ranks), less 1.
        """
        if ranks == 1:
            return 0.0
        order, starts = self.epoch(0)
        shares = []
        for first, end in pairwise(starts):
            sizes = self.edges[order[first:end]]
            total = np.bincount(share(sizes, ranks), weights=sizes, minlength=ranks)
            shares.append(total.max() / max(total.mean(), 1.0))
        return float(np.mean(shares)) - 1.0 if shares else 0.0


def share(edges: np.ndarray, ranks: int) -> np.ndarray:
    """Return the rank that takes each crystal of a batch, (B,), for equal work.

    Crystals are dealt largest first, each to the rank with the fewest edges so far.
    With fewer crystals than ranks, some ranks take none.
    """
    if ranks == 1:
        return np.zeros(len(edges), np.int64)
    order = np.argsort(-edges, kind="stable")
    taken = np.empty(len(edges), np.int64)
    taken[order] = _deal(edges[order], ranks)
    return taken


@machine_code
def _deal(sizes: np.ndarray, bins: int) -> np.ndarray:
    """Deal sizes, largest first, each to the emptiest bin; return their bins."""
    # A heap of (load, number): dealing millions takes only a moment.
    load = np.zeros(bins, np.int64)
    number = np.arange(bins)
    dealt = np.empty(len(sizes), np.int64)
    for item, size in enumerate(sizes):
        dealt[item] = number[0]
        heavy, name, at = load[0] + size, number[0], 0
        while True:
            child = 2 * at + 1
            if child >= bins:
                break
            other = child + 1
            if other < bins and (
                load[other] < load[child]
                or (load[other] == load[child] and number[other] < number[child])
            ):
                child = other
            if load[child] > heavy or (load[child] == heavy and number[child] > name):
                break
            load[at], number[at] = load[child], number[child]
            at = child
        load[at], number[at] = heavy, name
    return dealt


def _loads(sizes: np.ndarray, bins: int) -> np.ndarray:
    dealt = _deal(sizes, bins)
    return np.bincount(dealt, weights=sizes, minlength=bins)


@machine_code
def _fill(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Fill bins in order up to the budget; return the first item of each."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    bins, held = 0, 0
    for item, size in enumerate(sizes):
        if item and held + size > budget:
            bins += 1
            starts[bins] = item
            held = 0
        held += size
    if len(sizes):
        bins += 1
    starts[bins] = len(sizes)
    return starts[: bins + 1]
