"""The crystals of mp36k on which the published programs ran."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from pymatgen.core import Lattice, Structure
from torch import Tensor

from crysdistill.structures.crystal import Crystal
from tests.conftest import from_structure

NAMES = ("mp-39", "mp-30496", "mp-29677", "mp-29752", "mp-29644", "mp-31515")
"""Names in the order of the known answers."""


def six_crystals(shared_data: Path) -> list[Crystal]:
    found = {}
    path = shared_data / "mp36k" / "structures.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if any(f'"{name}"' in line[:40] for name in NAMES):
                row = json.loads(line)
                structure = Structure(
                    Lattice(row["lattice"]), row["species"], row["frac"]
                )
                found[row["id"]] = from_structure(row["id"], structure)
    return [found[name] for name in NAMES]


def arrays(path: Path) -> dict[str, Tensor]:
    """Read the numbers of an `.npz` file."""
    with np.load(path, allow_pickle=False) as file:
        return {
            name: torch.from_numpy(file[name])
            for name in file.files
            if file[name].dtype.kind in "fiub"
        }
