"""Batches made by hand: random neighbour lists, no geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from crysdistill.graphs.batch import CrystalBatch, GraphSettings, assemble
from crysdistill.objectives import Embedded


@dataclass(frozen=True)
class Toy:
    """A crystal as its neighbour lists; neighbours are numbered from 0."""

    row: int
    atomic_numbers: list[int]
    neighbours: list[list[int]]
    space_group: int = 0


def toy(row: int, atoms: int, space_group: int = 0, degree: int = 4) -> Toy:
    """Between 1 and 2 x `degree` random neighbours for each atom, repeats welcome."""
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


def with_space_groups(batch_toys: Sequence[Toy], numbers: Sequence[int]) -> list[Toy]:
    return [replace(t, space_group=n) for t, n in zip(batch_toys, numbers, strict=True)]


def embed(
    batch: CrystalBatch, width: int = 8, seed: int = 0, dtype=torch.float64
) -> Embedded:
    """Random embeddings that require gradients."""
    source = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> torch.Tensor:
        x = torch.randn(rows, width, generator=source, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    return Embedded(batch, draw(batch.num_nodes), draw(batch.num_graphs))


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))
