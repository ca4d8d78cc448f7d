"""The gated sum over neighbours: compiled where it can be, in PyTorch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, distances
from crysdistill.kernels.gate.compiled import (
    CompiledEdges,
    compiled_gated_sum,
    merge_edges,
)
from crysdistill.kernels.gate.table import GaussianTable, read
from crysdistill.layers.normalization import BatchNorm


@dataclass(frozen=True)
class PlainEdges:
    """The edges of a batch as PyTorch reads them.

    Args:
        centre: (E,).
        neighbour: (E,).
        row: (E,), the first of four rows of the table.
        weights: (E, 4), of those rows.
        rows: (2 M, K), the Gaussians at all knots.
    """

    centre: Tensor
    neighbour: Tensor
    row: Tensor
    weights: Tensor
    rows: Tensor

    lanes = None
    """All channels stand together in products and tables."""


def find_edges(
    batch: CrystalBatch, table: GaussianTable, compiled: bool = True
) -> PlainEdges | CompiledEdges:
    """Return the edges of a batch, with the places of their lengths in a table.

    Compiled code is for the CPU and single precision, for graphs whose edges are
    sorted by centre and stay in their crystals, and for distances without gradients.

    Args:
        batch: of crystals.
        table: where to look distances up.
        compiled: whether to use compiled code where possible.
    """
    geometry = batch.frac_coords, batch.cell
    if (
        compiled
        and not torch.compiler.is_compiling()
        and not any(tensor.requires_grad for tensor in geometry)
        and {(t.device.type, t.dtype) for t in (*geometry, table.rows)}
        == {("cpu", torch.float32)}
    ):
        merged = merge_edges(batch, table)
        if merged is not None:
            return merged
    neighbour, centre = batch.edge_index
    row, weights = table.locate(distances(batch))
    return PlainEdges(centre, neighbour, row, weights, table.rows)


def gated_sum(
    products: Tensor,
    bias: Tensor,
    table: Tensor,
    edges: PlainEdges | CompiledEdges,
    norms: tuple[BatchNorm, BatchNorm] | None = None,
) -> Tensor:
    """Sum sigmoid(gate) softplus(core) over the neighbours of each atom.

    Of z_ij = own_i + other_j + table(d_ij) + bias the gate is one half and the core the
    other, each after its batch norm, if there is one. Channels stand in C blocks of
    `edges.lanes`, or in a single block.

    Under autocast the products may come in half precision; from there on everything
    is in single precision.

    Args:
        products: (N, C, 4, lanes): gate and core of `own`, then of `other`.
        bias: (C, 2, lanes), of gate and core.
        table: (C, 2 M, 2, lanes): gate and core; see `GaussianTable`.
        edges: of the batch.
        norms: of gate and core; their running statistics move where they train.

    Returns:
        (N, F).
    """
    with torch.autocast(products.device.type, enabled=False):
        if products.dtype != torch.float64:
            products, bias, table = products.float(), bias.float(), table.float()
        if isinstance(edges, CompiledEdges):
            return compiled_gated_sum(products, bias, table, edges, norms)
        return plain_gated_sum(products, bias, table, edges, norms)


def plain_gated_sum(
    products: Tensor,
    bias: Tensor,
    table: Tensor,
    edges: PlainEdges,
    norms: tuple[BatchNorm, BatchNorm] | None = None,
) -> Tensor:
    """Do the same in PyTorch alone, on any device and in any precision."""
    n, blocks, _, lanes = products.shape
    flat = products.permute(2, 0, 1, 3).reshape(4, n, blocks * lanes)  # (4, N, F)
    rows = table.permute(1, 2, 0, 3).reshape(table.shape[1], -1)  # (2 M, 2 F)
    along = read(rows, edges.row, edges.weights)  # (E, 2 F)
    bias = bias.transpose(0, 1).reshape(2, -1)  # (2, F)
    parts = []
    for k, part in enumerate(along.chunk(2, dim=1)):
        z = part + (flat[k] + bias[k]).index_select(0, edges.centre)
        z = z + flat[k + 2].index_select(0, edges.neighbour)  # (E, F)
        parts.append(z if norms is None else norms[k](z))
    gate, core = parts
    messages = torch.sigmoid(gate) * F.softplus(core)  # (E, F)
    total = messages.new_zeros(n, blocks * lanes)
    return total.index_add(0, edges.centre, messages)
