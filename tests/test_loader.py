"""Loaders: seed and epoch fix the order, and every crystal comes once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.store.store import Store
from crysdistill.training import loader as loaders
from crysdistill.training.loader import BatchLoader, place
from tests.toy_stores import labelled, open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(tmp_path_factory.mktemp("store") / "s.h5", labelled(30))


ROWS = np.array([*range(3, 25), 29])  # 23 crystals


def an_epoch(loader: BatchLoader) -> list[list[int]]:
    return [batch.rows.tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def shuffled(store: Store, size: int = 5, seed: int = 0, rows=ROWS) -> BatchLoader:
    return BatchLoader(store, rows, size, ["density"], shuffle=True, seed=seed)


def test_every_crystal_once_in_each_epoch(store):
    loader = shuffled(store)
    for _ in range(3):
        batches = an_epoch(loader)
        assert len(batches) == len(loader) == 5
        assert [len(b) for b in batches] == [5, 5, 5, 5, 3]
        assert Counter(flat(batches)) == Counter(ROWS.tolist())


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else(store):
    first, again, other = shuffled(store), shuffled(store), shuffled(store, seed=1)
    orders = [an_epoch(first) for _ in range(3)]
    torch.manual_seed(7)
    np.random.default_rng(7).random()
    assert [an_epoch(again) for _ in range(3)] == orders
    orders += [an_epoch(other) for _ in range(3)]
    assert len({str(order) for order in orders}) == 6


def test_the_order_does_not_depend_on_the_batch_size(store):
    small, large = shuffled(store, size=2), shuffled(store, size=11)
    assert flat(an_epoch(small)) == flat(an_epoch(large))


def test_without_shuffling_the_order_is_that_of_the_rows(store):
    loader = BatchLoader(store, ROWS, 6)
    for _ in range(2):
        assert flat(an_epoch(loader)) == ROWS.tolist()
    assert [len(b) for b in an_epoch(loader)] == [6, 6, 6, 5]


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (11, 5, [5, 6]),  # a last batch of one joins the batch before
        (12, 5, [5, 5, 2]),
        (10, 5, [5, 5]),
        (6, 5, [6]),
        (5, 5, [5]),
        (1, 5, [1]),
        (3, 1, [1, 2]),
        (2, 100, [2]),
    ],
)
def test_no_training_batch_of_one(store, count, size, sizes):
    loader = shuffled(store, size=size, rows=np.arange(count))
    assert [len(b) for b in an_epoch(loader)] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(("count", "sizes"), [(11, [5, 5, 1]), (10, [5, 5]), (0, [])])
def test_batches_of_one_stay_where_nothing_is_trained(store, count, sizes):
    loader = BatchLoader(store, np.arange(count), 5)
    assert [len(b) for b in an_epoch(loader)] == sizes
    assert len(loader) == len(sizes)


def test_go_to_the_middle_of_an_epoch(store):
    through = shuffled(store)
    epochs = [an_epoch(through) for _ in range(4)]
    jumping = shuffled(store)
    jumping.go_to(2, 3)
    assert an_epoch(jumping) == epochs[2][3:]
    assert an_epoch(jumping) == epochs[3]  # the next epoch is complete
    jumping.go_to(1, 0)
    assert an_epoch(jumping) == epochs[1]


def test_a_pass_that_is_given_up_counts_as_one(store):
    loader, through = shuffled(store), shuffled(store)
    epochs = [an_epoch(through) for _ in range(2)]
    for batch in loader:
        assert batch.rows.tolist() == epochs[0][0]
        break
    assert an_epoch(loader) == epochs[1]


def test_targets_belong_to_their_crystals(store):
    known = store.property("density")
    for batch in shuffled(store):
        expected = torch.from_numpy(known[batch.rows.numpy()]).float()
        assert torch.equal(batch.targets[:, 0], expected)


def test_the_batch_size_is_positive(store):
    with pytest.raises(InputError, match="`batch_size` is 0 but must be at least 1"):
        BatchLoader(store, ROWS, 0)


@pytest.mark.parametrize("budget", [None, 150])
def test_ranks_take_parts_of_the_same_batches(store, budget):
    def made() -> BatchLoader:
        return BatchLoader(store, ROWS, 5, (), True, edge_budget=budget)

    whole, ranks = an_epoch(made()), []
    for rank in range(3):
        loader = made()
        loader.divide(rank, 3)
        assert len(loader) == len(whole)
        ranks.append(an_epoch(loader))
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(flat(parts))
        # Each part keeps the order of the batch.
        assert all(part == [row for row in batch if row in part] for part in parts)


def test_a_rank_may_have_nothing_to_do(store):
    loader = BatchLoader(store, ROWS[:2], 5, ["density"])
    loader.divide(2, 3)
    (batch,) = loader
    assert (batch.num_graphs, batch.num_nodes, batch.num_edges) == (0, 0, 0)
    assert batch.targets.shape == (0, 1)
    assert batch.crystals_of_all == 2


def test_batches_made_ahead_are_the_same(store, monkeypatch):
    """Used when the store does not fit on the device."""
    ahead = shuffled(store)
    ahead._device = torch.device("meta")
    moved = []
    monkeypatch.setattr(
        CrystalBatch, "to", lambda self, device, **_: moved.append(device) or self
    )
    assert an_epoch(ahead) == an_epoch(shuffled(store))
    assert moved == [torch.device("meta")] * 5
    assert ahead.seconds_waited > 0


def test_an_error_in_the_thread_is_raised(store, monkeypatch):
    loader = shuffled(store)
    loader._device = torch.device("meta")

    def fail(self, rows, targets):
        raise RuntimeError("broken")

    monkeypatch.setattr(Store, "batch", fail)
    with pytest.raises(RuntimeError, match="broken"):
        next(iter(loader))


def test_a_store_goes_to_a_device_once_if_it_fits(store, monkeypatch):
    sent = []

    def to(self, device):
        sent.append(device)
        return self

    monkeypatch.setattr(Store, "to", to)
    device = torch.device("meta")
    for free, fits in ((store.nbytes * 3.0, True), (store.nbytes * 2.0, False)):
        monkeypatch.setattr(loaders, "free_memory", lambda _, free=free: free)
        assert place((shuffled(store), shuffled(store)), device) is fits
    assert sent == [device]
    assert not place((shuffled(store),), torch.device("cpu"))
