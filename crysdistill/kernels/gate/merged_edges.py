"""The edges of a batch, measured, merged and looked up, for compiled code."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.kernels.gate.table import GaussianTable
from crysdistill.machine_code import machine_code

SAME = 1e-6  # Å; float32 coordinates know distances no better

PART = 4096
"""Edges from which on a batch is worked on in parts. They depend on the batch alone:
sums in the same order are the same on any number of threads."""

PARTS = 64
"""Parts of the largest batches."""


class MergedEdges(NamedTuple):
    """Edges by centre and length; those that say the same stand once, with a count.

    Crystals have few different lengths: an edge is as long as its reverse, and as those
    that a symmetry makes of it.

    Args:
        atoms: (B + 1,) int64, the first atom of each crystal.
        first: (N + 1,) int64, the first edge of each centre.
        neighbour: (E,) uint32.
        length: (E,) uint32, which of the crystal's lengths it has.
        times: (E,) float32, how many edges have this centre, neighbour and length.
        lengths: (B + 1,) int64, the first length of each crystal.
        row: (L,) uint32, the first of four rows of the table for each length.
        weights: (L, 4) float32, of those four rows.
    """

    atoms: np.ndarray
    first: np.ndarray
    neighbour: np.ndarray
    length: np.ndarray
    times: np.ndarray
    lengths: np.ndarray
    row: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class CompiledEdges:
    """The edges of a batch as compiled code reads them.

    Args:
        count: E, before equal ones were merged.
        rows: (2 M, K), the Gaussians at the knots that are used, and no others.
        merged: their arrays.
        parts: the first crystal of each part of the batch, and the one behind its last.
    """

    count: int
    rows: Tensor
    merged: MergedEdges
    parts: list[tuple[int, int]]


def merge_edges(batch: CrystalBatch, table: GaussianTable) -> CompiledEdges | None:
    """Return edges for compiled code, or None where it is not made for them.

    It is for the CPU and single precision, for graphs whose edges are sorted by centre
    and stay in their crystals, and for distances without gradients.

    Args:
        batch: of crystals.
        table: where to look distances up.
    """
    geometry = batch.frac_coords, batch.cell
    kinds = {(tensor.device.type, tensor.dtype) for tensor in (*geometry, table.rows)}
    if (
        kinds != {("cpu", torch.float32)}
        or any(tensor.requires_grad for tensor in geometry)
        or torch.compiler.is_compiling()
    ):
        return None
    count, atoms = batch.edge_index.shape[1], int(batch.num_nodes)
    ptr = batch.ptr.numpy()
    edge_index = batch.edge_index.contiguous().numpy()
    distance = np.empty(count)
    coords, cell = (tensor.numpy() for tensor in geometry)
    if not measure(coords, cell, edge_index, batch.edge_shift.numpy(), ptr, distance):
        return None
    padding = getattr(batch, "padding", None)
    if padding is not None:
        distance[padding.numpy()] = batch.padding_distance
    edges = MergedEdges(
        atoms=ptr,
        first=np.empty(atoms + 1, np.int64),
        neighbour=np.empty(count, np.uint32),
        length=np.empty(count, np.uint32),
        times=np.empty(count, np.float32),
        lengths=np.empty(len(ptr), np.int64),
        row=np.empty(count, np.uint32),
        weights=np.empty((count, 4), np.float32),
    )
    used = np.empty(table.knots, bool)
    found = merge(distance, edge_index, table.step, used, edges)
    rows = table.at(torch.from_numpy(used.nonzero()[0]))
    size = max(PART, -(-found // PARTS))
    before = edges.first[ptr]  # (B + 1,), edges before each crystal
    cuts = np.searchsorted(before, np.arange(size, found, size))
    bounds = np.unique([0, *cuts, len(ptr) - 1])
    return CompiledEdges(count, rows, edges, list(pairwise(bounds.tolist())))


@machine_code
def measure(
    frac_coords: np.ndarray,
    cell: np.ndarray,
    edge_index: np.ndarray,
    edge_shift: np.ndarray,
    ptr: np.ndarray,
    distance: np.ndarray,
) -> bool:
    """Fill the lengths of edges, in double precision as far as coordinates allow.

    Args:
        frac_coords: (N, 3).
        cell: (B, 3, 3), Å.
        edge_index: (2, E), neighbours and centres.
        edge_shift: (E, 3).
        ptr: (B + 1,) the first atom of each crystal.
        distance: (E,) float64, Å, what to fill.

    Returns:
        Whether centres are in order and all neighbours are of their crystal.
    """
    total = len(distance)
    e = 0
    for b in range(len(ptr) - 1):
        for i in range(ptr[b], ptr[b + 1]):
            while e < total and edge_index[1, e] == i:
                j = edge_index[0, e]
                if j < ptr[b] or j >= ptr[b + 1]:
                    return False
                squares = 0.0
                for k in range(3):
                    along = 0.0
                    for a in range(3):
                        steps = np.float64(frac_coords[j, a])
                        steps += np.float64(edge_shift[e, a])
                        steps -= np.float64(frac_coords[i, a])
                        along += steps * np.float64(cell[b, a, k])
                    squares += along * along
                distance[e] = np.sqrt(squares)
                e += 1
    return e == total


@machine_code
def merge(
    distance: np.ndarray,
    edge_index: np.ndarray,
    step: float,
    used: np.ndarray,
    edges: MergedEdges,
) -> int:
    """Fill merged edges and return their number.

    Small cells reach the same neighbour through several of their sides at the same
    distance; messages of such edges are equal, so one is computed and counted.

    Args:
        distance: (E,) float64, Å.
        edge_index: (2, E), neighbours and centres, in the order of centres.
        step: Å, between knots.
        used: (M,) bool, what to fill: which knots of the table are used. Others are
            left out where `edges.row` counts rows.
        edges: what to fill, with room for all edges and lengths.
    """
    total, knots = len(distance), len(used)
    order = np.empty(total, np.int64)  # of each centre's edges by their length
    length = np.empty(total, np.int64)
    stop = np.empty(len(edges.first), np.int64)
    used[:] = False
    edges.first[0] = edges.lengths[0] = 0
    begin, new, lengths = 0, 0, 0
    for b in range(len(edges.atoms) - 1):
        end = begin
        for i in range(edges.atoms[b], edges.atoms[b + 1]):
            stop[i] = end
            while end < total and edge_index[1, end] == i:
                end += 1
        shortest = np.nan
        for e in begin + np.argsort(distance[begin:end], kind="mergesort"):
            if not distance[e] - shortest <= SAME:  # NaN is like no other
                shortest = distance[e]
                x = shortest / step
                m = 0
                if x >= knots - 1:
                    m, x = knots - 2, np.float64(knots - 1)
                elif x > 0:  # not NaN
                    m = int(x)
                t = x - m
                used[m] = used[m + 1] = True
                edges.row[lengths] = m
                edges.weights[lengths, 0] = (1 + 2 * t) * (1 - t) * (1 - t)
                edges.weights[lengths, 1] = t * (1 - t) * (1 - t)
                edges.weights[lengths, 2] = t * t * (3 - 2 * t)
                edges.weights[lengths, 3] = -t * t * (1 - t)
                lengths += 1
            i = edge_index[1, e]
            order[stop[i]] = e
            stop[i] += 1
            length[e] = lengths - 1 - edges.lengths[b]
        k = begin
        for i in range(edges.atoms[b], edges.atoms[b + 1]):
            while k < stop[i]:
                e = order[k]
                same = new - 1
                while same >= edges.first[i] and edges.length[same] == length[e]:
                    if edges.neighbour[same] == edge_index[0, e]:
                        break
                    same -= 1
                if same < edges.first[i] or edges.length[same] != length[e]:
                    edges.neighbour[new] = edge_index[0, e]
                    edges.length[new] = length[e]
                    edges.times[new] = 0
                    same = new
                    new += 1
                edges.times[same] += 1
                k += 1
            edges.first[i + 1] = new
        edges.lengths[b + 1] = lengths
        begin = end
    rank = np.cumsum(used)
    for k in range(lengths):
        edges.row[k] = 2 * (rank[edges.row[k]] - 1)
    return new
