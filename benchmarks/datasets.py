"""Stores of real crystals for benchmarks of whole runs."""

from __future__ import annotations

import gzip
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.timing import data
from crysdistill.corpus.build import build
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.store.store import Store

CRYSTALS = "CRYSDISTILL_BENCH_CRYSTALS"
"""The environment variable that makes benchmarks of whole runs smaller."""

TARGET = "formation_energy_per_atom"
UNIT = "eV/atom"

_ALL = 33_018


def labelled_store(folder: Path, crystals: int = _ALL) -> Path:
    """Build a store of `mp36k` with the neighbours of the published graph.

    Args:
        folder: where to write it.
        crystals: about how many, spread evenly over `mp36k`;
            `CRYSDISTILL_BENCH_CRYSTALS` reduces their number.

    Returns:
        The path of the store.
    """
    out = folder / "dataset.h5"
    source = data() / "mp36k"
    every = max(1, _ALL // min(crystals, int(os.environ.get(CRYSTALS, _ALL))))
    slice_of = folder / "source"
    slice_of.mkdir()
    shutil.copyfile(source / "properties.csv", slice_of / "properties.csv")
    with (
        gzip.open(source / "structures.jsonl.gz") as lines,
        (slice_of / "structures.jsonl").open("wb") as file,
    ):
        file.writelines(islice(lines, 0, None, every))
    build(
        [slice_of / "structures.jsonl"],
        out,
        graph=GraphSettings(mode="nearest"),
        symmetry=None,
        progress=False,
    )
    shutil.rmtree(slice_of)
    return out


def write_padded(store: Store, split: dict[str, np.ndarray], path: Path) -> None:
    """Write the published program's arrays of each crystal, as flat arrays.

    As in that program, neighbours and distances are padded to twelve by atom 0 at 9 Å.
    """
    from crysdistill.graphs.batch import distances

    width = store.graph.max_neighbors
    atoms = int(store.atom_offsets[-1])
    neighbor = np.zeros((atoms, width), np.int32)
    distance = np.full((atoms, width), store.graph.cutoff + 1.0, np.float32)
    for start in range(0, len(store), 1024):
        batch = store.batch(range(start, min(start + 1024, len(store))))
        begin = batch.neighbor_ptr.numpy()
        other, centre = batch.edge_index.numpy()
        column = np.arange(len(centre)) - begin[centre]
        first = int(store.atom_offsets[start])
        own = batch.ptr.numpy()[batch.batch.numpy()[centre]]  # the crystal's first atom
        neighbor[first + centre, column] = other - own
        distance[first + centre, column] = distances(batch).numpy()
    np.savez(
        path,
        numbers=store.atomic_numbers,
        neighbor=neighbor,
        distance=distance,
        offsets=store.atom_offsets,
        targets=store.property(TARGET).astype(np.float32),
        **split,
    )
