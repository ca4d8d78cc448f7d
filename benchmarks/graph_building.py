"""Parsed structures to graphs, against `get_all_neighbors` and a sort per site."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

import numpy as np
from pymatgen.core import Lattice, Structure

from benchmarks.published import published_graph
from benchmarks.timing import Row, data, take_turns
from crysdistill.graphs.neighbors import GraphSettings, find_neighbors


def structures(count: int, max_atoms: int = 1000) -> list[Structure]:
    """Return the first structures of the labelled Materials Project set."""
    found: list[Structure] = []
    path = data() / "mp36k" / "structures.jsonl.gz"
    with gzip.open(path, "rt") as file:
        for line in file:
            r = json.loads(line)
            if len(r["species"]) <= max_atoms:
                structure = Structure(Lattice(r["lattice"]), r["species"], r["frac"])
                found.append(structure)
            if len(found) == count:
                break
    return found


def measure() -> Iterator[Row]:
    """Compare on the same structures, one core."""
    some = structures(100)
    arrays = [(s.frac_coords % 1.0, s.lattice.matrix) for s in some]
    atoms = np.mean([len(s) for s in some])
    candidates = {"published": lambda: [published_graph(s) for s in some]}
    for mode in ("nearest", "shells"):
        settings = GraphSettings(mode=mode)
        candidates[mode] = lambda settings=settings: [
            find_neighbors(*array, settings) for array in arrays
        ]
    seconds = take_turns(candidates, repeats=5)
    for mode in ("nearest", "shells"):
        yield Row(
            f"structures to graphs, `{mode}`, {atoms:.0f} atoms on average",
            f"{len(some) / seconds['published']:.0f} structures/s",
            f"{len(some) / seconds[mode]:,.0f} structures/s",
            seconds["published"] / seconds[mode],
            ">= 30x",
        )
