"""Verdicts on pairs of crystals, by compiled code and by pymatgen; a whole search."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.timing import Row, data
from crysdistill.overlap import CrystalList, find_overlap, matching
from crysdistill.overlap.sides import open_side
from crysdistill.store.fingerprints import composition, distances, fingerprint
from crysdistill.structures.crystal import Crystal

PAIRS = 2000
TESTS = ("same", "supercell", "strained", "averaged")
ALIKE = 0.08  # largest distance of fingerprints that passes the search


def measure() -> Iterator[Row]:
    """Yield the table's rows: 2,000 real pairs of one formula, and one search."""
    corpus = open_side(data() / "mp36k").crystals
    assert isinstance(corpus, CrystalList)  # noqa: S101 - for the type checker
    pairs = real_pairs(corpus.crystals, PAIRS)
    spent: dict[str, float] = defaultdict(float)
    differ = doubtful = asked = 0

    def timed(name: str, do: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.process_time()
        result = do(*arguments)
        spent[name] += time.process_time() - begun
        return result

    for first, second in pairs:
        for test in TESTS:
            cells = [
                timed("cell", matching.primitive, c, test) for c in (first, second)
            ]
            sizes = sorted(len(c.atomic_numbers) for c in cells if c is not None)
            times = sizes[-1] // sizes[0] if len(sizes) == 2 else 0
            wanted = 1 < times <= 8 if test == "supercell" else times == 1
            if not wanted or sizes[1] % sizes[0]:
                continue
            asked += 1
            ours = timed("ours", matching.compiled_answer, *cells, test)
            theirs = timed("pymatgen", matching.agree_by_pymatgen, *cells, test)
            doubtful += ours is None
            differ += ours not in (None, theirs)
    yield Row(
        f"verdict on two crystals ({len(pairs):,} pairs, {asked:,} verdicts)",
        f"pymatgen: {1e3 * spent['pymatgen'] / asked:.1f} processor ms",
        f"{1e3 * spent['ours'] / asked:.2f} processor ms",
        spent["pymatgen"] / spent["ours"],
        f"none differs: {differ}; left to pymatgen: {doubtful}",
    )
    labelled = open_side(data() / "elasticity").crystals
    before, begun = processor_seconds(), time.perf_counter()
    found = find_overlap(corpus, labelled, kinds=["id", "structure"])
    seconds = time.perf_counter() - begun
    yield Row(
        f"overlap of {len(labelled):,} crystals with {len(corpus):,}, no store",
        "",
        f"{seconds:.0f} s, {processor_seconds() - before:.0f} processor s",
        None,
        found.statement,
    )


def real_pairs(crystals: list[Crystal], most: int) -> list[tuple[Crystal, Crystal]]:
    """Return pairs of one formula that a search would hand to the matcher."""
    forms = defaultdict(list)
    for crystal in crystals:
        forms[tuple(map(tuple, composition(crystal.atomic_numbers)))].append(crystal)
    several = [group for group in forms.values() if len(group) > 1]
    found: list[tuple[Crystal, Crystal]] = []
    for place in np.random.default_rng(0).permutation(len(several)).tolist():
        for first, second in combinations(several[place][:5], 2):
            one, other = fingerprint(first)[None], fingerprint(second)[None]
            [(_, ordered, _)] = distances(one, other, range(one.shape[1]))
            if ordered[0, 0] <= ALIKE:
                found.append((first, second))
        if len(found) >= most:
            break
    return found[:most]


def processor_seconds() -> float:
    """Return the processor time of this process and its finished children."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)
