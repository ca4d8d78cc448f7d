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

SAME = 1e-6  # Å, the precision of distances from float32 coordinates

BUCKET, LONGEST = 1e-4, 1e6  # Å
SPREAD = 0x9E3779B1
"""A large odd number, which moves nearby lengths far apart."""

PART = 4096
"""A batch with more edges is processed in parts. The parts depend only on the batch, so
that sums have the same order on any number of threads."""

PARTS = 64
"""The number of parts of the largest batches."""


class MergedEdges(NamedTuple):
    """Edges by centre and length; equal edges are merged into one, with a count.

    Crystals have few different lengths: an edge is as long as its reverse, and as its
    images under symmetry.

    Args:
        atoms: (B + 1,) int64, the first atom of each crystal.
        first: (N + 1,) int64, the first edge of each centre.
        neighbour: (E,) uint32.
        length: (E,) uint32, the number of its length in the crystal.
        times: (E,) float32, the number of edges with this centre, neighbour and length.
        lengths: (B + 1,) int64, the first length of each crystal.
        row: (L,) int64, the first of four rows of the table for each length.
        weights: (L, 4) float32, the weights of those four rows.
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
    """The edges of a batch for compiled code.

    Args:
        count: E, the number before equal edges were merged.
        rows: (2 M, K), the Gaussians at the knots that are used.
        merged: the arrays of merged edges.
        parts: the first crystal of each part of the batch, and the one after its last.
    """

    count: int
    rows: Tensor
    merged: MergedEdges
    parts: list[tuple[int, int]]


def merge_edges(batch: CrystalBatch, table: GaussianTable) -> CompiledEdges | None:
    """Return edges for compiled code, or None if it does not support them.

    It supports the CPU and single precision, graphs whose edges are sorted by centre
    and stay in their crystals, and distances without gradients.

    Args:
        batch: the batch of the edges.
        table: the table of Gaussians of distances.
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
    first, lengths = np.zeros(atoms + 1, np.int64), np.zeros(len(ptr), np.int64)
    neighbour, length = np.empty((2, count), np.uint32)
    times, known = np.empty(count, np.float32), np.empty(count)
    merge(distance, edge_index, ptr, first, neighbour, length, times, lengths, known)
    rows, row, weights = table.excerpt(torch.from_numpy(known[: lengths[-1]]))
    edges = MergedEdges(
        atoms=ptr,
        first=first,
        neighbour=neighbour,
        length=length,
        times=times,
        lengths=lengths,
        row=row.numpy(),
        weights=weights.float().numpy(),
    )
    size = max(PART, -(-first[-1] // PARTS))
    # A part ends where the number of edges reaches a multiple of the size.
    cuts = np.searchsorted(first[ptr], np.arange(size, first[-1], size))
    bounds = np.unique([0, *cuts, len(ptr) - 1]).tolist()
    return CompiledEdges(count, rows, edges, list(pairwise(bounds)))


@machine_code
def measure(
    frac_coords: np.ndarray,
    cell: np.ndarray,
    edge_index: np.ndarray,
    edge_shift: np.ndarray,
    ptr: np.ndarray,
    distance: np.ndarray,
) -> bool:
    """Fill the lengths of edges, computed in double precision.

    Args:
        frac_coords: (N, 3).
        cell: (B, 3, 3), Å.
        edge_index: (2, E), neighbours and centres.
        edge_shift: (E, 3).
        ptr: (B + 1,) the first atom of each crystal.
        distance: (E,) float64, Å, the lengths to fill.

    Returns:
        Whether centres are in order and all neighbours belong to their crystal.
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
    atoms: np.ndarray,
    first: np.ndarray,
    neighbour: np.ndarray,
    length: np.ndarray,
    times: np.ndarray,
    lengths: np.ndarray,
    known: np.ndarray,
) -> None:
    """Fill merged edges, each array with room for all edges.

    Small cells reach the same neighbour through several of their sides at the same
    distance; messages of such edges are equal, so one is computed and counted.

    Args:
        distance: (E,) float64, Å.
        edge_index: (2, E), neighbours and centres, in the order of centres.
        atoms: (B + 1,); for this and the following arrays see `MergedEdges`.
        first: an array to fill; holds zeros.
        neighbour: an array to fill.
        length: an array to fill.
        times: an array to fill.
        lengths: an array to fill; holds zeros.
        known: Å, an array to fill with the lengths of all crystals, (L,).
    """
    # A hash table finds the lengths of a crystal by their bucket; it is at most half
    # full. Buckets are so wide that nearly every length lies in a single one.
    room = 2
    while room < 2 * len(distance):
        room *= 2
    slots = np.empty(room, np.int32)
    begin, new, found = 0, 0, 0
    for b in range(len(atoms) - 1):
        end = begin
        while end < len(distance) and edge_index[1, end] < atoms[b + 1]:
            end += 1
        size = 2
        while size < 2 * (end - begin):
            size *= 2
        slots[:size] = -1
        i = atoms[b]
        for e in range(begin, end):
            while i < edge_index[1, e]:
                i += 1
                first[i] = new
            d, kind = distance[e], -1
            bucket = low = high = 0
            if d < LONGEST:  # NaN equals no other length, whatever its bucket
                bucket = int(d / BUCKET)
                low, high = int((d - SAME) / BUCKET), int((d + SAME) / BUCKET)
            for near in range(low, high + 1):
                slot = (near * SPREAD) & (size - 1)
                while kind < 0 and slots[slot] >= 0:
                    if abs(d - known[slots[slot]]) <= SAME:
                        kind = int(slots[slot])
                    slot = (slot + 1) & (size - 1)
            if kind < 0:
                kind = found
                known[found] = d
                found += 1
                slot = (bucket * SPREAD) & (size - 1)
                while slots[slot] >= 0:
                    slot = (slot + 1) & (size - 1)
                slots[slot] = kind
            kind -= lengths[b]
            same = new - 1
            while same >= first[i] and (
                length[same] != kind or neighbour[same] != edge_index[0, e]
            ):
                same -= 1
            if same < first[i]:
                neighbour[new], length[new] = edge_index[0, e], kind
                times[new] = 0
                same = new
                new += 1
            times[same] += 1
        while i < atoms[b + 1]:
            i += 1
            first[i] = new
        lengths[b + 1] = found
        begin = end
