"""Small crystals with a learnable label, as files and as stores."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crysdistill.corpus.build import build
from crysdistill.graphs.batch import GraphSettings
from crysdistill.overlap import CrystalList
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import symbols
from crysdistill.structures.symmetry import Engine
from tests.conftest import random_crystal

SMALL_GRAPH = GraphSettings(cutoff=7.0, max_neighbors=6)
SMALL_ENCODER = {"name": "cgcnn", "width": 8, "convolutions": 2, "spacing": 0.5}


MIDDLE = 0.32
"""The density label that about half of the random crystals exceed."""


def density_label(crystal: Crystal) -> float:
    """Mean atomic number per volume of an atom; quick to learn from the graph."""
    volume = abs(np.linalg.det(crystal.cell)) / len(crystal.atomic_numbers)
    return float(crystal.atomic_numbers.astype(float).mean() / volume)


def labelled(count: int, first: int = 0, **more: Any) -> list[Crystal]:
    """Return random crystals with `density`, its `class`, and the labels in `more`."""
    found = []
    for seed in range(first, first + count):
        crystal = random_crystal(seed, atoms=1 + seed % 4)
        value = density_label(crystal)
        known = {"density": value, "class": float(value > MIDDLE)}
        found.append(replace(crystal, properties={**known, **more}))
    return found


def known_by_hash(name: str) -> CrystalList:
    """A dataset of one crystal, with a hash that is easy to write."""
    dataset = CrystalList(labelled(1))
    vars(dataset)["structures_hash"] = name
    return dataset


def write_lines(path: Path, crystals: Sequence[Crystal]) -> Path:
    """Write `structures.jsonl`, and `properties.csv` if there are labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for crystal in crystals:
            line = {
                "id": crystal.material_id,
                "lattice": crystal.cell.tolist(),
                "species": [symbols()[z] for z in crystal.atomic_numbers],
                "frac": crystal.frac_coords.tolist(),
            }
            file.write(json.dumps(line) + "\n")
    names = list(dict.fromkeys(name for c in crystals for name in c.properties))
    if names:
        table = path.with_name("properties.csv")
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["material_id", *names])
            for crystal in crystals:
                cells = [_cell(crystal.properties, name) for name in names]
                writer.writerow([crystal.material_id, *cells])
    return path


def _cell(properties: Mapping[str, float], name: str) -> str:
    value = properties.get(name, np.nan)
    return "" if np.isnan(value) else repr(float(value))


def write_store(
    path: Path,
    crystals: Sequence[Crystal],
    graph: GraphSettings = SMALL_GRAPH,
    symmetry: Engine | None = None,
) -> Path:
    """Build a store of crystals from files like those of users."""
    lines = write_lines(path.with_name(f"{path.name}-source") / "s.jsonl", crystals)
    report = build(
        [lines], path, graph=graph, symmetry=symmetry, workers=1, progress=False
    )
    assert report.built == len(crystals), report.rejections
    return path


def open_store(path: Path, crystals: Sequence[Crystal], **options: Any) -> Store:
    return Store.open(write_store(path, crystals, **options))


def simple_cif(name: str, crystal: Crystal) -> str:
    """Return a CIF with all its atoms listed."""
    lengths = np.linalg.norm(crystal.cell, axis=1)
    unit = crystal.cell / lengths[:, None]
    alpha, beta, gamma = (
        np.degrees(np.arccos(unit[i] @ unit[j])) for i, j in ((1, 2), (0, 2), (0, 1))
    )
    lines = [f"data_{name}", "_symmetry_space_group_name_H-M 'P 1'"]
    lines += [
        f"_cell_length_{axis} {value:.12f}"
        for axis, value in zip("abc", lengths, strict=True)
    ]
    lines += [
        f"_cell_angle_{axis} {value:.12f}"
        for axis, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma))
    ]
    lines += ["loop_", "_atom_site_label", "_atom_site_type_symbol"]
    lines += [f"_atom_site_fract_{axis}" for axis in "xyz"]
    lines += ["_atom_site_occupancy"]
    for number, (z, frac) in enumerate(
        zip(crystal.atomic_numbers, crystal.frac_coords, strict=True)
    ):
        symbol = symbols()[z]
        lines.append(
            f"{symbol}{number} {symbol} " + " ".join(f"{x:.12f}" for x in frac) + " 1"
        )
    return "\n".join(lines) + "\n"
