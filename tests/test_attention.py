"""The attention layers against plain loops over their equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch
from crysdistill.layers import attention
from crysdistill.layers.attention import (
    AugmentedAttention,
    CompositionAttention,
    find_ends,
)
from tests.conftest import random_crystal

WIDTH, HEADS, LENGTHS = 6, 3, 5


@pytest.fixture
def batch() -> CrystalBatch:
    crystals = [random_crystal(0, 4), random_crystal(1, 1), random_crystal(2, 3)]
    return make_batch(crystals, GraphSettings(5.0, 6))


def layer_and_inputs(batch: CrystalBatch) -> tuple[AugmentedAttention, Tensor, Tensor]:
    """A layer, atoms and edges; each edge has one of D lengths at random."""
    torch.manual_seed(0)
    layer = AugmentedAttention(WIDTH, HEADS).double()
    with torch.no_grad():
        layer.score.mul_(4)
        for weight in (layer.bias, layer.norm.weight, layer.norm.bias):
            weight.add_(torch.randn_like(weight))
    x = torch.randn(batch.num_nodes, WIDTH, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(LENGTHS, WIDTH, dtype=torch.float64, requires_grad=True)
    return layer, x, rows


def places(batch: CrystalBatch) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(LENGTHS, (batch.num_edges,), generator=generator)


def by_loops(
    layer: AugmentedAttention, x: Tensor, edges: Tensor, batch: CrystalBatch
) -> Tensor:
    """Compute one edge and one head after the other."""
    pairs = list(zip(*batch.edge_index.tolist(), strict=True))
    ends, scores = [], []
    for e, (j, i) in enumerate(pairs):
        h_i = F.softplus(layer.weight @ torch.cat((x[i], edges[e]))).split(WIDTH)
        h_j = F.softplus(layer.weight @ torch.cat((x[j], edges[e]))).split(WIDTH)
        ends.append(h_j)
        scores.append(
            torch.stack(
                [
                    F.softplus(layer.score[h] @ torch.cat((h_i[h], h_j[h])))
                    for h in range(HEADS)
                ]
            )
        )
    s = torch.stack(scores)  # (E, H)
    s = (s - s.mean(0)) / torch.sqrt(s.var(0, correction=0) + layer.norm.eps)
    s = F.softplus(s * layer.norm.weight + layer.norm.bias)
    rows = []
    for atom in range(len(x)):
        own = [e for e, (_, i) in enumerate(pairs) if i == atom]
        total = layer.bias
        for h in range(HEADS):
            share = torch.exp(s[own, h]) / torch.exp(s[own, h]).sum()
            heard = sum(c * ends[e][h] for c, e in zip(share, own, strict=True))
            total = total + heard / HEADS
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("at_once", [1 << 17, 64])
def test_augmented_attention(batch, monkeypatch, at_once):
    """Compute all edges at once, and in blocks of a few edges."""
    monkeypatch.setattr(attention, "_NUMBERS_AT_ONCE", at_once)
    layer, x, rows = layer_and_inputs(batch)
    place = places(batch)
    found = layer(x, find_ends(rows, place, batch), batch)
    expected = by_loops(layer, x, rows[place], batch)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weights = torch.cos(torch.arange(found.numel()).double()).view_as(found)
    both = (
        torch.autograd.grad((y * weights).sum(), [x, rows, *layer.parameters()])
        for y in (found, expected)
    )
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_ends_are_shared_and_complete(batch):
    place = places(batch)
    rows = torch.randn(LENGTHS, 2)
    ends = find_ends(rows, place, batch)
    for end, atom in (
        (ends.neighbour, batch.edge_index[0]),
        (ends.centre, batch.edge_index[1]),
    ):
        assert torch.equal(ends.atom[end], atom)
        assert torch.equal(ends.length[end], place)
    distinct = {*zip(ends.atom.tolist(), ends.length.tolist(), strict=True)}
    assert len(distinct) == len(ends.atom) < 2 * batch.num_edges
    assert ends.rows is rows


def test_no_atoms_and_no_edges(batch):
    layer, x, rows = layer_and_inputs(batch)
    nothing = CrystalBatch(
        edge_index=torch.empty(2, 0, dtype=torch.int64),
        batch=torch.empty(0, dtype=torch.int64),
        ptr=torch.zeros(1, dtype=torch.int64),
        neighbor_ptr=torch.zeros(1, dtype=torch.int64),
        num_nodes=0,
    )
    ends = find_ends(rows[:0], nothing.edge_index[0], nothing)
    found = layer(x[:0], ends, nothing)
    assert found.shape == (0, WIDTH)
    found.sum().backward()
    assert not layer.weight.grad.any()


def test_augmented_attention_in_half_precision(batch):
    layer, x, rows = layer_and_inputs(batch)
    ends = find_ends(rows, places(batch), batch)
    exact = layer(x, ends, batch)
    half = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = half(x.float(), ends._replace(rows=rows.float()), batch)
    found.float().sum().backward()
    scale = exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact, atol=0.03 * scale, rtol=0)
    assert torch.isfinite(half.weight.grad).all()


@pytest.mark.parametrize("hidden", [(4,), (5, 3)])
def test_composition_attention(batch, hidden):
    torch.manual_seed(0)
    layer = CompositionAttention(WIDTH, 7, hidden).double()
    x = torch.randn(batch.num_nodes, WIDTH, dtype=torch.float64)
    shares = torch.rand(batch.num_graphs, 7, dtype=torch.float64)
    found = layer(x, shares, batch)
    assert found.shape == (batch.num_nodes, 1)
    for crystal in range(batch.num_graphs):
        own = [i for i in range(batch.num_nodes) if batch.batch[i] == crystal]
        scores = []
        for i in own:
            z = layer.first(torch.cat((x[i], shares[crystal])))
            for linear in layer.rest:
                z = linear(F.softplus(z))
            scores.append(z)
        expected = torch.softmax(torch.stack(scores), dim=0)
        torch.testing.assert_close(found[own], expected)


def test_weights_are_those_of_the_published_layer():
    # W, a, b and the batch norm over heads; its PReLU is never used.
    count = sum(p.numel() for p in AugmentedAttention(64, 4).parameters())
    assert count == 128 * 256 + 4 * 128 + 64 + 8
    assert count + 2 * 640 + 640 == 35_272  # with the group norm of DeeperGATGNN


@pytest.mark.parametrize("name", ["width", "heads"])
def test_settings_out_of_range(name):
    with pytest.raises(InputError, match=f"`{name}` is 0 but must be at least 1"):
        AugmentedAttention(**{"width": 4, "heads": 2, name: 0})
