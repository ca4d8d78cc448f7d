"""Gaussians from a table, against computed ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crysdistill.kernels.gate.table import GaussianTable, read


def look_up(table: GaussianTable, weight: torch.Tensor, d: torch.Tensor):
    return read(table.rows @ weight.mT, *table.locate(d))


def exact(distance: torch.Tensor, cutoff: float, spacing: float) -> torch.Tensor:
    centres = torch.arange(round(cutoff / spacing) + 1, dtype=torch.float64) * spacing
    return torch.exp(-((distance.double()[:, None] - centres) / spacing).square())


@pytest.mark.parametrize(
    ("cutoff", "spacing"), [(8.0, 0.2), (5.0, 0.5), (6.0, 0.07), (3.0, 1.7)]
)
def test_equals_the_gaussians(cutoff, spacing):
    table = GaussianTable(cutoff, spacing)
    rng = np.random.default_rng(0)
    d = torch.from_numpy(rng.uniform(0, cutoff + 10 * spacing, 20_000)).float()
    expected = exact(d, cutoff, spacing)
    found = look_up(table, torch.eye(expected.shape[1]), d)
    # Single precision changes a distance of 8 Å by as much: 2e-6 widths of a Gaussian.
    assert (found - expected).abs().max() < 1e-6


def test_weights_see_exact_gradients():
    table = GaussianTable(8.0, 0.2)
    d = torch.rand(500) * 10
    weight = torch.randn(6, 41, requires_grad=True)
    along = torch.randn(500, 6)
    look_up(table, weight, d).backward(along)
    expected = along.double().T @ exact(d, 8.0, 0.2)
    torch.testing.assert_close(weight.grad.double(), expected, atol=3e-5, rtol=1e-5)


def test_distances_see_exact_gradients():
    table = GaussianTable(8.0, 0.2).double()
    d = (torch.rand(300, dtype=torch.float64) * 10).requires_grad_()
    weight = torch.randn(1, 41, dtype=torch.float64)
    look_up(table, weight, d).sum().backward()
    other = d.detach().requires_grad_()
    (exact(other, 8.0, 0.2) @ weight.T).sum().backward()
    torch.testing.assert_close(d.grad, other.grad, atol=1e-3, rtol=1e-3)


def test_beyond_the_gaussians_all_is_zero():
    table = GaussianTable(2.0, 0.2)
    d = torch.tensor([3.31, 3.4, 9.0, 1e9, torch.inf])
    assert not look_up(table, torch.ones(1, 11), d).any()


def test_nan_stays_nan():
    table = GaussianTable(8.0, 0.2)
    d = torch.tensor([1.0, torch.nan])
    found = look_up(table, torch.ones(1, 41), d)
    assert torch.isnan(found).flatten().tolist() == [False, True]
