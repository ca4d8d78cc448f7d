"""Triplets against textbook angles and a search over all pairs of edges."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from crysdistill.graphs.batch import (
    CrystalBatch,
    GraphSettings,
    distances,
    edge_vectors,
    make_batch,
    replace,
)
from crysdistill.graphs.triplets import (
    add_reverse_edges,
    distinct_angles,
    find_triplets,
    sum_over_triplets,
)
from tests.conftest import random_crystal


def some_batch(**settings) -> CrystalBatch:
    crystals = [random_crystal(seed, atoms) for seed, atoms in ((0, 3), (1, 1), (2, 4))]
    return make_batch(crystals, GraphSettings(**settings))


def doubled(batch: CrystalBatch) -> CrystalBatch:
    return replace(
        batch, frac_coords=batch.frac_coords.double(), cell=batch.cell.double()
    )


# ------------------------------------------------------------------------ known angles


@pytest.mark.parametrize(
    ("name", "neighbours", "cosines"),
    [
        ("fcc-Cu", 12, {1.0: 1, 0.5: 4, 0.0: 2, -0.5: 4, -1.0: 1}),
        ("bcc-Fe", 8, {1.0: 1, 1 / 3: 3, -1 / 3: 3, -1.0: 1}),
        ("NaCl", 6, {1.0: 1, 0.0: 4, -1.0: 1}),
        ("CsCl", 8, {1.0: 1, 1 / 3: 3, -1 / 3: 3, -1.0: 1}),
        ("diamond", 4, {1.0: 1, -1 / 3: 3}),
    ],
)
def test_angles_of_structure_types(crystals, name, neighbours, cosines):
    crystal = {c.material_id: c for c in crystals}[name]
    batch = make_batch([crystal], GraphSettings(max_neighbors=neighbours))
    triplets = find_triplets(batch)
    assert batch.num_edges == neighbours * batch.num_nodes
    assert len(triplets.first) == neighbours * batch.num_edges
    found = triplets.cosine.view(batch.num_edges, neighbours).sort(dim=1).values
    expected = sorted(c for c, times in cosines.items() for _ in range(times))
    np.testing.assert_allclose(found, np.tile(expected, (len(found), 1)), atol=2e-6)


# -------------------------------------------------------------- a second implementation


def search(batch: CrystalBatch) -> dict[tuple[int, int], float]:
    """Every pair of edges (k -> j, j -> i), and its angle from three positions."""
    cells = batch.cell.double().numpy()
    positions = [
        frac @ cells[b]
        for frac, b in zip(
            batch.frac_coords.double().numpy(), batch.batch.tolist(), strict=True
        )
    ]
    edges = batch.edge_index.T.tolist()
    shifts = batch.edge_shift.double().numpy()
    found = {}
    for first, (k, j) in enumerate(edges):
        for second, (source, i) in enumerate(edges):
            if source != j:
                continue
            cell = cells[int(batch.batch[i])]
            at_i = positions[i]
            at_j = positions[j] + shifts[second] @ cell
            at_k = positions[k] + (shifts[first] + shifts[second]) @ cell
            a, b = at_k - at_j, at_i - at_j
            found[first, second] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"max_neighbors": 5},
        {"mode": "nearest", "max_neighbors": 3},
        {"mode": "radius", "cutoff": 4.5},
    ],
)
def test_equals_a_search_over_all_pairs(settings):
    batch = some_batch(**settings)
    triplets, expected = find_triplets(batch), search(batch)
    pairs = list(zip(triplets.first.tolist(), triplets.second.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == set(expected)
    np.testing.assert_allclose(
        triplets.cosine, [expected[pair] for pair in pairs], atol=3e-6
    )
    degree = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes)
    assert len(pairs) == degree[batch.edge_index[0]].sum()
    assert (triplets.second.diff() >= 0).all()
    counts = torch.bincount(triplets.second, minlength=batch.num_edges)
    assert torch.equal(triplets.ptr.diff(), counts)


def test_sum_equals_a_loop():
    triplets = find_triplets(some_batch(max_neighbors=4))
    messages = torch.randn(len(triplets.first), 3)
    ends = zip(triplets.ptr, triplets.ptr[1:], strict=False)
    expected = torch.stack([messages[start:end].sum(0) for start, end in ends])
    torch.testing.assert_close(sum_over_triplets(messages, triplets), expected)


# --------------------------------------------------------------------------- edge cases


def test_cosines_are_differentiable():
    batch = doubled(make_batch([random_crystal(3, 3)], GraphSettings(max_neighbors=3)))

    def cosines(frac_coords, cell):
        return find_triplets(replace(batch, frac_coords=frac_coords, cell=cell)).cosine

    arguments = (batch.frac_coords.requires_grad_(), batch.cell.requires_grad_())
    assert torch.autograd.gradcheck(cosines, arguments, atol=1e-6)


def test_cosines_stay_between_minus_one_and_one(crystals):
    cosine = find_triplets(make_batch(crystals)).cosine
    assert cosine.max() == 1.0
    assert cosine.min() == -1.0


def test_atoms_that_hear_nobody_and_edges_without_length():
    batch = some_batch(max_neighbors=3)
    lonely = replace(
        batch,
        edge_index=torch.tensor([[0, 1, 1], [0, 0, 2]]),
        edge_shift=torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]]),
        neighbor_ptr=torch.tensor([0, 2, 2, 3, 3, 3, 3, 3, 3]),
    )
    triplets = find_triplets(lonely)
    # Both edges into atom 0 form triplets with its edge to itself; atom 1 has none.
    assert triplets.first.tolist() == [0, 1]
    assert triplets.second.tolist() == [0, 0]
    assert triplets.ptr.tolist() == [0, 2, 2, 2]
    assert triplets.cosine.tolist() == [0.0, 0.0]


def test_no_crystals():
    batch = some_batch(max_neighbors=3)
    empty = replace(
        batch,
        atomic_numbers=batch.atomic_numbers[:0],
        frac_coords=batch.frac_coords[:0],
        cell=batch.cell[:0],
        edge_index=batch.edge_index[:, :0],
        edge_shift=batch.edge_shift[:0],
        batch=batch.batch[:0],
        ptr=batch.ptr[:1],
        neighbor_ptr=batch.neighbor_ptr[:1],
        num_nodes=0,
    )
    triplets = find_triplets(empty)
    assert len(triplets.first) == len(triplets.second) == len(triplets.cosine) == 0
    assert triplets.ptr.tolist() == [0]
    whole, place = add_reverse_edges(empty)
    assert whole.num_edges == len(place) == 0
    assert whole.neighbor_ptr.tolist() == [0]


# ----------------------------------------------------------------------- equal angles


def test_fcc_has_five_angles(crystals):
    triplets = find_triplets(make_batch(crystals[:1]))
    angles = distinct_angles(triplets)
    torch.testing.assert_close(
        angles.cosine, torch.tensor([-1, -0.5, 0, 0.5, 1]), atol=2e-6, rtol=0
    )
    assert angles.counts.tolist() == [48, 192, 96, 192, 48]
    assert torch.equal(torch.bincount(angles.place), angles.counts)


def test_distinct_angles_are_the_angles():
    triplets = find_triplets(some_batch())
    angles = distinct_angles(triplets)
    # A triplet and its mirror image are alike.
    assert len(angles.cosine) < 0.6 * len(triplets.cosine)
    torch.testing.assert_close(
        angles.cosine[angles.place], triplets.cosine, atol=6e-7, rtol=0
    )
    exact = find_triplets(doubled(some_batch()))
    angles = distinct_angles(exact)
    torch.testing.assert_close(
        angles.cosine[angles.place], exact.cosine, atol=6e-11, rtol=0
    )


def test_angles_to_be_differentiated_keep_a_row_each():
    batch = doubled(some_batch(max_neighbors=3))
    triplets = find_triplets(replace(batch, cell=batch.cell.requires_grad_()))
    angles = distinct_angles(triplets)
    assert angles.cosine is triplets.cosine
    assert torch.equal(angles.place, torch.arange(len(triplets.cosine)))
    assert (angles.counts == 1).all()


# ---------------------------------------------------------------------- both directions


def edges_of(batch: CrystalBatch) -> Counter:
    """Every edge as (neighbour, centre, lattice translation)."""
    rows = torch.cat((batch.edge_index, batch.edge_shift.T.long())).T.tolist()
    return Counter(map(tuple, rows))


@pytest.mark.parametrize("mode", ["shells", "nearest"])
def test_reverse_edges_are_added_where_they_are_missing(mode):
    batch = some_batch(mode=mode, max_neighbors=5)
    whole, place = add_reverse_edges(batch)
    before, after = edges_of(batch), edges_of(whole)
    reverse = {(i, j, -a, -b, -c) for j, i, a, b, c in before}
    assert set(after) == set(before) | reverse
    assert set(after.values()) == {1}
    assert whole.num_edges > batch.num_edges
    # `place` gives the rows of the original edges.
    assert torch.equal(whole.edge_index[:, place], batch.edge_index)
    assert torch.equal(whole.edge_shift[place], batch.edge_shift)
    torch.testing.assert_close(distances(whole)[place], distances(batch))
    # All data of the edges agree.
    centre = whole.edge_index[1]
    assert (centre.diff() >= 0).all()
    counts = torch.bincount(centre, minlength=whole.num_nodes)
    assert torch.equal(whole.neighbor_ptr.diff(), counts)
    assert edge_vectors(whole).sum(0).abs().max() < 1e-4  # opposite edges cancel


def test_a_graph_of_a_radius_has_both_directions():
    batch = some_batch(mode="radius", cutoff=4.5)
    whole, _ = add_reverse_edges(batch)
    assert edges_of(whole) == edges_of(batch)
