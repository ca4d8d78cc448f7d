"""Among real crystals, all planted pairs are found, and polymorphs are not merged."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from crysdistill.overlap import CrystalList, find_overlap
from crysdistill.structures.crystal import Crystal

pytestmark = pytest.mark.slow

PER_TEST = 60  # structures per test; five tests make 300
DIFFERENT = 0.02  # eV/atom; relaxations of one crystal differ by less


@cache
def records(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "structures.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def structure(record: dict[str, Any]) -> Structure:
    return Structure(Lattice(record["lattice"]), record["species"], record["frac"])


def collection(structures: dict[str, Structure]) -> CrystalList:
    return CrystalList(Crystal.from_pymatgen(s, name) for name, s in structures.items())


# ---------------------------------------------------------------------- planted pairs


def supercell(rng: np.random.Generator, size: int) -> np.ndarray:
    """Any supercell of this size, as a Hermite normal form."""
    shapes = [
        (a, b, size // (a * b))
        for a in range(1, size + 1)
        for b in range(1, size + 1)
        if size % (a * b) == 0
    ]
    a, b, c = shapes[rng.integers(len(shapes))]
    matrix = np.diag([a, b, c])
    matrix[0, 1:] = rng.integers(0, [b, c])
    matrix[1, 2] = rng.integers(0, c)
    return matrix


def rotation(rng: np.random.Generator) -> np.ndarray:
    matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return matrix * np.sign(np.linalg.det(matrix))


def expansion(rng: np.random.Generator) -> float:
    """A factor for lengths that changes the volume by 1 to 5 %, up or down."""
    return (1 + rng.choice([-1, 1]) * rng.uniform(0.01, 0.05)) ** (1 / 3)


def shear(rng: np.random.Generator) -> np.ndarray:
    """A strain of at most 2 % in any component that keeps the volume."""
    strain = rng.uniform(-0.02, 0.02, (3, 3))
    strain = (strain + strain.T) / 2
    return np.eye(3) + strain - np.eye(3) * np.trace(strain) / 3


def disguises(
    parent: Structure, rng: np.random.Generator
) -> Iterator[tuple[str, Structure]]:
    """Yield other descriptions of the same crystal."""
    cell, frac = parent.lattice.matrix, parent.frac_coords
    plain = np.arange(len(parent))

    def sites(cell: np.ndarray, frac: np.ndarray, order: np.ndarray) -> Structure:
        species = [parent[i].specie for i in order]
        return Structure(Lattice(cell), species, frac[order])

    noise = rng.normal(scale=0.01, size=frac.shape) @ np.linalg.inv(cell)
    size = 2 if len(parent) > 20 else int(rng.integers(2, 5))
    conventional = SpacegroupAnalyzer(parent, 0.01).get_conventional_standard_structure
    yield "supercell", parent * supercell(rng, size)
    yield "primitive", parent.get_primitive_structure(tolerance=0.01)
    yield "conventional", conventional()
    yield "reduced", parent.get_reduced_structure()
    yield "shuffled", sites(cell, frac, rng.permutation(len(parent)))
    yield "translated", sites(cell, frac + rng.random(3), plain)
    yield "rotated", sites(cell @ rotation(rng), frac, plain)
    yield "strained", sites(cell * expansion(rng), frac, plain)
    yield "sheared", sites(cell @ shear(rng), frac, plain)
    yield "shaken", sites(cell, frac + noise, plain)
    other = conventional() if rng.random() < 0.5 else parent
    if len(other) <= 60:
        other = other * supercell(rng, 2)
    cell = other.lattice.matrix @ shear(rng) @ rotation(rng) * expansion(rng)
    order = rng.permutation(len(other))
    species = [other[i].specie for i in order]
    together = (other.frac_coords + rng.random(3))[order]
    yield "all together", Structure(Lattice(cell), species, together)


@pytest.mark.parametrize("seed", range(5))
def test_every_disguise_of_real_crystals_is_seen_through(shared_data, seed):
    known = records(shared_data / "mp36k")
    rng = np.random.default_rng(seed)
    chosen = [known[row] for row in rng.permutation(len(known))[:PER_TEST]]
    corpus = {record["id"]: structure(record) for record in chosen}
    dataset = {
        f"{name}, {clothes}": other
        for name, parent in corpus.items()
        for clothes, other in disguises(parent, rng)
    }
    overlap = find_overlap(
        collection(corpus), collection(dataset), kinds=["structure"], workers=1
    )
    found = {(c, d) for c, d, _ in overlap.pairs.itertuples(index=False)}
    missed = [d for d in dataset if (d.partition(",")[0], d) not in found]
    assert len(dataset) == 11 * PER_TEST
    assert missed == []


# ------------------------------------------------------------------------- polymorphs


def formula(record: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    counts = Counter(record["species"])
    divisor = math.gcd(*counts.values())
    return tuple(sorted((e, n // divisor) for e, n in counts.items()))


def test_real_polymorphs_are_not_merged(shared_data):
    """Few crystals of one formula and clearly different energies are merged.

    Energies may differ for the same atomic positions if the calculations had other
    magnetic orders or valences. So a few pairs are allowed.
    """
    folder = shared_data / "mp36k"
    with (folder / "properties.csv").open(newline="") as file:
        energies = {
            row["material_id"]: float(row["formation_energy_per_atom"] or "nan")
            for row in csv.DictReader(file)
        }
    forms = defaultdict(list)
    for record in records(folder):
        forms[formula(record)].append(record)
    several = [group for group in forms.values() if 1 < len(group) <= 12]
    rng = np.random.default_rng(0)
    groups = [several[row] for row in rng.permutation(len(several))[:200]]
    crystals = {r["id"]: structure(r) for group in groups for r in group}
    different = {
        pair
        for group in groups
        for pair in itertools.combinations([r["id"] for r in group], 2)
        if abs(energies[pair[0]] - energies[pair[1]]) > DIFFERENT
    }
    side = collection(crystals)
    overlap = find_overlap(side, side, kinds=["id", "structure"], workers=1)
    merged = {
        (c, d)
        for c, d, kind in overlap.pairs.itertuples(index=False)
        if kind == "structure"
    }
    assert len(different) > 250
    assert len(different & merged) / len(different) < 0.02, different & merged
