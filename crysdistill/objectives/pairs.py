"""Ordered pairs of atoms of one crystal, and how often an edge connects them.

The label of a pair (i, j) is the number of edges from neighbour j to centre i, clipped
to 5. There is one edge for each periodic image of j among the neighbours of i. So there
are six classes: not connected, once, ..., four times, five times or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.graphs.randomness import per_atom_integers

__all__ = ["CLASSES", "PairBlock", "Pairs", "all_pairs", "sampled_pairs"]

CLASSES = 6
_MOST = CLASSES - 1


@dataclass(frozen=True, slots=True)
class Pairs:
    """P ordered pairs, sorted by the first atom.

    Args:
        counts: (N,), the number of pairs that begin with each atom.
        first: (P,), atom i.
        second: (P,), atom j.
        labels: (P,), 0-5.
    """

    counts: Tensor
    first: Tensor
    second: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class PairBlock:
    """All ordered pairs of g crystals of similar size, padded to R x S atoms.

    Args:
        first: (g, R), the atoms i.
        second: (g, S), the atoms j.
        labels: (g, R, S) int8, 0-5; -1 where padding.
    """

    first: Tensor
    second: Tensor
    labels: Tensor


# -------------------------------------------------------------- sampled pairs


def sampled_pairs(batch: CrystalBatch, seed: int) -> Pairs:
    """Return every connected pair, and about as many that are not connected.

    Let an atom have d connected partners, and let m atoms of its crystal (itself
    included) not be connected to it. It is paired with min(d, m) of these m, evenly
    spaced from a random start, so that all m are equally likely. The cost is linear in
    edges. Fake edges of graph mode `cgcnn` do not connect.
    """
    n_atoms = batch.num_nodes
    size = (batch.ptr[1:] - batch.ptr[:-1])[batch.batch]  # (N,)
    origin = batch.ptr[batch.batch]  # (N,), the first atom of the own crystal
    second, first = batch.edge_index
    padding = getattr(batch, "padding", None)  # PyG keeps no attribute that is None
    if padding is not None:
        first, second = first[~padding], second[~padding]
    keys, times = torch.unique(first * n_atoms + second, return_counts=True)
    first, second = keys // n_atoms, keys % n_atoms  # sorted by first, then second

    partners = torch.bincount(first, minlength=n_atoms)  # (N,), d
    strangers = size - partners  # (N,), m
    draws = torch.minimum(partners, strangers)  # (N,)
    starts = _starts(partners)  # (N,)
    order = torch.arange(len(first), device=first.device) - starts[first]

    # The k-th of q evenly spaced ranks among m: (k m + t) // q, t in [0, m). All are
    # distinct, and for q = m every rank occurs.
    stranger_of, k = _enumerate(draws)  # (P',)
    random = per_atom_integers(batch, seed, "sampled pairs")  # (N,)
    t = (random % strangers.clamp(min=1))[stranger_of]
    rank = (k * strangers[stranger_of] + t) // draws[stranger_of]
    # Which atom has that rank among the strangers of i? The k-th partner of i has
    # (its number - k) strangers before it; each partner passed moves us one on.
    before = second - origin[first] - order  # (P,), not decreasing within an atom
    passed = torch.searchsorted(
        first * (n_atoms + 1) + before,
        stranger_of * (n_atoms + 1) + rank,
        right=True,
    )
    passed = passed - starts[stranger_of]
    stranger = origin[stranger_of] + rank + passed

    # The partners and strangers of one atom stand together, so nothing needs sorting.
    counts = partners + draws
    place = _starts(counts)
    total = len(first) + len(stranger)
    out = Pairs(
        counts=counts,
        first=torch.repeat_interleave(counts, output_size=total),
        second=first.new_empty(total),
        labels=first.new_zeros(total),
    )
    connected = place[first] + order
    out.second[connected] = second
    out.labels[connected] = times.clamp(max=_MOST)
    out.second[place[stranger_of] + partners[stranger_of] + k] = stranger
    return out


def _starts(counts: Tensor) -> Tensor:
    """Return where each run begins in a list of runs: (N,) to (N,)."""
    return counts.cumsum(0) - counts


def _enumerate(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the run, and the place in it, of each element of runs of these lengths."""
    run = torch.repeat_interleave(counts)
    return run, torch.arange(len(run), device=run.device) - _starts(counts)[run]


# ------------------------------------------------------------------ all pairs


def all_pairs(batch: CrystalBatch, limit: int) -> Iterator[PairBlock]:
    """Yield every ordered pair of atoms once, i = j included, block by block.

    Fake edges of graph mode `cgcnn` connect like others, as they do in CrysGNN.

    Args:
        batch: all its edges count.
        limit: the most pairs that a block holds, padding included (but no block has
            less than one row).
    """
    device = batch.ptr.device
    sizes = (batch.ptr[1:] - batch.ptr[:-1]).tolist()
    groups = _similar_sizes(sizes, limit)
    # Crystal b owns the slots base[b] + i * stride[b] + j of one long list, in which
    # each group is a padded (g, n, n) array. So one pass over the edges labels all
    # pairs.
    strides = torch.empty(len(sizes), dtype=torch.int64)
    bases = torch.empty(len(sizes), dtype=torch.int64)
    end = 0
    for group in groups:
        n, g = sizes[group[0]], len(group)
        members = torch.tensor(group)
        strides[members] = n
        bases[members] = end + torch.arange(g) * n * n
        end += g * n * n
    strides, bases = strides.to(device), bases.to(device)
    neighbour, centre = batch.edge_index
    crystal = batch.batch[centre]
    origin = batch.ptr[crystal]
    slot = bases[crystal] + (centre - origin) * strides[crystal] + neighbour - origin
    # In int32 and in place, because only this list is quadratic in atoms.
    edges = torch.ones(1, dtype=torch.int32, device=device).expand(len(slot))
    labels = torch.zeros(end, dtype=torch.int32, device=device)
    labels.scatter_add_(0, slot, edges).clamp_(max=_MOST)

    end = 0
    for group in groups:
        n, g = sizes[group[0]], len(group)
        members = torch.tensor(group, device=device)
        number = torch.arange(n, device=device)
        size = (batch.ptr[members + 1] - batch.ptr[members]).unsqueeze(1)  # (g, 1)
        real = number < size  # (g, n)
        atoms = batch.ptr[members].unsqueeze(1) + number * real  # (g, n)
        both = real.unsqueeze(2) & real.unsqueeze(1)  # (g, n, n)
        block = labels[end : end + g * n * n].view(g, n, n).to(torch.int8)
        block = block.masked_fill(~both, -1)
        end += g * n * n
        rows = max(1, limit // (g * n))
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            yield PairBlock(atoms[:, part], atoms, block[:, part])


def _similar_sizes(sizes: list[int], limit: int) -> list[list[int]]:
    """Group crystals, the largest first, so that padding stays small.

    A crystal joins a group if it has at least 60 % of the pairs of the group's largest
    crystal, or if that one is so small that a new group would cost more than padding.
    """
    groups: list[list[int]] = []
    largest = 0
    for member in sorted(range(len(sizes)), key=lambda b: -sizes[b]):
        n = sizes[member]
        if (
            groups
            and (n * n >= 0.6 * largest * largest or largest <= 8)
            and (len(groups[-1]) + 1) * largest * largest <= limit
        ):
            groups[-1].append(member)
        else:
            groups.append([member])
            largest = n
    return groups
