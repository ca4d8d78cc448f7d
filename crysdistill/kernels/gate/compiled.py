"""The gated sum over neighbours on the CPU, compiled: forward, backward, statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.kernels.gate import kernels
from crysdistill.kernels.gate.lanes import LANES
from crysdistill.kernels.gate.merged_edges import MergedEdges, measure, merge
from crysdistill.kernels.gate.table import GaussianTable
from crysdistill.kernels.gate.threads import share
from crysdistill.layers.normalization import BatchNorm, moments_of_sums
from crysdistill.ranks import sum_over_ranks

PART = 8192
"""Edges from which on a batch is worked on in parts. They depend on the batch alone:
sums in the same order are the same on any number of threads."""

PARTS = 64
"""Parts of the largest batches."""


@dataclass(frozen=True)
class CompiledEdges:
    """The edges of a batch as compiled code reads them.

    Args:
        count: E, before equal ones were merged.
        rows: (2 M, K), the Gaussians at the knots that are used, and no others.
        merged: their arrays.
        parts: the first atom of each part of the batch, and N.
    """

    count: int
    rows: Tensor
    merged: MergedEdges
    parts: list[int]

    lanes = LANES
    """How many channels stand together in products and tables."""

    def tasks(self, blocks: int) -> np.ndarray:
        """Return part, first atom, last atom and block of channels, (tasks, 4)."""
        bounds = zip(self.parts, self.parts[1:], strict=False)
        tasks = [
            (part, begin, end, block)
            for part, (begin, end) in enumerate(bounds)
            for block in range(blocks)
        ]
        return np.array(tasks, np.int64).reshape(-1, 4)


def merge_edges(batch: CrystalBatch, table: GaussianTable) -> CompiledEdges | None:
    """Return edges for compiled code, or None where the graph is not made for it.

    Args:
        batch: of crystals; edges must be sorted by centre and stay in their crystal.
        table: where to look distances up.
    """
    count, atoms = batch.edge_index.shape[1], int(batch.num_nodes)
    ptr = batch.ptr.numpy()
    edge_index = batch.edge_index.contiguous().numpy()
    distance = np.empty(count)
    if not measure(
        batch.frac_coords.detach().numpy(),
        batch.cell.detach().numpy(),
        edge_index,
        batch.edge_shift.numpy(),
        ptr,
        distance,
    ):
        return None
    padding = getattr(batch, "padding", None)
    if padding is not None:
        distance[padding.numpy()] = batch.padding_distance
    edges = MergedEdges(
        neighbour=np.empty(count, np.int32),
        row=np.empty(count, np.int32),
        weights=np.empty(4 * count, np.float32),
        times=np.empty(count, np.float32),
        first=np.empty(atoms + 1, np.int64),
    )
    used = np.empty(table.knots, bool)
    found = merge(distance, edge_index, table.step, used, edges)
    rows = table.at(torch.from_numpy(used.nonzero()[0]))
    size = max(PART, -(-found // PARTS))
    before = edges.first[ptr]  # (B + 1,), edges before each crystal
    cuts = ptr[np.searchsorted(before, np.arange(size, found, size))]
    parts = [0, *np.unique(cuts[cuts > 0]).tolist(), atoms]
    return CompiledEdges(count, rows, edges, parts)


def compiled_gated_sum(
    products: Tensor,
    bias: Tensor,
    table: Tensor,
    edges: CompiledEdges,
    norms: tuple[BatchNorm, BatchNorm] | None = None,
) -> Tensor:
    """Do what `gate.plain_gated_sum` does. Shapes are those of `gate.gated_sum`."""
    products, table = products.contiguous(), table.contiguous()
    if norms is None:
        one, zero = torch.ones_like(bias), torch.zeros_like(bias)
        total = _GatedSum.apply(products, table, one, zero, -bias, one, None, edges)
        return total.flatten(1)
    weight = in_blocks(*(norm.weight for norm in norms))
    shift = in_blocks(*(norm.bias for norm in norms))
    count = None
    if norms[0].training or norms[0].running_mean is None:
        count, mean, var = _moments(products, table, edges)
        for k, norm in enumerate(norms):
            if norm.training and count > 0:
                moments = (m[:, k].flatten() for m in (mean + bias, var))
                norm.follow(count, *(m[: norm.num_features] for m in moments))
        # What is added to all edges does nothing, but has a gradient: zero.
        mean = mean + 0 * bias
    else:
        mean = in_blocks(*(norm.running_mean for norm in norms)) - bias
        var = in_blocks(*(norm.running_var for norm in norms))
    inverse = (var + norms[0].eps).rsqrt()
    total = _GatedSum.apply(products, table, weight, shift, mean, inverse, count, edges)
    return total.flatten(1)


def in_blocks(*parts: Tensor | None) -> Tensor:
    """Lay out what gate and core have per channel: (F,) twice to (C, 2, 16)."""
    both = torch.stack([part for part in parts if part is not None])
    missing = -both.shape[1] % LANES
    if missing:
        both = torch.nn.functional.pad(both, (0, missing))
    return both.view(2, -1, LANES).transpose(0, 1).contiguous()


@torch.no_grad()
def _moments(
    products: Tensor, table: Tensor, edges: CompiledEdges
) -> tuple[float, Tensor, Tensor]:
    """Return how many edges all ranks have, and mean and variance of z, (C, 2, 16).

    Here and below z is without the bias, which is taken from the mean instead.
    """
    blocks = table.shape[0]
    flat, tables = products.numpy().reshape(-1), table.flatten(1).numpy()
    pivot = np.zeros((blocks, 2 * LANES), np.float32)
    tasks = edges.tasks(blocks)
    sums = np.zeros((len(edges.parts) - 1, blocks, 4 * LANES))
    if edges.count:
        kernels.sample(flat, tables, edges.merged, pivot)
    share(kernels.add_up, tasks, flat, tables, edges.merged, pivot, sums)
    count, mean, var = moments_of_sums(edges.count, pivot, sums)
    shape = (blocks, 2, LANES)
    return count, mean.view(shape), var.view(shape)


class _GatedSum(torch.autograd.Function):
    """Forward and backward; nothing is kept that has a row for every edge."""

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
        """Return (N, C, 16).

        Args:
            ctx: for backward.
            products: (N, C, 4, 16).
            table: (C, 2 M, 2, 16).
            weight: (C, 2, 16), of the batch norms.
            shift: (C, 2, 16), the biases of the batch norms.
            mean: (C, 2, 16), of z.
            inverse: (C, 2, 16), one over the standard deviation of z.
            count: edges on all ranks, if mean and deviation are theirs.
            edges: of the batch.
        """
        ctx.save_for_backward(products, table, weight, shift, mean, inverse)
        ctx.count, ctx.edges = count, edges
        blocks = table.shape[0]
        out = products.new_empty(len(products), blocks, LANES)
        norm = torch.stack((mean, weight * inverse, shift), dim=1)
        norms = norm.numpy().reshape(blocks, -1)
        flat, tables = products.numpy().reshape(-1), table.flatten(1).numpy()
        share(
            kernels.send,
            edges.tasks(blocks),
            flat,
            tables,
            edges.merged,
            norms,
            out.numpy().reshape(-1),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        products, table, weight, shift, mean, inverse = ctx.saved_tensors
        edges: CompiledEdges = ctx.edges
        blocks, parts = table.shape[0], len(edges.parts) - 1
        wants_table = ctx.needs_input_grad[1]
        scale = weight * inverse
        norms = torch.stack((mean, scale, shift), dim=1).numpy().reshape(blocks, -1)
        flat, tables = products.numpy().reshape(-1), table.flatten(1).numpy()
        d_products = torch.empty_like(products)
        d_flat = d_products.numpy().reshape(-1)
        size = tables.shape[1] if wants_table else 0
        d_tables = np.zeros((parts, blocks, size), np.float32)
        sums = np.zeros((parts, blocks, 4 * LANES))
        along = d_out.contiguous().numpy().reshape(-1)
        tasks = edges.tasks(blocks)
        share(
            kernels.pull,
            tasks,
            flat,
            tables,
            edges.merged,
            norms,
            along,
            d_flat,
            d_tables,
            sums,
        )
        total = torch.from_numpy(sums.sum(axis=0)).view(blocks, 2, 2, LANES)
        d_shift = total[:, 0].float()
        d_weight = (total[:, 1] * inverse).float()
        d_mean = torch.zeros_like(mean) if ctx.count is not None else -scale * d_shift
        if ctx.count is not None and any(ctx.needs_input_grad[:2]):
            # The gradients of weight and shift stay this rank's own: DDP adds them up.
            shared = sum_over_ranks(total) / max(ctx.count, 1)
            slope = -scale * inverse.square() * shared[:, 1]
            offset = -scale * shared[:, 0]
            line = torch.stack((mean, slope, offset), dim=1).float()
            lines = line.numpy().reshape(blocks, -1)
            share(
                kernels.correct,
                tasks,
                flat,
                tables,
                edges.merged,
                lines,
                d_flat,
                d_tables,
            )
        d_table = None
        if wants_table:
            for part in range(1, parts):
                d_tables[0] += d_tables[part]
            d_table = torch.from_numpy(d_tables[0]).view_as(table)
        return d_products, d_table, d_weight, d_shift, d_mean, None, None, None
