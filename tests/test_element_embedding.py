"""The first vectors of elements: plain `nn.Linear`, and a learned mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crysdistill.layers.elements import ElementEmbedding
from crysdistill.structures.elements import cgcnn92, onehot


@pytest.mark.parametrize("bias", [False, True])
def test_without_a_token_it_is_a_linear(bias):
    torch.manual_seed(0)
    plain = nn.Linear(92, 8, bias)
    torch.manual_seed(0)
    ours = ElementEmbedding(92, 8, bias)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    table = torch.from_numpy(cgcnn92())
    assert torch.equal(ours(table), plain(table))


@pytest.mark.parametrize("table", [cgcnn92(), onehot()])
def test_a_token_stands_for_masked_atoms_alone(table):
    table = torch.from_numpy(table)
    plain = ElementEmbedding(table.shape[1], 8)
    ours = ElementEmbedding(table.shape[1], 8, token=True)
    assert ours.state_dict().keys() == {"weight", "bias", "token"}
    ours.load_state_dict(plain.state_dict(), strict=False)
    rows = ours(table)
    assert torch.equal(rows[1:], plain(table)[1:])
    assert (rows[0] == 0).all()
    # The mask token learns only from masked atoms.
    rows[[0, 0, 6]].sum().backward()
    assert torch.equal(ours.token.grad, torch.full((8,), 2.0))
    assert torch.equal(ours.bias.grad, torch.ones(8))
