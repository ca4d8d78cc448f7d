"""Edges that are alike, so that work on them can be done once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, distances

_BITS = 11
"""Of a number that holds two kinds of atoms and 2^41 lengths."""


class Distinct(NamedTuple):
    """The distinct edges of a batch, D kinds of E edges.

    In a crystal both directions of an edge are equally long, and so are the edges of
    a shell: what depends on the distance alone is worked out for D rows, a seventh of
    E in the crystals of the Materials Project.

    Args:
        distances: (D,), Å.
        place: (E,) int64, the kind of each edge.
        example: (D,) int64, an edge of each kind.
    """

    distances: Tensor
    place: Tensor
    example: Tensor


def distinct_edges(batch: CrystalBatch, kinds: Tensor | None = None) -> Distinct:
    """Return the edges of a batch that differ in length.

    Distances are rounded to 2e-6 Å, about what float32 coordinates round away
    (1e-10 Å in float64), each by itself, so that those of one crystal do not depend
    on the others in its batch. Where somebody asks for derivatives with respect to
    positions, every edge is of its own kind.

    Args:
        batch: whose edges.
        kinds: (N,) int64 below 2048, of atoms; edges then differ also where their
            neighbours or their centres do.
    """
    length = distances(batch)  # (E,)
    each = torch.arange(len(length), device=length.device)
    if length.requires_grad:
        return Distinct(length, each, each)
    step = 1e-10 if length.dtype == torch.float64 else 2e-6
    keys = (length / step).round().long()
    if kinds is not None:
        neighbour, centre = kinds[batch.edge_index]
        keys = (keys << 2 * _BITS) + (neighbour << _BITS) + centre
    keys, place = torch.unique(keys, return_inverse=True)
    if kinds is not None:
        keys = keys >> 2 * _BITS
    example = torch.empty_like(keys).scatter_(0, place, each)
    return Distinct(keys.to(length.dtype) * step, place, example)
