"""Pooling: set2set against published outputs and PyG; its invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_geometric.nn import Set2Set as OfPyG

from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    GraphSettings,
    gather_crystals,
    make_batch,
)
from crysdistill.graphs.batch import replace as with_tensors
from crysdistill.layers.pooling import (
    Pooling,
    Set2Set,
    edges_as_atoms,
    max_over_atoms,
)
from tests.conftest import random_crystal
from tests.reference_outputs import agree, load_reference


@pytest.fixture
def batch() -> CrystalBatch:
    return make_batch(
        [random_crystal(seed, atoms) for seed, atoms in enumerate((3, 1, 6))],
        GraphSettings(mode="radius", cutoff=5.0),
    )


def of_pyg(ours: Set2Set) -> OfPyG:
    theirs = OfPyG(ours.width // 2, ours.steps)
    state = {f"{name}_l0": value for name, value in ours.lstm.state_dict().items()}
    theirs.lstm.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_set2set_equals_that_of_pyg(batch, steps):
    torch.manual_seed(0)
    ours = Set2Set(4, steps)
    theirs = of_pyg(ours)
    x = torch.randn(10, 4, requires_grad=True)
    found, expected = ours(x, batch), theirs(x, batch.batch)
    assert found.shape == (3, ours.width) == (3, 8)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for mine, other in zip(
        torch.autograd.grad((found * weights).sum(), [x, *ours.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_set2set_over_edges(batch):
    torch.manual_seed(0)
    ours = Set2Set(4, 2)
    e = torch.randn(batch.num_edges, 4)
    owner = batch.batch[batch.edge_index[1]]
    edges = edges_as_atoms(batch)
    assert torch.equal(edges.batch, owner)
    assert torch.equal(edges.ptr.diff(), torch.bincount(owner))
    torch.testing.assert_close(ours(e, edges), of_pyg(ours)(e, owner))
    of_crystal = torch.arange(3.0).unsqueeze(1)
    assert torch.equal(gather_crystals(of_crystal, edges).squeeze(1), owner.float())
    assert batch.num_graphs == 3
    assert len(batch.batch) == 10  # the batch itself is unchanged


def test_set2set_of_the_published_deeper_gatgnn(shared_data):
    weights, _, outputs, batch = load_reference(
        shared_data, "DeeperGATGNN_set2set", receiver=0
    )
    pooling = Set2Set(16, 3)
    pooling.lstm.load_state_dict(
        {
            name.removeprefix("set2set.lstm.").removesuffix("_l0"): value
            for name, value in weights.items()
            if name.startswith("set2set.")
        }
    )
    atoms = outputs["atoms_after_block_1"] * outputs["global_attention"].view(-1, 1)
    with torch.no_grad():
        agree(pooling(atoms, batch), outputs["pooled"])


def twice(batch: CrystalBatch, x: Tensor) -> tuple[CrystalBatch, Tensor]:
    """Repeat every crystal's atoms in reverse order."""
    parts = x.split(batch.ptr.diff().tolist())
    x = torch.cat([torch.cat((part, part.flip(0))) for part in parts])
    owner = torch.arange(3).repeat_interleave(2 * batch.ptr.diff())
    doubled = with_tensors(batch, ptr=2 * batch.ptr, num_nodes=len(x))
    doubled.batch = owner
    return doubled, x


@pytest.mark.parametrize("kind", ["mean", "max", "set2set"])
def test_supercells_are_pooled_as_their_cells(batch, kind):
    torch.manual_seed(0)
    pooling = Pooling(kind, 4)
    x = torch.randn(10, 4)
    doubled, both = twice(batch, x)
    torch.testing.assert_close(pooling(both, doubled), pooling(x, batch))


def test_poolings_by_hand(batch):
    x = torch.tensor([[1.0], [-4.0], [0.0], [-7.0], *[[2.0]] * 5, [8.0]])
    for kind, expected in (
        ("mean", [-1.0, -7.0, 3.0]),
        ("max", [1.0, -7.0, 8.0]),
        ("sum", [-3.0, -7.0, 18.0]),
    ):
        pooling = Pooling(kind, 1)
        assert pooling.width == 1
        assert not list(pooling.parameters())
        assert pooling(x, batch).flatten().tolist() == expected
    assert Pooling("set2set", 1).width == 2


def test_the_largest_atom_alone_gets_the_derivative(batch):
    x = torch.arange(10.0).unsqueeze(1).requires_grad_()
    (slope,) = torch.autograd.grad(max_over_atoms(x, batch).sum(), x)
    assert slope.flatten().nonzero().flatten().tolist() == [2, 3, 9]


def test_no_crystals():
    empty = CrystalBatch(
        batch=torch.zeros(0, dtype=torch.int64), ptr=torch.zeros(1, dtype=torch.int64)
    )
    for kind, width in (("mean", 4), ("max", 4), ("sum", 4), ("set2set", 8)):
        assert Pooling(kind, 4)(torch.zeros(0, 4), empty).shape == (0, width)


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        ("men", {"width": 4}, r"`pooling` is 'men' but must be one of .*mean `mean`\?"),
        ("set2set", {"width": 0}, r"`width` is 0 but must be at least 1"),
        ("set2set", {"width": 4, "steps": 0}, r"`steps` is 0 but must be at least 1"),
    ],
)
def test_settings_out_of_range(kind, settings, text):
    with pytest.raises(InputError, match=text):
        Pooling(kind, **settings)
