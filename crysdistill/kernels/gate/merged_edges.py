"""The edges of a batch, measured, merged and looked up, for compiled code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crysdistill.machine_code import machine_code

SAME = 1e-6  # Å; float32 coordinates know distances no better


class MergedEdges(NamedTuple):
    """Edges by centre and distance; those that say the same stand once, with a count.

    Args:
        neighbour: (E,) int32.
        row: (E,) int32, the first of four rows of the table.
        weights: (4 E,) float32, of those four rows.
        times: (E,) float32, how many edges have this centre, neighbour and distance.
        first: (N + 1,) int64, the first edge of each centre.
    """

    neighbour: np.ndarray
    row: np.ndarray
    weights: np.ndarray
    times: np.ndarray
    first: np.ndarray


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
        edges: what to fill, with room for all edges.
    """
    total, knots = len(distance), len(used)
    order = np.empty(total, np.int64)
    kept = np.empty(total, np.float64)
    used[:] = False
    e, new = 0, 0
    for i in range(len(edges.first) - 1):
        edges.first[i] = new
        begin = e
        while e < total and edge_index[1, e] == i:
            k = e  # insert by distance; most come in that order
            while k > begin and distance[order[k - 1]] > distance[e]:
                order[k] = order[k - 1]
                k -= 1
            order[k] = e
            e += 1
        for k in range(begin, e):
            j = edge_index[0, order[k]]
            d = distance[order[k]]
            same = new - 1
            while same >= edges.first[i] and d - kept[same] <= SAME:
                if edges.neighbour[same] == j:
                    break
                same -= 1
            if same >= edges.first[i] and d - kept[same] <= SAME:
                edges.times[same] += 1
                continue
            kept[new] = d
            edges.neighbour[new] = j
            edges.times[new] = 1
            x = d / step
            m = 0
            if x >= knots - 1:
                m, x = knots - 2, np.float64(knots - 1)
            elif x > 0:  # not NaN
                m = int(x)
            t = x - m
            used[m] = used[m + 1] = True
            edges.row[new] = m
            edges.weights[4 * new] = (1 + 2 * t) * (1 - t) * (1 - t)
            edges.weights[4 * new + 1] = t * (1 - t) * (1 - t)
            edges.weights[4 * new + 2] = t * t * (3 - 2 * t)
            edges.weights[4 * new + 3] = -t * t * (1 - t)
            new += 1
    edges.first[-1] = new
    rank = np.cumsum(used)
    for e in range(new):
        edges.row[e] = 2 * (rank[edges.row[e]] - 1)
    return new
