"""Softplus in compiled loops, and its exp and log.

Numba can call exp and log of the C library only for one number at a time. Here both are
polynomials, so that LLVM vectorises loops with them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from crysdistill.kernels.threads import share
from crysdistill.machine_code import machine_code

# a b + c may be one step, and division by zero gives infinity. NaN stays NaN.
looped = partial(machine_code, fastmath={"contract"}, error_model="numpy")
inlined = njit(forceinline=True, fastmath={"contract"}, error_model="numpy")

ZERO, ONE = np.float32(0), np.float32(1)
LARGEST = np.float32(87.3)
MAGIC = np.float32(12582912)  # 1.5 x 2^23: adding it rounds a number
STEPS = np.float32(-1.4426950408889634)  # -1 / ln(2)
# ln(2) as two numbers: n times the first is exact.
LN2, REST = np.float32(-0.693359375), np.float32(2.12194440e-4)

PART = 2**15
"""Numbers in one task."""


@inlined
def exp_of_minus(a: np.float32) -> np.float32:
    """Return exp(-a) for a >= 0, to 1e-7 of itself; 1.2e-38 from a = 87.3 on.

    exp(-a) = 2^n exp(r) with r between -ln(2)/2 and ln(2)/2, and exp(r) by a
    polynomial of degree 6. NaN stays NaN.
    """
    a = LARGEST if a > LARGEST else a
    shifted = np.float32(a * STEPS + MAGIC)
    n = shifted - MAGIC
    r = n * REST + (n * LN2 - a)
    p = np.float32(0.00138427)
    p = p * r + np.float32(0.00837497)
    p = p * r + np.float32(0.04166806)
    p = p * r + np.float32(0.16666422)
    p = p * r + np.float32(0.49999994)
    p = (p * r + ONE) * r + ONE
    # The lowest bits of `shifted` are those of n; here they become the exponent.
    return p * np.int32((shifted.view(np.int32) << 23) + (127 << 23)).view(np.float32)


@inlined
def log_of_one_plus(y: np.float32) -> np.float32:
    """Return log(1 + y) for y from 0 to 1, to 1e-7 of itself.

    log(1 + y) / y by a polynomial of degree 8. NaN stays NaN.
    """
    p = np.float32(0.005232623778283596)
    p = p * y + np.float32(-0.029504956677556038)
    p = p * y + np.float32(0.07822549343109131)
    p = p * y + np.float32(-0.1366320699453354)
    p = p * y + np.float32(0.1910598874092102)
    p = p * y + np.float32(-0.2484297752380371)
    p = p * y + np.float32(0.3331909477710724)
    p = p * y + np.float32(-0.4999949336051941)
    p = p * y + np.float32(0.9999999403953552)
    return p * y


@looped
def _forward(begin: int, end: int, x: np.ndarray, out: np.ndarray) -> None:
    for i in range(begin, end):
        # Where x is NaN, so is the logarithm.
        small = log_of_one_plus(exp_of_minus(abs(x[i])))
        out[i] = (x[i] if x[i] > ZERO else ZERO) + small


@looped
def _backward(
    begin: int, end: int, x: np.ndarray, d_out: np.ndarray, d_x: np.ndarray
) -> None:
    for i in range(begin, end):
        small = exp_of_minus(abs(x[i]))
        d_x[i] = d_out[i] * (small if x[i] < ZERO else ONE) / (ONE + small)


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), in half of PyTorch's time on the CPU; any shape.

    Compiled code is for the CPU and single precision. Unlike PyTorch's, its bits do not
    depend on the number of threads.
    """
    single = (x.device.type, x.dtype) == ("cpu", torch.float32)
    if not single or torch.compiler.is_compiling():
        return F.softplus(x)
    return _Softplus.apply(x)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        share(_forward, _tasks(x), *(t.numpy().reshape(-1) for t in (x, out)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        flat = (t.numpy().reshape(-1) for t in (x, d_out.contiguous(), d_x))
        share(_backward, _tasks(x), *flat)
        return d_x


def _tasks(x: Tensor) -> list[tuple[int, int]]:
    """Return the first number of each task, and the number after its last."""
    size = x.numel()
    return [(begin, min(begin + PART, size)) for begin in range(0, size, PART)]
