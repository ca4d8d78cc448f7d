"""A store of labelled alloys that the package makes itself."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from crysdistill.corpus.build import build
from crysdistill.demo import alloy_corpus
from crysdistill.graphs.batch import GraphSettings
from crysdistill.store.store import Store
from crysdistill.structures.elements import symbols

LABEL = "volume_per_atom"

FEWEST = 6
"""The least number of atoms in a crystal, so that the average is about ten."""


def alloy_store(folder: Path, crystals: int) -> Store:
    """Make alloys and build their store.

    Args:
        folder: where the files go.
        crystals: the number of alloys to make, before small ones are left out.
    """
    alloys = [c for c in alloy_corpus(crystals, 0) if len(c.atomic_numbers) >= FEWEST]
    source = folder / "alloys"
    source.mkdir()
    with (source / "structures.jsonl").open("w", encoding="utf-8") as file:
        for crystal in alloys:
            entry = {
                "id": crystal.material_id,
                "lattice": crystal.cell.tolist(),
                "species": [symbols()[z] for z in crystal.atomic_numbers],
                "frac": crystal.frac_coords.tolist(),
            }
            file.write(json.dumps(entry) + "\n")
    with (source / "properties.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", LABEL])
        for crystal in alloys:
            volume = abs(float(np.linalg.det(crystal.cell)))
            writer.writerow([crystal.material_id, volume / len(crystal.atomic_numbers)])
    graph = GraphSettings(mode="nearest")
    report = build(
        [source / "structures.jsonl"], folder / "alloys.h5", graph=graph, progress=False
    )
    return Store.open(report.store)
