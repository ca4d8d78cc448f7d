"""Distances that many edges share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, distances


class Distinct(NamedTuple):
    """The distinct distances of a batch, D of them for E edges.

    In a crystal both directions of an edge are equally long, and so are the edges of
    a shell: what depends on the distance alone is worked out for D rows, a seventh of
    E in the crystals of the Materials Project.

    Args:
        distances: (D,), Å.
        place: (E,) int64, the row of each edge.
    """

    distances: Tensor
    place: Tensor


def distinct_distances(batch: CrystalBatch) -> Distinct:
    """Return the distinct distances of a batch.

    Distances are rounded to 2e-6 Å, about what float32 coordinates round away
    (1e-10 Å in float64), each by itself, so that those of one crystal do not depend
    on the others in its batch. Where somebody asks for derivatives with respect to
    positions, every edge keeps a row of its own.
    """
    length = distances(batch)  # (E,)
    if length.requires_grad:
        return Distinct(length, torch.arange(len(length), device=length.device))
    step = 1e-10 if length.dtype == torch.float64 else 2e-6
    steps, place = torch.unique((length / step).round().long(), return_inverse=True)
    return Distinct(steps.to(length.dtype) * step, place)
