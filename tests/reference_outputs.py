"""Known answers of published programs: weights, inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch


class Reference(NamedTuple):
    """One published program on a handful of crystals, and the batch they make.

    Args:
        weights: by published name.
        inputs: of the program; data of edges are in the order of `batch`.
        outputs: of the program; data of edges are in the order of `batch`.
        batch: the crystals, with edges sorted by receiving atom.
    """

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    batch: CrystalBatch


def load_reference(shared_data: Path, folder: str, receiver: int) -> Reference:
    """Read a folder of known answers.

    Args:
        shared_data: the folder of real data.
        folder: the name of a folder in `reference_outputs`.
        receiver: the row of the published `edge_index` that holds receiving atoms.
    """
    path = shared_data / "reference_outputs" / folder
    if not path.is_dir():
        pytest.skip(f"known answers absent: {path}")
    inputs, outputs = (_arrays(path / f"{name}.npz") for name in ("inputs", "outputs"))
    edges = inputs["edge_index"]  # (2, E)
    order = torch.argsort(edges[receiver], stable=True)
    for values in (inputs, outputs):
        for name, value in values.items():
            if len(value) == len(order):  # one row for each edge
                values[name] = value[order]
    atoms, counts = inputs["num_atoms"], torch.bincount(edges[receiver])
    zero = torch.zeros(1, dtype=torch.int64)
    batch = CrystalBatch(
        atomic_numbers=inputs["atomic_numbers"],
        cell=torch.eye(3).repeat(len(atoms), 1, 1),
        edge_index=torch.stack((edges[1 - receiver], edges[receiver]))[:, order],
        batch=inputs["batch"],
        ptr=torch.cat((zero, atoms.cumsum(0))),
        neighbor_ptr=torch.cat((zero, counts.cumsum(0))),
        num_nodes=int(atoms.sum()),
    )
    return Reference(load_file(path / "weights.safetensors"), inputs, outputs, batch)


def agree(found: Tensor, expected: Tensor) -> None:
    """Check agreement to 1e-5 of the largest number."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {
            name: torch.from_numpy(file[name])
            for name in file.files
            if file[name].dtype.kind in "fiub"
        }
