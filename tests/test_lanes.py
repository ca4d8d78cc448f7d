"""Sixteen numbers at a time: the arithmetic of compiled kernels, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from crysdistill.kernels.gate import lanes
from crysdistill.kernels.gate.lanes import LANES


@njit
def _exp(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(0, len(x), LANES):
        lanes.store(y, i, lanes.exp_of_minus(lanes.load(x, i)))


@njit
def _log(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(0, len(x), LANES):
        lanes.store(y, i, lanes.log_of_one_plus(lanes.load(x, i)))


@njit
def _arithmetic(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    x, y = lanes.load(a, 0), lanes.load(b, 0)
    lanes.store(out, 0, x + y)
    lanes.store(out, 16, x - y)
    lanes.store(out, 32, x * y)
    lanes.store(out, 48, x / y)
    lanes.store(out, 64, lanes.fma(x, y, lanes.fill(0.5)))
    lanes.store(out, 80, lanes.magnitude(x))
    lanes.store(out, 96, lanes.where_less(x, y, x, lanes.fill(7.0)))


@njit
def _accumulate(a: np.ndarray, total: np.ndarray) -> None:
    lanes.accumulate(total, 16, lanes.load(a, 0))


def apply(function, x: np.ndarray) -> np.ndarray:
    padded = np.zeros(-(-len(x) // LANES) * LANES, np.float32)
    padded[: len(x)] = x
    out = np.empty_like(padded)
    function(padded, out)
    return out[: len(x)]


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


def test_arithmetic():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 16)).astype(np.float32)
    out = np.empty(112, np.float32)
    _arithmetic(a, b, out)
    expected = [a + b, a - b, a * b, a / b, a * b + 0.5, abs(a)]
    expected += [np.where(a < b, a, 7)]
    np.testing.assert_allclose(out.reshape(7, 16), expected, rtol=1e-6, atol=1e-7)


def test_sums_are_in_double_precision():
    total = np.full(32, 1e8)
    _accumulate(np.full(16, 0.25, np.float32), total)
    assert total.tolist() == [1e8] * 16 + [1e8 + 0.25] * 16


def test_vectors_of_the_processor_are_used():
    for function in (_exp, _log):
        (assembly,) = function.inspect_asm().values()
        assert "expf" not in assembly
        assert "logf" not in assembly
