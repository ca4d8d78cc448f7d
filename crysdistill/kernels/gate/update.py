"""What CGCNN makes of an atom and its messages: softplus(x + norm(total)), compiled.

PyTorch would pass six times over memory, and compute exp and log more slowly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crysdistill.kernels.gate.lanes import (
    LANES,
    accumulate,
    exp_of_minus,
    fill,
    fma,
    load,
    log_of_one_plus,
    magnitude,
    store,
    where_less,
)
from crysdistill.kernels.gate.threads import share
from crysdistill.layers.normalization import BatchNorm, moments_of_sums
from crysdistill.machine_code import machine_code
from crysdistill.ranks import sum_over_ranks

ROWS = 1024
"""Atoms in a part of the work. Sums in the same order are the same on any number of
threads."""


def updated(x: Tensor, total: Tensor, norm: BatchNorm) -> Tensor:
    """Return softplus(x + norm(total)) for atoms (N, F) and their messages (N, F)."""
    compiled = (
        {(t.device.type, t.dtype) for t in (x, total, norm.weight)}
        == {("cpu", torch.float32)}
        and x.shape[1] % LANES == 0
        and not torch.compiler.is_compiling()
    )
    if not compiled:
        return F.softplus(x + norm(total))
    x, total = x.contiguous(), total.contiguous()
    tasks = _tasks(len(x))
    count = None
    mean, var = norm.running_mean, norm.running_var
    if norm.training or mean is None or var is None:
        count, mean, var = _moments(total, tasks)
        if norm.training and count > 0:
            norm.follow(count, mean, var)
    inverse = (var + norm.eps).rsqrt()
    return _Update.apply(x, total, norm.weight, norm.bias, mean, inverse, count)


def _tasks(rows: int) -> np.ndarray:
    """Return part, first row and last row of each task, (tasks, 3)."""
    parts = -(-rows // ROWS)
    begin = np.arange(parts) * ROWS
    return np.stack((np.arange(parts), begin, np.minimum(begin + ROWS, rows)), axis=1)


def _moments(total: Tensor, tasks: np.ndarray) -> tuple[float, Tensor, Tensor]:
    """Return how many rows all ranks have, their mean and variance, (F,)."""
    rows, width = total.shape
    flat = total.detach().numpy().reshape(-1)
    pivot = flat[:width] if rows else np.zeros(width, np.float32)
    sums = np.zeros((len(tasks), 2 * width))
    share(_add_up, tasks, width, flat, pivot, sums)
    return moments_of_sums(rows, pivot[None], sums[:, None])


@machine_code
def _add_up(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    width: int,
    total: np.ndarray,
    pivot: np.ndarray,
    all_sums: np.ndarray,
) -> None:
    """Add total - pivot and its square, over rows, to the sums."""
    for task in range(turn, len(tasks), turns):
        part, begin, end = tasks[task]
        sums = all_sums[part]
        for c in range(0, width, LANES):
            near = load(pivot, c)
            for i in range(begin, end):
                t = load(total, i * width + c) - near
                accumulate(sums, c, t)
                accumulate(sums, width + c, t * t)


@machine_code
def _forward(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    width: int,
    x: np.ndarray,
    total: np.ndarray,
    norm: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill softplus(x + (total - mean) scale + shift)."""
    zero = fill(0.0)
    for task in range(turn, len(tasks), turns):
        _, begin, end = tasks[task]
        for i in range(begin, end):
            for c in range(0, width, LANES):
                at = i * width + c
                t = load(total, at) - load(norm, c)
                y = load(x, at) + load(norm, 2 * width + c)
                y = fma(t, load(norm, width + c), y)
                small = exp_of_minus(magnitude(y))
                positive = where_less(zero, y, y, zero)
                # Where y is NaN, so is the logarithm.
                store(out, at, positive + log_of_one_plus(small))


@machine_code
def _backward(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    width: int,
    x: np.ndarray,
    total: np.ndarray,
    norm: np.ndarray,
    d_out: np.ndarray,
    d_x: np.ndarray,
    all_sums: np.ndarray,
) -> None:
    """Fill the gradient of x; sum it, and that times total - mean."""
    zero, one = fill(0.0), fill(1.0)
    for task in range(turn, len(tasks), turns):
        part, begin, end = tasks[task]
        sums = all_sums[part]
        for i in range(begin, end):
            for c in range(0, width, LANES):
                at = i * width + c
                t = load(total, at) - load(norm, c)
                y = load(x, at) + load(norm, 2 * width + c)
                y = fma(t, load(norm, width + c), y)
                small = exp_of_minus(magnitude(y))
                sigmoid = where_less(y, zero, small, one) / (one + small)
                gradient = load(d_out, at) * sigmoid
                store(d_x, at, gradient)
                accumulate(sums, c, gradient)
                accumulate(sums, width + c, gradient * t)


@machine_code
def _through_norm(
    turn: int,
    turns: int,
    tasks: np.ndarray,
    width: int,
    total: np.ndarray,
    line: np.ndarray,
    d_x: np.ndarray,
    d_total: np.ndarray,
) -> None:
    """Fill d_x scale + (total - mean) slope + offset."""
    for task in range(turn, len(tasks), turns):
        _, begin, end = tasks[task]
        for i in range(begin, end):
            for c in range(0, width, LANES):
                at = i * width + c
                t = load(total, at) - load(line, c)
                y = fma(t, load(line, 2 * width + c), load(line, 3 * width + c))
                store(d_total, at, fma(load(d_x, at), load(line, width + c), y))


class _Update(torch.autograd.Function):
    """softplus(x + (total - mean) weight / deviation + bias)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        total: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse: Tensor,
        count: float | None,
    ) -> Tensor:
        """Return (N, F); `count` is None where mean and deviation are given."""
        ctx.save_for_backward(x, total, weight, bias, mean, inverse)
        ctx.count = count
        out = torch.empty_like(x)
        norm = torch.cat((mean, weight * inverse, bias)).numpy()
        flat = (tensor.numpy().reshape(-1) for tensor in (x, total))
        share(
            _forward,
            _tasks(len(x)),
            x.shape[1],
            *flat,
            norm,
            out.numpy().reshape(-1),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        x, total, weight, bias, mean, inverse = ctx.saved_tensors
        width, tasks, scale = x.shape[1], _tasks(len(x)), weight * inverse
        d_x, d_total = torch.empty_like(x), torch.empty_like(total)
        norm = torch.cat((mean, scale, bias)).numpy()
        sums = np.zeros((len(tasks), 2 * width))
        x_flat, total_flat, d_out_flat, d_x_flat, d_total_flat = (
            tensor.numpy().reshape(-1)
            for tensor in (x, total, d_out.contiguous(), d_x, d_total)
        )
        share(
            _backward,
            tasks,
            width,
            x_flat,
            total_flat,
            norm,
            d_out_flat,
            d_x_flat,
            sums,
        )
        of_all = torch.from_numpy(sums.sum(axis=0)).view(2, width)
        d_bias, d_weight = of_all[0].float(), (of_all[1] * inverse).float()
        slope = offset = torch.zeros_like(mean)
        if ctx.count is not None:
            # The gradients of weight and bias stay this rank's own: DDP adds them up.
            shared = sum_over_ranks(of_all) / max(ctx.count, 1)
            slope = (-scale * inverse.square() * shared[1]).float()
            offset = (-scale * shared[0]).float()
        line = torch.cat((mean, scale, slope, offset)).numpy()
        share(_through_norm, tasks, width, total_flat, line, d_x_flat, d_total_flat)
        return d_x, d_total, d_weight, d_bias, None, None, None
