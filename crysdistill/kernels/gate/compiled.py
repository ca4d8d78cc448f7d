"""The gated sum over neighbours on the CPU, compiled: forward, backward, statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crysdistill.kernels.gate import loops
from crysdistill.kernels.gate.merged_edges import CompiledEdges
from crysdistill.kernels.threads import share
from crysdistill.layers.normalization import BatchNorm, moments_of_sums
from crysdistill.ranks import sum_over_ranks


def compiled_gated_sum(
    products: Tensor,
    bias: Tensor,
    table: Tensor,
    edges: CompiledEdges,
    norms: tuple[BatchNorm, BatchNorm] | None = None,
) -> Tensor:
    """Return sum_j sigmoid(gate_ij) softplus(core_ij) for each atom i, (N, F).

    Gate and core are the halves of z_ij = own_i + other_j + table(d_ij) + bias, each
    after its batch norm, if there is one.

    Args:
        products: (N, 2, 2 F), `own` and `other` of each atom.
        bias: (2 F,).
        table: (2 M, 2 F); see `GaussianTable`.
        edges: the edges of the batch.
        norms: norms of gate and core; training updates their running statistics.
    """
    products, table = products.contiguous(), table.contiguous()
    # Here and below, z lacks the bias, which is subtracted from the mean instead.
    if norms is None:
        one, zero = torch.ones_like(bias), torch.zeros_like(bias)
        return _GatedSum.apply(products, table, one, zero, -bias, one, None, edges)
    weight = _both(*(norm.weight for norm in norms))
    shift = _both(*(norm.bias for norm in norms))
    count = None
    if norms[0].training or norms[0].running_mean is None:
        count, mean, var = _moments(products, table, edges)
        if norms[0].training and count > 0:
            moments = (mean + bias).chunk(2), var.chunk(2)
            for norm, *of_norm in zip(norms, *moments, strict=True):
                norm.follow(count, *of_norm)
        # A norm removes a bias of all edges, but the bias needs its gradient: zero.
        mean = mean + 0 * bias
    else:
        mean = _both(*(norm.running_mean for norm in norms)) - bias
        var = _both(*(norm.running_var for norm in norms))
    inverse = (var + norms[0].eps).rsqrt()
    return _GatedSum.apply(products, table, weight, shift, mean, inverse, count, edges)


def _both(*parts: Tensor | None) -> Tensor:
    """Join numbers per channel of gate and core: (F,) twice to (2 F,)."""
    return torch.cat([part for part in parts if part is not None])


@torch.no_grad()
def _moments(
    products: Tensor, table: Tensor, edges: CompiledEdges
) -> tuple[float, Tensor, Tensor]:
    """Return the number of edges on all ranks, and mean and variance of z, (2 F,)."""
    atoms, rows = products.numpy(), table.numpy()
    pivot = np.zeros(table.shape[1], np.float32)
    if edges.count:  # a pivot near the mean avoids differences of large sums
        pivot = atoms[:16].mean(axis=0).sum(axis=0) + rows[::2].mean(axis=0)
    sums = np.zeros((len(edges.parts), 2, len(pivot)))
    tasks = [(*part, sums[k]) for k, part in enumerate(edges.parts)]
    share(loops.add_up, tasks, atoms, rows, edges.merged, pivot)
    return moments_of_sums(edges.count, pivot, sums)


class _GatedSum(torch.autograd.Function):
    """Forward and backward; no tensor with a row for every edge is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        products: Tensor,
        table: Tensor,
        weight: Tensor,
        shift: Tensor,
        mean: Tensor,
        inverse: Tensor,
        count: float | None,
        edges: CompiledEdges,
    ) -> Tensor:
        """Return (N, F).

        Args:
            ctx: the context for backward.
            products: (N, 2, 2 F).
            table: (2 M, 2 F).
            weight: (2 F,), of the batch norms.
            shift: (2 F,), the biases of the batch norms.
            mean: (2 F,), of z.
            inverse: (2 F,), one over the standard deviation of z.
            count: edges on all ranks, if mean and deviation are theirs.
            edges: the edges of the batch.
        """
        ctx.save_for_backward(products, table, weight, shift, mean, inverse)
        ctx.count, ctx.edges = count, edges
        out = products.new_empty(len(products), len(mean) // 2)
        norm = torch.stack((mean, weight * inverse, shift))
        arrays = products.numpy(), table.numpy(), edges.merged, norm.numpy()
        share(loops.send, edges.parts, *arrays, out.numpy())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        products, table, weight, shift, mean, inverse = ctx.saved_tensors
        edges: CompiledEdges = ctx.edges
        scale, wants_table = weight * inverse, ctx.needs_input_grad[1]
        norm = torch.stack((mean, scale, shift)).numpy()
        d_products = torch.empty_like(products)
        knots = len(table) if wants_table else 0
        d_tables = np.zeros((len(edges.parts), knots, table.shape[1]), np.float32)
        sums = np.zeros((len(edges.parts), 2, table.shape[1]))
        tasks = [(*part, d_tables[k]) for k, part in enumerate(edges.parts)]
        arrays = products.numpy(), table.numpy(), edges.merged
        found, along = d_products.numpy(), d_out.contiguous().numpy()
        summed = [(*task, sums[k]) for k, task in enumerate(tasks)]
        share(loops.pull, summed, *arrays, norm, along, found)
        total = torch.from_numpy(sums.sum(axis=0))
        d_shift, d_weight = total[0].float(), (total[1] * inverse).float()
        d_mean = torch.zeros_like(mean) if ctx.count is not None else -scale * d_shift
        if ctx.count is not None and any(ctx.needs_input_grad[:2]):
            # The gradients of weight and shift stay this rank's own: DDP adds them up.
            shared = sum_over_ranks(total) / max(ctx.count, 1)
            slope = -scale * inverse.square() * shared[1]
            offset = -scale * shared[0]
            line = torch.stack((mean, slope, offset)).float().numpy()
            share(loops.correct, tasks, *arrays, line, found)
        d_table = torch.from_numpy(d_tables.sum(axis=0)) if wants_table else None
        return d_products, d_table, d_weight, d_shift, d_mean, None, None, None
