"""Finding equal edges, so that work on them is done once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, distances

_BITS = 11
"""Bits for an atom's kind in a key, which holds two kinds and one of 2^41 lengths."""


class Distinct(NamedTuple):
    """The distinct distances of a batch, D of them for E edges.

    In a crystal both directions of an edge have the same length, and so have the edges
    of a shell. Numbers that depend only on the distance are computed for D rows, a
    sixth of E in the crystals of the Materials Project.

    Args:
        distances: (D,), Å.
        place: (E,) int64, the row of each edge.
    """

    distances: Tensor
    place: Tensor


class DistinctEdges(NamedTuple):
    """The distinct edges of a batch, D kinds of E edges.

    Args:
        distances: (D,), Å.
        place: (E,) int64, the kind of each edge.
        example: (D,) int64, an edge of each kind.
    """

    distances: Tensor
    place: Tensor
    example: Tensor


def distinct_distances(batch: CrystalBatch) -> Distinct:
    """Return the distinct distances of a batch.

    Each distance is rounded to 2e-6 Å, about the rounding error of float32 coordinates
    (1e-10 Å in float64). So the distances of one crystal do not depend on the others in
    its batch. If derivatives with respect to positions are required, every edge keeps
    its own row.
    """
    length, step = distances(batch), _step(batch)  # (E,)
    if length.requires_grad:
        return Distinct(length, torch.arange(len(length), device=length.device))
    keys, place = torch.unique((length / step).round(), return_inverse=True)
    return Distinct(keys * step, place)


def distinct_edges(batch: CrystalBatch, kinds: Tensor) -> DistinctEdges:
    """Return the edges of a batch that differ in length, neighbour or centre.

    Args:
        batch: the batch of the edges; lengths are rounded as in `distinct_distances`.
        kinds: (N,) int64 below 2048, the kinds of atoms.
    """
    length, step = distances(batch), _step(batch)  # (E,)
    each = torch.arange(len(length), device=length.device)
    if length.requires_grad:
        return DistinctEdges(length, each, each)
    neighbour, centre = kinds[batch.edge_index]
    keys = (length / step).round().long() << 2 * _BITS
    keys += (neighbour << _BITS) + centre
    keys, place = torch.unique(keys, return_inverse=True)
    example = torch.empty_like(keys).scatter_(0, place, each)
    return DistinctEdges((keys >> 2 * _BITS).to(length.dtype) * step, place, example)


def _step(batch: CrystalBatch) -> float:
    return 1e-10 if batch.cell.dtype == torch.float64 else 2e-6
