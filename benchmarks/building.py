"""Structures to a store's arrays, with and without symmetry."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from itertools import islice

import numpy as np
import orjson
from pymatgen.core import Lattice, Structure

from benchmarks.published import published_gaussians, published_graph
from benchmarks.timing import Row, data, take_turns
from crysdistill.corpus.shards import BuildSettings, build_shard
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.sources import Record

COUNT = 150
EVERY = 1000  # measure one line in this many


def lines() -> list[bytes]:
    """Return lines from all over the unlabelled corpus."""
    path = data() / "mp_corpus" / "structures.jsonl.gz"
    with gzip.open(path) as file:
        return list(islice(file, 0, COUNT * EVERY, EVERY))


def _published(line: bytes) -> None:
    entry = orjson.loads(line)
    structure = Structure(Lattice(entry["lattice"]), entry["species"], entry["frac"])
    published_gaussians(published_graph(structure)[1])


def measure() -> Iterator[Row]:
    """Compare on the same lines of JSON, one core."""
    some = lines()
    records = [Record("corpus", f"{n}", "flat", line) for n, line in enumerate(some)]
    atoms = np.mean([len(orjson.loads(line)["species"]) for line in some])
    candidates = {"published": lambda: [_published(line) for line in some]}
    for engine in ("fast", "spglib", None):
        settings = BuildSettings(GraphSettings(), symmetry=engine)
        candidates[str(engine)] = lambda settings=settings: build_shard(
            records, (), settings
        )
    seconds = take_turns(candidates, repeats=5)
    for engine, what, goal in (
        ("fast", "two space groups (`fast`), fingerprint", ">= 10x"),
        ("spglib", "two space groups (`spglib`), fingerprint", ""),
        ("None", "fingerprint, no symmetry", ">= 50x"),
    ):
        yield Row(
            f"structures to a store: checks, neighbours, {what}; {atoms:.0f} atoms",
            f"{COUNT / seconds['published']:.0f} structures/s",
            f"{COUNT / seconds[engine]:,.0f} structures/s",
            seconds["published"] / seconds[engine],
            goal,
        )
