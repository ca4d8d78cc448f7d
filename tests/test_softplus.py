"""Compiled softplus, and the exp and log in it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit

from crysdistill.kernels import softplus as compiled
from crysdistill.kernels.softplus import (
    exp_of_minus,
    log_of_one_plus,
    looped,
    softplus,
)


@looped
def _exp(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(len(x)):
        y[i] = exp_of_minus(x[i])


@looped
def _log(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(len(x)):
        y[i] = log_of_one_plus(x[i])


def apply(function, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    out = np.empty_like(x)
    function(x, out)
    return out


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return np.abs(found / exact - 1).max()


def test_exp_is_exact_to_single_precision_over_its_whole_range():
    x = np.linspace(0, 87.2, 2_000_001).astype(np.float32)
    assert relative(apply(_exp, x), np.exp(-x.astype(np.float64))) < 1.5e-7
    tiny = np.geomspace(1e-30, 1, 100_000).astype(np.float32)
    assert relative(apply(_exp, tiny), np.exp(-tiny.astype(np.float64))) < 1.5e-7


def test_log_is_exact_to_single_precision_over_its_whole_range():
    y = np.linspace(0, 1, 2_000_001).astype(np.float32)[1:]
    assert relative(apply(_log, y), np.log1p(y.astype(np.float64))) < 2.5e-7
    tiny = np.geomspace(2e-38, 1, 100_000).astype(np.float32)
    assert relative(apply(_log, tiny), np.log1p(tiny.astype(np.float64))) < 2.5e-7


@pytest.mark.parametrize("x", [87.3, 88.0, 104.0, 1e30, np.inf])
def test_exp_of_very_negative_numbers_is_the_smallest_number(x):
    assert 0 < apply(_exp, np.array([x]))[0] < 2e-38


def test_edges_of_exp_and_log():
    assert apply(_exp, np.array([0.0]))[0] == 1
    assert apply(_log, np.array([0.0]))[0] == 0


@pytest.mark.parametrize("function", [_exp, _log])
def test_nan_stays_nan(function):
    found = apply(function, np.array([0.5, np.nan, 0.25]))
    assert np.isnan(found).tolist() == [False, True, False]


@pytest.mark.parametrize("function", [_exp, _log])
def test_loops_become_vectors(function):
    # Compile again: code from the cache has no assembly listing.
    anew = njit(**looped.keywords)(function.py_func)
    apply(anew, np.zeros(1))
    (code,) = anew.inspect_llvm().values()
    assert re.search(r"fmul [a-z ]*<\d+ x float>", code)


def test_softplus_equals_that_of_pytorch():
    x = torch.randn(300, 7) * 30
    x[0, :4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    one, other = x.clone().requires_grad_(), x.clone().double().requires_grad_()
    found, expected = softplus(one.T), F.softplus(other.T)  # not contiguous
    found.sum().backward()
    expected.sum().backward()
    for ours, theirs in ((found, expected), (one.grad, other.grad)):
        torch.testing.assert_close(
            ours, theirs.float(), atol=1e-8, rtol=3e-7, equal_nan=True
        )
    assert softplus(x[:0]).shape == (0, 7)
    assert softplus(other).dtype == torch.float64


def test_bits_of_softplus_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(compiled, "PART", 64)
    x, found = torch.randn(1001), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = x.clone().requires_grad_()
            out = softplus(y)
            found.append([out, *torch.autograd.grad(out.square().sum(), y)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
