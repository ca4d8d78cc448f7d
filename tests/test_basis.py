"""Basis functions: known values and orthogonality."""

from __future__ import annotations

import math

import pytest
import torch

from crysdistill.layers.basis import (
    Bessel,
    Gaussians,
    cosine_cutoff,
    shifted_softplus,
)


def test_bessel_functions_are_orthonormal_and_end_at_the_cutoff():
    """The integral of u_m u_n d^2 over the sphere's radius is 1 for m = n, else 0."""
    basis = Bessel(5.0, 4).double()
    steps = torch.linspace(0, 5.0, 20_001, dtype=torch.float64)[1:]
    u = basis(steps)
    products = (u.T * steps.square()) @ u * (5.0 / 20_000)
    torch.testing.assert_close(products, torch.eye(4).double(), atol=1e-6, rtol=0)
    assert basis(torch.tensor([5.0])).abs().max() < 1e-6


def test_gaussians_have_no_factor_two():
    basis = Gaussians(0.0, 8.0, 41, 0.2)
    u = basis(torch.tensor([1.0, 1.2]))
    assert u[0, 5].item() == pytest.approx(1.0)
    assert u[1, 5].item() == pytest.approx(math.exp(-1), rel=1e-5)


def test_the_cosine_cutoff_falls_from_one_to_zero():
    found = cosine_cutoff(torch.tensor([0.0, 2.0, 4.0, 4.1]), 4.0)
    assert found.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-6)


def test_the_shifted_softplus_is_zero_at_zero():
    found = shifted_softplus(torch.tensor([0.0, 1.0]))
    expected = [0.0, math.log((1 + math.e) / 2)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
