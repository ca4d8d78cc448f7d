"""Batches from a store, against PyG's collation of one `Data` per crystal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Batch, Data

from benchmarks.timing import Row, data, take_turns
from crysdistill.corpus.build import build
from crysdistill.store.store import Store

BATCH = 256


def measure() -> Iterator[Row]:
    """Compare random batches of the same crystals, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.h5"
        source = data() / "perovskites" / "structures.jsonl.gz"
        build([source], path, symmetry=None, progress=False)
        store = Store.open(path)
        pieces = [_as_data(store, row) for row in range(4096)]
        chosen = np.random.default_rng(0).integers(0, 4096, (8, BATCH))
        seconds = take_turns(
            {
                "pyg": lambda: [
                    Batch.from_data_list([pieces[row] for row in rows])
                    for rows in chosen
                ],
                "ours": lambda: [store.batch(rows) for rows in chosen],
            }
        )
        size = path.stat().st_size / len(store)
        edges = int(store.edge_offsets[-1]) / len(store)
        atoms = int(store.atom_offsets[-1]) / len(store)
    crystals = chosen.size
    yield Row(
        f"random batches of {BATCH}, {atoms:.0f} atoms per crystal (PyG: from memory)",
        f"{crystals / seconds['pyg']:,.0f} crystals/s",
        f"{crystals / seconds['ours']:,.0f} crystals/s",
        seconds["pyg"] / seconds["ours"],
        ">= 10x",
    )
    yield Row(
        f"store, {atoms:.1f} atoms and {edges:.0f} edges per crystal, with two labels",
        "",
        f"{size:.0f} bytes per crystal, {size / edges:.1f} per edge",
        None,
        "< 500 at 9 atoms and 12 neighbours",
    )


def _as_data(store: Store, row: int) -> Data:
    batch = store.batch([row])
    return Data(
        atomic_numbers=batch.atomic_numbers,
        frac_coords=batch.frac_coords,
        cell=batch.cell,
        edge_index=batch.edge_index,
        edge_shift=batch.edge_shift,
        space_groups=batch.space_groups,
        targets=torch.zeros(1, 2),
        num_nodes=batch.num_nodes,
    )
