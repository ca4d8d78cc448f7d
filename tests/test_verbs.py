"""The verbs of encoders on a batch, each against a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from crysdistill.graphs import batch as graphs
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch, replace
from tests.conftest import random_crystal

DOUBLE = torch.float64


@pytest.fixture
def batch() -> CrystalBatch:
    """Three crystals; neither atom 2 nor the second crystal (atom 4) has edges."""
    crystals = [random_crystal(0, 4), random_crystal(1, 1), random_crystal(2, 3)]
    whole = make_batch(crystals, GraphSettings(5.0, 5))
    kept = (whole.edge_index[1] != 2) & (whole.edge_index[1] != 4)
    counts = torch.bincount(whole.edge_index[1][kept], minlength=8)
    return replace(
        whole,
        edge_index=whole.edge_index[:, kept],
        edge_shift=whole.edge_shift[kept],
        neighbor_ptr=torch.cat((torch.zeros(1), counts.cumsum(0))).long(),
        frac_coords=whole.frac_coords.double(),
        cell=whole.cell.double(),
    )


def nothing() -> CrystalBatch:
    """The batch of a rank without crystals."""
    one = make_batch([random_crystal(0, 2)], GraphSettings(5.0, 5))
    return replace(
        one,
        atomic_numbers=one.atomic_numbers[:0],
        frac_coords=one.frac_coords[:0],
        cell=one.cell[:0],
        edge_index=one.edge_index[:, :0],
        edge_shift=one.edge_shift[:0],
        batch=one.batch[:0],
        ptr=one.ptr[:1],
        neighbor_ptr=one.neighbor_ptr[:1],
        num_nodes=0,
    )


def edges_of(batch: CrystalBatch, atom: int) -> list[int]:
    return [e for e, i in enumerate(batch.edge_index[1].tolist()) if i == atom]


def atoms_of(batch: CrystalBatch, crystal: int) -> list[int]:
    return [n for n, b in enumerate(batch.batch.tolist()) if b == crystal]


def edges_in(batch: CrystalBatch, crystal: int) -> list[int]:
    return [e for n in atoms_of(batch, crystal) for e in edges_of(batch, n)]


def by_owner(x: Tensor, members: list[list[int]], do: Callable) -> Tensor:
    """Apply `do` to the rows of each owner; an owner without rows has zeros."""
    return torch.stack([do(x[m]) if m else x.new_zeros(x.shape[1:]) for m in members])


def total(rows: Tensor) -> Tensor:
    return rows.sum(dim=0)


def mean(rows: Tensor) -> Tensor:
    return rows.mean(dim=0)


REDUCTIONS = {
    "sum_over_neighbours": (edges_of, total),
    "mean_over_neighbours": (edges_of, mean),
    "sum_over_atoms": (atoms_of, total),
    "mean_over_atoms": (atoms_of, mean),
    "mean_over_edges": (edges_in, mean),
}
SOFTMAXES = {"softmax_over_neighbours": edges_of, "softmax_over_atoms": atoms_of}


def members(batch: CrystalBatch, of: Callable) -> list[list[int]]:
    owners = batch.num_nodes if of is edges_of else batch.num_graphs
    return [of(batch, owner) for owner in range(owners)]


def rows_of(batch: CrystalBatch, of: Callable) -> int:
    return batch.num_nodes if of is atoms_of else batch.num_edges


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(batch, name):
    of, do = REDUCTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(rows_of(batch, of), 3, dtype=DOUBLE, requires_grad=True)
    found = getattr(graphs, name)(x, batch)
    expected = by_owner(x, members(batch, of), do)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    one, other = (
        torch.autograd.grad((y * weights).sum(), x) for y in (found, expected)
    )
    torch.testing.assert_close(one[0], other[0])


def test_sums_of_more_than_vectors_and_of_integers(batch):
    x = torch.randint(9, (batch.num_edges, 2, 3))
    found = graphs.sum_over_neighbours(x, batch)
    assert found.dtype == torch.int64
    assert torch.equal(found, by_owner(x, members(batch, edges_of), total))


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes(batch, name):
    of = SOFTMAXES[name]
    torch.manual_seed(0)
    scores = torch.randn(rows_of(batch, of), 2, dtype=DOUBLE, requires_grad=True)
    found = getattr(graphs, name)(scores, batch)
    expected = torch.empty_like(scores)
    for own in members(batch, of):
        expected[own] = torch.softmax(scores[own], dim=0)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    one, other = (
        torch.autograd.grad((y * weights).sum(), scores) for y in (found, expected)
    )
    torch.testing.assert_close(one[0], other[0])
    # Each owner subtracts its own maximum, so nothing overflows or becomes 0 / 0.
    far = scores.detach() + 1e4 * torch.arange(len(scores)).unsqueeze(1)
    shares = getattr(graphs, name)(far.float(), batch)
    sums = torch.stack([shares[own].sum(0) for own in members(batch, of) if own])
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("name", [*REDUCTIONS, *SOFTMAXES])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(batch, name, kind):
    of = REDUCTIONS[name][0] if name in REDUCTIONS else SOFTMAXES[name]
    torch.manual_seed(0)
    x = torch.rand(rows_of(batch, of), 2).to(kind)
    found = getattr(graphs, name)(x, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, getattr(graphs, name)(x.float(), batch))


def test_half_precision_counts_beyond_256():
    one = make_batch([random_crystal(0, 2)], GraphSettings(5.0, 5))
    many = replace(
        one,
        batch=torch.zeros(1001, dtype=torch.int64),
        ptr=torch.tensor([0, 1001]),
        num_nodes=1001,
    )
    ones = torch.ones(1001, 1, dtype=torch.bfloat16)
    assert graphs.sum_over_atoms(ones, many).item() == 1001
    assert graphs.mean_over_atoms(ones, many).item() == 1


def test_gathers(batch):
    x = torch.randn(batch.num_nodes, 3)
    for e, (j, i) in enumerate(zip(*batch.edge_index.tolist(), strict=True)):
        assert torch.equal(graphs.gather_neighbours(x, batch)[e], x[j])
        assert torch.equal(graphs.gather_centres(x, batch)[e], x[i])
    y = torch.randn(batch.num_graphs, 2)
    for n, crystal in enumerate(batch.batch.tolist()):
        assert torch.equal(graphs.gather_crystals(y, batch)[n], y[crystal])


def test_vectors_and_distances(batch):
    vectors, lengths = graphs.edge_vectors(batch), graphs.distances(batch)
    frac, cell = batch.frac_coords.numpy(), batch.cell.numpy()
    for e, (j, i) in enumerate(zip(*batch.edge_index.tolist(), strict=True)):
        shift = batch.edge_shift[e].numpy().astype(float)
        vector = (frac[j] + shift - frac[i]) @ cell[batch.batch[i]]
        np.testing.assert_allclose(vectors[e], vector, atol=1e-12)
        np.testing.assert_allclose(lengths[e], np.linalg.norm(vector))
    assert (lengths > 0.5).all()


def test_fake_edges_have_the_length_they_claim():
    padded = make_batch([random_crystal(0, 1)], GraphSettings(4.0, 12, "cgcnn"))
    assert padded.padding.any()
    lengths = graphs.distances(padded)
    assert (lengths[padded.padding] == 5.0).all()
    assert (lengths[~padded.padding] <= 4.0).all()


def test_composition(batch):
    numbers = torch.tensor([8, 0, 26, 8, 100, 1, 0, 1])  # two masked atoms
    batch = replace(batch, atomic_numbers=numbers)
    found = graphs.composition(batch)
    expected = torch.zeros(3, 101, dtype=DOUBLE)
    for n, crystal in enumerate(batch.batch.tolist()):
        count = len(atoms_of(batch, crystal))
        expected[crystal, numbers[n]] += 1 / count
    assert found.dtype == DOUBLE
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:, 0], torch.tensor([1 / 4, 0, 1 / 3]).double())
    wider = graphs.composition(batch, 108)
    assert torch.equal(wider[:, :101], found)
    assert not wider[:, 101:].any()
    with pytest.raises(IndexError):  # and not a share in the next crystal's row
        graphs.composition(batch, 100)


def test_a_rank_without_crystals():
    empty = nothing()
    for name, (of, _) in REDUCTIONS.items():
        x = torch.empty(rows_of(empty, of), 3, requires_grad=True)
        found = getattr(graphs, name)(x, empty)
        assert found.shape == (0, 3), name
        found.sum().backward()
    for name, of in SOFTMAXES.items():
        scores = torch.empty(rows_of(empty, of), 2, requires_grad=True)
        found = getattr(graphs, name)(scores, empty)
        assert found.shape == (0, 2), name
        found.sum().backward()
    for name in ("gather_neighbours", "gather_centres", "gather_crystals"):
        assert getattr(graphs, name)(torch.empty(0, 3), empty).shape == (0, 3)
    assert graphs.edge_vectors(empty).shape == (0, 3)
    assert graphs.distances(empty).shape == (0,)
    assert graphs.composition(empty).shape == (0, 101)


def test_crystals_without_edges(batch):
    found = graphs.mean_over_edges(torch.ones(batch.num_edges, 2), batch)
    assert torch.equal(found, torch.tensor([[1.0, 1], [0, 0], [1, 1]]))
    lonely = replace(
        batch,
        edge_index=batch.edge_index[:, :0],
        edge_shift=batch.edge_shift[:0],
        neighbor_ptr=torch.zeros(9, dtype=torch.int64),
    )
    none = torch.empty(0, 2)
    assert not graphs.sum_over_neighbours(none, lonely).any()
    assert not graphs.mean_over_neighbours(none, lonely).any()
    assert graphs.softmax_over_neighbours(none, lonely).shape == (0, 2)
