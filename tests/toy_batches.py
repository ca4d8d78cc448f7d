"""Batches made by hand: random neighbour lists, no geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from crysdistill.encoders import Embeddings
from crysdistill.graphs.batch import (
    CrystalBatch,
    GraphSettings,
    assemble,
    distances,
)
from crysdistill.graphs.batch import replace as replace_in
from crysdistill.objectives import Embedded


@dataclass(frozen=True)
class Toy:
    """A crystal given by neighbour lists; neighbours are numbered from 0."""

    row: int
    atomic_numbers: list[int]
    neighbours: list[list[int]]
    space_group: int = 0


def toy(row: int, atoms: int, space_group: int = 0, degree: int = 4) -> Toy:
    """Between 1 and 2 x `degree` random neighbours per atom, with repeats."""
    rng = np.random.default_rng(1000 + row)
    return Toy(
        row=row,
        atomic_numbers=rng.integers(1, 101, atoms).tolist(),
        neighbours=[
            rng.integers(0, atoms, rng.integers(1, 2 * degree + 1)).tolist()
            for _ in range(atoms)
        ],
        space_group=space_group,
    )


def batch_of(
    toys: Sequence[Toy], settings: GraphSettings | None = None
) -> CrystalBatch:
    lists = [neighbours for t in toys for neighbours in t.neighbours]
    numbers = [z for t in toys for z in t.atomic_numbers]
    neighbour = torch.tensor([j for neighbours in lists for j in neighbours])
    return assemble(
        torch.tensor(numbers),
        torch.zeros(len(numbers), 3),
        torch.eye(3).expand(len(toys), 3, 3),
        torch.tensor([len(t.atomic_numbers) for t in toys]),
        neighbour,
        torch.zeros(len(neighbour), 3, dtype=torch.int8),
        torch.tensor([len(neighbours) for neighbours in lists]),
        settings or GraphSettings(),
        rows=torch.tensor([t.row for t in toys]),
        space_groups=torch.tensor([t.space_group for t in toys]),
        material_ids=[f"toy-{t.row}" for t in toys],
    )


def reordered(batch: CrystalBatch, order: torch.Tensor) -> CrystalBatch:
    """The same crystals with reordered atoms: the new atom k is the old `order[k]`."""
    place = order.argsort()
    ends = place[batch.edge_index]
    edges = ends[1].argsort(stable=True)
    counts = torch.bincount(ends[1], minlength=len(order))
    own = {
        name: batch[name][order]
        for name in ("atomic_numbers", "frac_coords", "masked_atoms")
        if name in batch
    }
    return replace_in(
        batch,
        **own,
        edge_index=ends[:, edges],
        edge_shift=batch.edge_shift[edges],
        padding=batch.padding[edges] if "padding" in batch else None,
        neighbor_ptr=torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))),
    )


def with_space_groups(batch_toys: Sequence[Toy], numbers: Sequence[int]) -> list[Toy]:
    return [replace(t, space_group=n) for t, n in zip(batch_toys, numbers, strict=True)]


def embedded(
    batch: CrystalBatch, atoms: torch.Tensor, crystals: torch.Tensor
) -> Embedded:
    return Embedded(batch, Embeddings(atoms, crystals))


def embed(
    batch: CrystalBatch, width: int = 8, seed: int = 0, dtype=torch.float64
) -> Embedded:
    """Random embeddings that require gradients."""
    source = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> torch.Tensor:
        x = torch.randn(rows, width, generator=source, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    return embedded(batch, draw(batch.num_nodes), draw(batch.num_graphs))


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def check_batch(batch: CrystalBatch, settings: GraphSettings | None = None) -> None:
    """Compare everything that counts atoms or edges, by plain loops.

    Args:
        batch: every atom has an edge.
        settings: their cutoff limits the edges; no check if None.
    """
    n, b = batch.num_nodes, batch.num_graphs
    ptr, neighbor_ptr = batch.ptr.tolist(), batch.neighbor_ptr.tolist()
    assert ptr[0] == 0
    assert ptr[-1] == n == len(batch.atomic_numbers) == len(batch.frac_coords)
    assert all(first < end for first, end in pairwise(ptr))
    owners = [c for c in range(b) for _ in range(ptr[c], ptr[c + 1])]
    assert batch.batch.tolist() == owners
    neighbour, centre = batch.edge_index.tolist()
    assert len(neighbour) == batch.num_edges == neighbor_ptr[-1]
    assert len(neighbor_ptr) == n + 1
    for atom, (first, end) in enumerate(pairwise(neighbor_ptr)):
        assert first < end, f"atom {atom} has no edge"
        assert centre[first:end] == [atom] * (end - first)
        assert {owners[j] for j in neighbour[first:end]} == {owners[atom]}
    assert batch.edge_shift.shape == (len(centre), 3)
    assert batch.edge_index.dtype == batch.ptr.dtype == torch.int64
    assert batch.neighbor_ptr.dtype == batch.batch.dtype == torch.int64
    assert batch.cell.shape == (b, 3, 3)
    assert len(batch.rows) == len(batch.space_groups) == b
    for name in ("masked_atoms", "copy_of"):
        assert name not in batch or len(batch[name]) == n
    if "padding" in batch:
        assert batch.padding.shape == (len(centre),)
        assert (batch.padding | (distances(batch) <= batch.padding_distance)).all()
    else:
        shifts = map(tuple, batch.edge_shift.tolist())
        edges = set(zip(neighbour, centre, shifts, strict=True))
        assert len(edges) == len(centre)  # none twice
        assert all(j != i or any(shift) for j, i, shift in edges)  # no loops
    if settings is not None:
        assert (distances(batch) <= settings.cutoff + 1e-4).all()
