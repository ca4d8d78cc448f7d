"""Differentiable group normalisation, against plain forms and over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import DiffGroupNorm

from crysdistill.errors import InputError
from crysdistill.layers.group_norm import DifferentiableGroupNorm
from crysdistill.ranks import rank
from tests.together import joined_call, together

WIDTH, GROUPS, SCALE = 6, 4, 0.3


def group_norm(seed: int = 0) -> DifferentiableGroupNorm:
    torch.manual_seed(seed)
    layer = DifferentiableGroupNorm(WIDTH, GROUPS, SCALE)
    with torch.no_grad():
        layer.norm.weight.add_(0.3 * torch.randn(GROUPS * WIDTH))
        layer.norm.bias.add_(torch.randn(GROUPS * WIDTH))
    return layer


def plain(layer: DifferentiableGroupNorm, x: Tensor) -> Tensor:
    """Follow the equations for one group and column after the other."""
    shares = torch.exp(x @ layer.assign.weight.T)
    shares = shares / shares.sum(1, keepdim=True)
    result = x.clone()
    for g in range(layer.groups):
        columns = slice(g * x.shape[1], (g + 1) * x.shape[1])
        y = shares[:, g : g + 1] * x
        y = (y - y.mean(0)) / torch.sqrt(y.var(0, correction=0) + layer.norm.eps)
        y = y * layer.norm.weight[columns] + layer.norm.bias[columns]
        result = result + layer.scale * y
    return result


def gradients(y: Tensor, x: Tensor, layer: nn.Module) -> list[Tensor]:
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()]))


def test_equals_a_plain_implementation():
    layer = group_norm().double()
    x = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    ours, expected = layer(x), plain(layer, x)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    pairs = zip(gradients(ours, x, layer), gradients(expected, x, layer), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_equals_that_of_pyg_in_training_and_after():
    layer = group_norm()
    theirs = DiffGroupNorm(WIDTH, GROUPS, SCALE)
    theirs.lin.load_state_dict(layer.assign.state_dict())
    theirs.norm.load_state_dict(layer.norm.state_dict())
    for _ in range(3):
        # Far from zero, where differences of squares lose precision.
        x = (torch.randn(50, WIDTH) + 30).requires_grad_()
        one, other = layer(x), theirs(x)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
        for a, b in zip(
            gradients(one, x, layer), gradients(other, x, theirs), strict=True
        ):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    for name, value in theirs.norm.state_dict().items():
        torch.testing.assert_close(layer.norm.state_dict()[name], value)
    layer.eval(), theirs.eval()
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(layer(x), theirs(x), atol=1e-4, rtol=1e-5)


def test_one_group_is_a_batch_norm():
    layer = DifferentiableGroupNorm(WIDTH, groups=1, scale=1.0)
    x = torch.randn(20, WIDTH)
    expected = x + nn.BatchNorm1d(WIDTH)(x)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_those_of_the_published_program():
    # DeeperGATGNN: 10 groups of 64 columns, a matrix and a batch norm.
    layer = DifferentiableGroupNorm(64)
    assert sum(p.numel() for p in layer.parameters()) == 64 * 10 + 2 * 640


def test_a_single_atom_and_none():
    layer = group_norm().double()
    before = layer.norm.running_mean.clone()
    x = torch.empty(0, WIDTH, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer.norm.running_mean, before)
    assert int(layer.norm.num_batches_tracked) == 0
    # A single atom equals its mean, so only the biases remain.
    one = torch.randn(1, WIDTH, dtype=torch.float64)
    bias = layer.norm.bias.view(GROUPS, WIDTH).sum(0)
    torch.testing.assert_close(layer(one), one + SCALE * bias)


def test_half_precision():
    layer = group_norm()
    x = torch.randn(400, WIDTH) + 3
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.02)


def all_rows() -> Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)) + 2


def _share(rows: list[int]) -> list[Tensor]:
    """One rank's share: outputs, gradients, running statistics."""
    x, layer = all_rows(), group_norm()
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    own = slice(starts[rank()], starts[rank() + 1])
    part = x[own].clone().requires_grad_()
    y = layer(part)
    weights = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)[own]
    found = torch.autograd.grad((y * weights).sum(), [part, *layer.parameters()])
    return [y.detach(), *found, layer.norm.running_mean, layer.norm.running_var]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[4, 5], [9, 0]])
def test_ranks_make_one_batch(rows):
    x = all_rows()
    alone = group_norm()
    y = alone(x.requires_grad_())
    expected = [y.detach(), *gradients(y, x, alone)]
    expected += [alone.norm.running_mean, alone.norm.running_var]
    first, second = together(2, joined_call, _share, rows)
    for k, (one, other, whole) in enumerate(zip(first, second, expected, strict=True)):
        if k < 2:  # outputs and gradients of inputs, by row
            found = torch.cat((one, other))
        elif k < 5:  # gradients of weights add up
            found = one + other
        else:
            torch.testing.assert_close(other, whole)
            found = one
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["width", "groups"])
def test_settings_out_of_range(name):
    with pytest.raises(InputError, match=f"`{name}` is 0 but must be at least 1"):
        DifferentiableGroupNorm(**{"width": 4, name: 0})
