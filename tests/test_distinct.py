"""Distinct edges, and atoms with equal first vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, distances, make_batch
from crysdistill.graphs.batch import replace as with_tensors
from crysdistill.layers.atoms import AtomEmbedding
from crysdistill.layers.distinct import distinct_distances, distinct_edges
from crysdistill.structures.elements import onehot
from tests.conftest import crystal, random_crystal

RADIUS = GraphSettings(5.0, mode="radius")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_come_back(dtype):
    batch = make_batch([random_crystal(seed, 4) for seed in range(4)], RADIUS)
    batch = with_tensors(
        batch, frac_coords=batch.frac_coords.to(dtype), cell=batch.cell.to(dtype)
    )
    found = distinct_distances(batch)
    assert found.distances.dtype == dtype
    # Half a step, plus rounding in float32.
    tolerance = 1.6e-6 if dtype == torch.float32 else 6e-11
    torch.testing.assert_close(
        found.distances[found.place], distances(batch), rtol=0, atol=tolerance
    )
    # Both directions of an edge share a distance.
    assert len(found.distances) <= 0.6 * batch.num_edges


def test_shells_are_few():
    sodium = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    sites = [*sodium, *(sodium + np.array([0.5, 0, 0]))]
    salt = crystal("NaCl", 5.64 * np.eye(3), ["Na"] * 4 + ["Cl"] * 4, sites)
    batch = make_batch([salt] * 2, RADIUS)
    shells = 5.64 / 2 * torch.tensor([1, 2, 3]).sqrt()
    found = distinct_distances(batch)
    torch.testing.assert_close(
        torch.unique(found.distances.round(decimals=4)), shells, rtol=0, atol=1e-4
    )
    # Na-Cl and Cl-Na in the first and third shell, Na-Na and Cl-Cl in the second.
    edges = distinct_edges(batch, batch.atomic_numbers)
    per_shell = len(edges.distances) / len(found.distances)
    assert per_shell == pytest.approx(2, abs=0.5)


def test_distinct_edges_have_equal_ends_and_lengths():
    batch = make_batch([random_crystal(seed, 5) for seed in range(4)], RADIUS)
    kinds = batch.atomic_numbers
    found = distinct_edges(batch, kinds)
    ends = kinds[batch.edge_index]
    assert torch.equal(ends[:, found.example][:, found.place], ends)
    torch.testing.assert_close(
        found.distances[found.place], distances(batch), rtol=0, atol=1.6e-6
    )
    assert torch.equal(found.place[found.example], torch.arange(len(found.distances)))
    assert len(found.distances) >= len(distinct_distances(batch).distances)
    # The direction counts: O -> Si is not Si -> O.
    pairs = {*zip(*ends[:, found.example].tolist(), strict=True)}
    assert {(8, 14), (14, 8)} <= pairs


def test_lengths_do_not_depend_on_the_company():
    crystals = [random_crystal(seed, 4) for seed in range(4)]
    alone = make_batch(crystals[:1], RADIUS)
    whole = make_batch(crystals, RADIUS)
    one, all_ = distinct_distances(alone), distinct_distances(whole)
    assert torch.equal(
        one.distances[one.place], all_.distances[all_.place][: alone.num_edges]
    )


def test_every_edge_is_its_own_where_derivatives_are_asked_for():
    batch = make_batch([random_crystal(0, 4)], RADIUS)
    batch = with_tensors(batch, frac_coords=batch.frac_coords.requires_grad_())
    for found in (
        distinct_distances(batch),
        distinct_edges(batch, batch.atomic_numbers),
    ):
        assert found.distances.requires_grad
        assert torch.equal(found.place, torch.arange(batch.num_edges))


def test_no_edges():
    batch = make_batch([random_crystal(0, 4)], RADIUS)
    batch = with_tensors(
        batch, edge_index=batch.edge_index[:, :0], edge_shift=batch.edge_shift[:0]
    )
    assert len(distinct_distances(batch).distances) == 0
    assert len(distinct_edges(batch, batch.atomic_numbers).example) == 0


# ---------------------------------------------------------------- the first vectors


@pytest.mark.parametrize("bias", [True, False])
def test_atoms_are_embedded_by_element_and_degree(bias):
    batch = make_batch([random_crystal(seed, 5) for seed in range(3)], RADIUS)
    embedding = AtomEmbedding(7, degrees=34, bias=bias)
    assert embedding.linear.in_features == 134
    rows = torch.from_numpy(onehot()[:, 1:])[batch.atomic_numbers]
    degree = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes)
    assert degree.min() < 33 < degree.max()
    degree = (degree + 1).clamp(max=33)
    rows = torch.cat((rows, F.one_hot(degree, 34)), dim=1)
    torch.testing.assert_close(embedding(batch), embedding.linear(rows))
    kinds = embedding.kinds(batch)
    assert len(torch.unique(kinds)) == len(torch.unique(rows, dim=0))


def test_a_masked_atom_has_the_bias():
    batch = make_batch([random_crystal(0, 4)], RADIUS)
    masked = with_tensors(
        batch, atomic_numbers=torch.tensor([0, *batch.atomic_numbers[1:].tolist()])
    )
    for table, columns in (("onehot", 100), ("cgcnn92", 90)):
        embedding = AtomEmbedding(7, table)
        # Two of the 92 bins hold no element.
        assert embedding.linear.in_features == columns
        torch.testing.assert_close(embedding(masked)[0], embedding.linear.bias)
        assert torch.equal(embedding.kinds(batch), batch.atomic_numbers)


def test_absent_elements_look_masked():
    batch = make_batch([random_crystal(0, 4, elements=(8,))], RADIUS)
    embedding = AtomEmbedding(7, absent=(8, 88))
    assert embedding.linear.in_features == 98
    torch.testing.assert_close(
        embedding(batch), embedding.linear.bias.expand(batch.num_nodes, -1)
    )


def test_unknown_element_table():
    with pytest.raises(InputError, match=r"`elements` is 'cgcnn' .*mean `cgcnn92`\?"):
        AtomEmbedding(4, "cgcnn")
