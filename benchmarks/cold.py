"""From a folder of CIFs to a trained model: the published program, and our commands."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pymatgen.core import Lattice, Structure

from benchmarks.datasets import CRYSTALS, TARGET
from benchmarks.processes import published
from benchmarks.timing import Row, data

COUNT = 2000
EPOCHS = 30
THREADS = 2


def measure() -> Iterator[Row]:
    """Compare the total time from the start of the first process to the last end."""
    with tempfile.TemporaryDirectory() as folder:
        cifs = Path(folder) / "cifs"
        cifs.mkdir()
        count = _write(cifs, min(COUNT, int(os.environ.get(CRYSTALS, COUNT))))
        print(f"{count:,} CIF files are written", flush=True)
        begun = time.perf_counter()
        published(cifs, EPOCHS, THREADS)
        theirs = time.perf_counter() - begun
        begun = time.perf_counter()
        _ours(cifs, Path(folder))
        mine = time.perf_counter() - begun
    yield Row(
        f"from {count:,} CIF files to a model, {EPOCHS} epochs, two cores",
        f"{theirs:.0f} s",
        f"{mine:.0f} s",
        theirs / mine,
        ">= 5x",
    )


def _write(folder: Path, count: int) -> int:
    """Write `ID.cif` and `id_prop.csv` for every n-th crystal of `mp36k`."""
    source = data() / "mp36k"
    with (source / "properties.csv").open() as file:
        labels = {r["material_id"]: r[TARGET] for r in csv.DictReader(file)}
    with gzip.open(source / "structures.jsonl.gz") as lines:
        chosen = list(lines)[:: len(labels) // count][:count]
    rows = []
    for line in chosen:
        entry = json.loads(line)
        lattice = Lattice(entry["lattice"])
        structure = Structure(lattice, entry["species"], entry["frac"])
        structure.to(str(folder / f"{entry['id']}.cif"))
        rows.append((entry["id"], labels[entry["id"]]))
    with (folder / "id_prop.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return len(rows)


def _ours(cifs: Path, folder: Path) -> None:
    """Build a store and train on it, by the command line."""
    store = folder / "dataset.h5"
    settings = {
        "dataset": store,
        "target.name": "target",
        "out": folder / "run",
        "optimizer.name": "sgd",
        "optimizer.lr": 0.01,
        "optimizer.weight_decay": 0,
        "optimizer.schedule": "constant",
        "trainer.epochs": EPOCHS,
        "trainer.batch_size": 256,
        "trainer.threads": THREADS,
        "trainer.accelerator": "cpu",
        "trainer.progress": "false",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    build = ("--graph", "nearest", "--no-symmetry", "--workers", str(THREADS))
    for command in (["build", cifs, "-o", store, *build], ["train", *overrides]):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "crysdistill", *map(str, command)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        )
        if done.returncode:
            raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
        seconds = time.perf_counter() - begun
        print(f"crysdistill {command[0]}: {seconds:.1f} s", flush=True)
