"""Do the engines agree? `python -m benchmarks.symmetry [EVERY]`.

Compares spglib, moyopy and the engine `fast` on the unlabelled corpus, or on every n-th
of its structures, on all cores.
"""

from __future__ import annotations

import gzip
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

import numpy as np
import orjson

from benchmarks.timing import data
from crysdistill.errors import BadStructure
from crysdistill.structures.readers import read_flat
from crysdistill.structures.symmetry import (
    SYMPREC,
    crystal_system,
    moyopy_groups,
    space_group,
    space_groups,
)

ENGINES = {
    "spglib": lambda crystal: [space_group(crystal, s) for s in SYMPREC],
    "moyopy": lambda crystal: moyopy_groups(crystal, SYMPREC),
    "fast": space_groups,
}


def _compare(lines: Sequence[bytes]) -> list[tuple[list[Sequence[int]], list[float]]]:
    """Return groups and seconds of each engine for each structure."""
    found = []
    for line in lines:
        try:
            crystal = read_flat(orjson.loads(line), "line")
        except BadStructure:
            continue
        groups, seconds = [], []
        for engine in ENGINES.values():
            begun = time.perf_counter()
            groups.append(engine(crystal))
            seconds.append(time.perf_counter() - begun)
        found.append((groups, seconds))
    return found


def _chunks(every: int) -> Iterator[list[bytes]]:
    with gzip.open(data() / "mp_corpus" / "structures.jsonl.gz") as file:
        lines = islice(file, 0, None, every)
        while chunk := list(islice(lines, 200)):
            yield chunk


def main() -> None:
    """Print how often the engines differ from spglib, and the time of each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    with ProcessPoolExecutor() as pool:
        found = [row for part in pool.map(_compare, _chunks(every)) for row in part]
    groups = np.array([row[0] for row in found])  # (B, engines, tolerances)
    seconds = np.array([row[1] for row in found]).sum(axis=0)
    print(f"{len(found):,} structures")
    print("| engine | symprec (Å) | other space group | other crystal system | s |")
    print("|---|---|---|---|---|")
    for number, engine in enumerate(ENGINES):
        for place, symprec in enumerate(SYMPREC):
            label, ours = groups[:, 0, place], groups[:, number, place]
            group, system = label != ours, crystal_system(label) != crystal_system(ours)
            print(
                f"| {engine} | {symprec} | {group.sum():,} ({group.mean():.2%}) "
                f"| {system.sum():,} ({system.mean():.2%}) | {seconds[number]:.0f} |"
            )


if __name__ == "__main__":
    main()
