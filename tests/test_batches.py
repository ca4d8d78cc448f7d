"""Batches: each crystal once, equal work, independent of the number of ranks."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest

from crysdistill.errors import InputError
from crysdistill.training.batches import Batches, share


def sizes(count: int, seed: int = 0) -> np.ndarray:
    """Numbers of edges, spread as in the Materials Project."""
    rng = np.random.default_rng(seed)
    return np.minimum(12 * np.exp(rng.normal(3.0, 1.0, count)).astype(int) + 12, 8000)


def batches(made: Batches, epoch: int = 0) -> list[list[int]]:
    order, starts = made.epoch(epoch)
    return [order[a:b].tolist() for a, b in pairwise(starts)]


def plain_dealing(edges: list[int], bins: int) -> list[int]:
    """Give the largest first to the emptiest bin: the slow way, for comparison."""
    load, where = [0] * bins, []
    for size in edges:
        where.append(min(range(bins), key=lambda b: (load[b], b)))
        load[where[-1]] += size
    return where


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("budget", [None, 8000, 20_000, 10**9])
def test_every_crystal_once_in_as_many_batches_as_told(shuffle, budget):
    made = Batches(sizes(700), 64, budget, shuffle, seed=3)
    for epoch in range(3):
        found = batches(made, epoch)
        assert len(found) == len(made)
        assert sorted(itertools.chain(*found)) == list(range(700))
        assert all(found)
        if budget:
            assert max(made.edges[part].sum() for part in found) <= budget


def test_batches_by_edges_are_full_and_alike():
    made = Batches(sizes(5000), 64, 50_000, shuffle=True)
    loads = [int(made.edges[part].sum()) for part in batches(made)]
    assert loads == made.loads.tolist()
    assert min(loads) > 0.98 * max(loads)
    assert np.mean(loads) > 0.98 * 50_000
    # No packing can use fewer batches than edges / budget.
    assert len(made) <= 1.02 * made.edges.sum() / 50_000 + 1
    # With a fixed number of crystals, the heaviest batch is far from the mean.
    loads = Batches(sizes(5000), 64, shuffle=True).loads
    assert loads.mean() < 0.8 * loads.max()


def test_epochs_differ_and_repeat():
    one, again = (Batches(sizes(300), 64, 9000, True, seed=1) for _ in range(2))
    other = Batches(sizes(300), 64, 9000, True, seed=2)
    assert batches(one, 5) == batches(again, 5)
    different = [batches(one, 5), batches(one, 6), batches(other, 5)]
    assert len({str(b) for b in different}) == 3
    # Batches are drawn anew, not only reordered.
    together = [{frozenset(part) for part in found} for found in different]
    assert len(together[0] & together[1]) < len(together[0]) // 2


def test_the_heaviest_batch():
    made = Batches(sizes(200), 16, shuffle=True, seed=4)
    every = [part for epoch in range(7) for part in batches(made, epoch)]
    most = max(made.edges[part].sum() for part in every)
    assert made.edges[made.heaviest(7)].sum() == most
    assert made.edges[made.heaviest(1)].sum() <= most
    by_edges = Batches(sizes(200), 16, 9000, shuffle=True)
    assert by_edges.edges[by_edges.heaviest(100)].sum() == by_edges.loads.max()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_a_batch_evenly_and_without_gaps(ranks):
    edges = sizes(64)
    taken = share(edges, ranks)
    order = np.argsort(-edges, kind="stable")
    assert taken[order].tolist() == plain_dealing(edges[order].tolist(), ranks)
    loads = np.bincount(taken, weights=edges, minlength=ranks)
    assert loads.max() - loads.min() <= edges.max()
    assert (share(edges[:1], ranks) == 0).all()  # the other ranks get none


def test_imbalance_is_that_of_the_busiest_rank():
    assert Batches(sizes(640), 64, shuffle=True).imbalance(1) == 0
    assert Batches(np.full(640, 7), 64, shuffle=True).imbalance(4) == 0
    # 64 ranks for 64 crystals: the largest crystal over the mean
    made = Batches(sizes(64), 64)
    expected = made.edges.max() / made.edges.mean() - 1
    assert made.imbalance(64) == pytest.approx(expected)
    assert Batches(sizes(640), 64, shuffle=True).imbalance(4) < 0.05


def test_a_budget_below_the_largest_crystal():
    message = (
        r"`trainer.edge_budget` is 100 but the largest crystal has 8,000 edges; give "
        r"at least that, or build the store with `--max-atoms`"
    )
    edges = np.array([10, 8000, 30])
    with pytest.raises(InputError, match=message):
        Batches(edges, 64, 100)
    assert len(Batches(edges, 64, 8000, shuffle=True)) == 2


def test_nothing_to_batch():
    for budget in (None, 10):
        for shuffle in (False, True):
            made = Batches(np.zeros(0, int), 4, budget, shuffle)
            assert len(made) == len(batches(made))
            assert len(made.heaviest()) == 0


def test_dealing_ten_thousand_is_as_the_slow_way():
    edges = np.sort(sizes(3000))[::-1]
    made = Batches(edges, 64, 40_000, shuffle=True)
    expected = np.bincount(
        plain_dealing(edges.tolist(), len(made)), weights=edges, minlength=len(made)
    )
    assert sorted(made.loads) == sorted(expected)
