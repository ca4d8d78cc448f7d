"""Triplets: pairs of edges that meet in an atom, and the angles between them.

The training step makes them from a batch; they are never stored. There are some twelve
for each edge, and they need no search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, edge_vectors, replace

__all__ = [
    "DistinctAngles",
    "Triplets",
    "add_reverse_edges",
    "distinct_angles",
    "find_triplets",
    "sum_over_triplets",
]


@dataclass(frozen=True, slots=True)
class Triplets:
    """P pairs of edges (k -> j, j -> i), sorted by the second edge.

    Atom k may be atom i, by the same bond or through another image. The pairs are the
    edges of the line graph, whose nodes are the E edges: the first edge sends a message
    to the second.

    Args:
        first: (P,) int64, the edge from k to j.
        second: (P,) int64, the edge from j to i.
        cosine: (P,), of the angle at j, between k and i.
        ptr: (E + 1,) int64, the first triplet of each second edge.
    """

    first: Tensor
    second: Tensor
    cosine: Tensor
    ptr: Tensor


def find_triplets(batch: CrystalBatch) -> Triplets:
    """Pair every edge with all edges that arrive at the atom where it starts.

    With 12 neighbours there are 12 triplets for each edge: the edges that arrive at its
    source. The cosine is differentiable in the positions and the cell. It is 0 beside
    an edge of length zero, which has no direction.
    """
    source, n_edges = batch.edge_index[0], batch.num_edges
    arriving = (batch.neighbor_ptr[1:] - batch.neighbor_ptr[:-1])[source]  # (E,)
    ptr = torch.zeros(n_edges + 1, dtype=torch.int64, device=source.device)
    torch.cumsum(arriving, 0, out=ptr[1:])
    n_triplets = int(ptr[-1])  # the only number that is read from a device
    edges = torch.arange(n_edges, device=source.device)
    second = torch.repeat_interleave(edges, arriving, output_size=n_triplets)  # (P,)
    # The edges that arrive at an atom are consecutive, so counting finds them.
    offset = batch.neighbor_ptr[source] - ptr[:-1]  # (E,)
    first = torch.arange(n_triplets, device=source.device) + offset[second]  # (P,)
    return Triplets(first, second, _cosine(batch, first, second), ptr)


def _cosine(batch: CrystalBatch, first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of the angles at the common atom of two edges, (P,)."""
    direction = F.normalize(edge_vectors(batch), dim=1)  # (E, 3), from i to j
    # Seen from j, k lies along the first edge's vector and i against the second's.
    to_k, to_j = direction[first], direction[second]  # (P, 3)
    return -(to_k * to_j).sum(1).clamp(-1.0, 1.0)


@dataclass(frozen=True, slots=True)
class DistinctAngles:
    """The distinct cosines of P triplets, D of them.

    A triplet and its mirror image (i -> j, j -> k) have the same angle, and symmetry
    makes many more equal: in the crystals of the Materials Project D is a sixth of P.
    Numbers that depend only on the angle are computed for D rows.

    Args:
        cosine: (D,).
        place: (P,) int64, the row of each triplet.
        counts: (D,) int64, triplets of each row.
    """

    cosine: Tensor
    place: Tensor
    counts: Tensor


def distinct_angles(triplets: Triplets) -> DistinctAngles:
    """Return the distinct cosines of triplets, rounded to 1e-6 (1e-10 in float64).

    If derivatives are required, every triplet keeps its own row.
    """
    cosine = triplets.cosine
    if cosine.requires_grad:
        place = torch.arange(len(cosine), device=cosine.device)
        return DistinctAngles(cosine, place, torch.ones_like(place))
    step = 1e-10 if cosine.dtype == torch.float64 else 1e-6
    steps, place, counts = torch.unique(
        (cosine / step).round().long(), return_inverse=True, return_counts=True
    )
    return DistinctAngles(steps.to(cosine.dtype) * step, place, counts)


def sum_over_triplets(messages: Tensor, triplets: Triplets) -> Tensor:
    """Sum the messages to each edge from the edges before it: (P, ...) to (E, ...)."""
    edges = len(triplets.ptr) - 1
    total = messages.new_zeros(edges, *messages.shape[1:])
    return total.index_add(0, triplets.second, messages)


def add_reverse_edges(batch: CrystalBatch) -> tuple[CrystalBatch, Tensor]:
    """Add the missing reverse edges, so that neighbours are mutual.

    Graphs with a fixed number of neighbours are directed: an atom need not be among the
    twelve nearest neighbours of its own twelve. Missing reverse edges are added;
    existing pairs of an edge and its reverse do not change.

    Args:
        batch: any graph without fake or repeated edges, with at most 700,000 atoms.

    Returns:
        The batch, with the edges of each centre sorted by neighbour and image, and the
        places of the old edges in it, (E,).
    """
    atoms = batch.num_nodes
    neighbour, centre = batch.edge_index
    shift = batch.edge_shift.long()
    # Encode an edge as one number, so that sorting finds existing edges: centre,
    # neighbour and the lattice translation, whose parts are 8-bit integers.
    weights = torch.tensor([1 << 16, 1 << 8, 1], device=shift.device)
    image, back = (((sign * shift + 128) * weights).sum(1) for sign in (1, -1))
    forward = ((centre * atoms + neighbour) << 24) + image
    reverse = ((neighbour * atoms + centre) << 24) + back
    edges, place = torch.unique(torch.cat((forward, reverse)), return_inverse=True)
    pair = edges >> 24
    centre = pair // max(atoms, 1)
    counts = torch.bincount(centre, minlength=atoms)
    parts = [(edges >> bits & 255) - 128 for bits in (16, 8, 0)]
    whole = replace(
        batch,
        edge_index=torch.stack((pair - centre * atoms, centre)),
        edge_shift=torch.stack(parts, dim=1).to(batch.edge_shift.dtype),
        neighbor_ptr=torch.cat((counts.new_zeros(1), counts.cumsum(0))),
    )
    return whole, place[: len(forward)]
