"""The batch: geometry, verbs, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crysdistill.errors import BadStructure
from crysdistill.graphs import batch as graphs
from crysdistill.graphs.batch import GraphSettings, make_batch
from crysdistill.graphs.neighbors import find_neighbors
from crysdistill.structures.crystal import Crystal
from tests.conftest import random_crystal


def test_distances_equal_those_of_the_search(crystals):
    settings = GraphSettings()
    batch = make_batch(crystals, settings)
    found = [find_neighbors(c.frac_coords, c.cell, settings) for c in crystals]
    expected = np.concatenate([g.distances for g in found])
    np.testing.assert_allclose(graphs.distances(batch), expected, atol=2e-6)
    vectors = graphs.edge_vectors(batch)
    np.testing.assert_allclose(vectors.norm(dim=1), expected, atol=2e-6)


def test_layout(crystals):
    batch = make_batch(crystals)
    centre = batch.edge_index[1]
    assert (centre.diff() >= 0).all()
    counts = torch.bincount(centre, minlength=batch.num_nodes)
    assert torch.equal(batch.neighbor_ptr.diff(), counts)
    # No edge leaves its crystal.
    assert torch.equal(batch.batch[batch.edge_index[0]], batch.batch[centre])
    assert batch.num_graphs == len(crystals)
    assert batch.material_ids[0] == "fcc-Cu"


def test_published_padding_points_at_atom_0_of_the_crystal():
    sparse = Crystal(
        "sparse", np.array([11, 17], np.uint8), np.array([[0, 0, 0], [0.4, 0, 0]]),
        np.diag([7.0, 9.0, 9.0]),
    )  # fmt: skip
    batch = make_batch([random_crystal(0), sparse], GraphSettings(mode="cgcnn"))
    first = int(batch.ptr[1])
    assert batch.neighbor_ptr.diff().tolist() == [12] * batch.num_nodes
    fake = batch.padding.nonzero().squeeze(1)
    assert len(fake) > 0
    assert (batch.edge_index[0, fake] == first).all()
    assert (graphs.distances(batch)[fake] == 9.0).all()
    real = ~batch.padding
    assert (graphs.distances(batch)[real] <= 8.0).all()


def test_replace_leaves_the_original_alone(crystals):
    batch = make_batch(crystals)
    other = graphs.replace(batch, atomic_numbers=torch.zeros_like(batch.atomic_numbers))
    assert other.atomic_numbers.sum() == 0
    assert batch.atomic_numbers.sum() > 0
    assert other.edge_index is batch.edge_index


def test_make_batch_names_the_material():
    lonely = Crystal("He-1", np.array([2], np.uint8), np.zeros((1, 3)), np.eye(3) * 30)
    with pytest.raises(
        BadStructure, match=r"He-1: no neighbour within 8\.0 Å of atom 0"
    ):
        make_batch([lonely])
