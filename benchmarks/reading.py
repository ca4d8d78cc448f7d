"""Reading a store: open it, and take random batches from the page cache."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from benchmarks.timing import Row, data, take_turns
from crysdistill.corpus.build import build
from crysdistill.store.store import Store

BATCH = 256
STORE = "CRYSDISTILL_STORE"
"""The environment variable that names a store of the whole corpus."""


def measure() -> Iterator[Row]:
    """Measure on perovskites and, if its store has been built, on the whole corpus."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "perovskites.h5"
        source = data() / "perovskites" / "structures.jsonl.gz"
        build([source], path, symmetry=None, keep_unlabelled=True, progress=False)
        yield _batches(path, ">= 500,000 crystals/s")
    if STORE in os.environ:
        corpus = Path(os.environ[STORE])
        yield _batches(corpus, "")
        yield _opening(corpus)


def _batches(path: Path, goal: str) -> Row:
    """Compare with one read of HDF5 per array and crystal."""
    store = Store.open(path)
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, len(store), BATCH) for _ in range(40)]
    with h5py.File(path) as file:
        arrays = [
            file[f"structures/{name}"] for name in ("atomic_numbers", "frac_coords")
        ]
        edges = file["graphs/edge_codes"]
        seconds = take_turns(
            {
                "h5py": lambda: [
                    _by_h5py(store, rows, arrays, edges) for rows in chosen[:4]
                ],
                "ours": lambda: [store.batch(rows) for rows in chosen],
            }
        )
    crystals = BATCH * len(chosen)
    each = store.edge_offsets[-1] / len(store)
    plain = BATCH * 4 / seconds["h5py"]
    ours = crystals / seconds["ours"]
    return Row(
        f"random batches of {BATCH} of {len(store):,} crystals, {each:.0f} edges each "
        "(against h5py, which leaves edges packed)",
        f"{plain:,.0f} crystals/s",
        f"{ours:,.0f} crystals/s, {ours * each / 1e6:,.0f} million edges/s",
        ours / plain,
        goal,
    )


def _by_h5py(
    store: Store, rows: np.ndarray, per_atom: list[h5py.Dataset], edges: h5py.Dataset
) -> None:
    for row in rows:
        for array in per_atom:
            array[slice(*store.atom_offsets[row : row + 2])]
        edges[slice(*store.edge_offsets[row : row + 2])]


def _opening(path: Path) -> Row:
    seconds = []
    for _ in range(9):
        begun = time.perf_counter()
        store = Store.open(path)
        seconds.append(time.perf_counter() - begun)
    return Row(
        f"opening a store of {len(store):,} crystals, with every checksum compared",
        "",
        f"{1000 * float(np.median(seconds)):.0f} ms",
        None,
        "< 50 ms",
    )
