"""The compiled matcher agrees with pymatgen's, and rejects no true match."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import spglib
from pymatgen.core import Lattice

from crysdistill.overlap import (
    CrystalList,
    find_overlap,
    find_overlaps,
    matching,
    verdicts,
)
from crysdistill.overlap.cells import niggli
from crysdistill.overlap.listing import pair_digest, pair_table
from crysdistill.overlap.proximity import alike, exchanges, pair_distances, part_means
from crysdistill.store.fingerprints import (
    composition,
    compositions,
    distances,
    fingerprint,
)
from crysdistill.structures.crystal import Crystal
from tests.conftest import crystal as make_crystal
from tests.conftest import random_crystal
from tests.test_overlap import collection, disguises, exchange, parents, polymorphs

TESTS = ("same", "supercell", "strained", "averaged", "anonymous")


def by_pymatgen(first: Crystal, second: Crystal, test: str) -> bool:
    """The verdict of pymatgen alone, on its own primitive cells."""
    return matching.agree_by_pymatgen(first, second, test)


def comparable(first: Crystal, second: Crystal, test: str) -> bool:
    counts = sorted(len(c.atomic_numbers) for c in (first, second))
    if counts[1] % counts[0]:
        return False
    factor = counts[1] // counts[0]
    return 1 < factor <= 8 if test == "supercell" else factor == 1


def old_primitive(crystal: Crystal, test: str) -> Crystal:
    """The primitive cell by spglib and pymatgen, even if the given one is primitive."""
    cell, frac, numbers = spglib.find_primitive(
        (crystal.cell, crystal.frac_coords, crystal.atomic_numbers), 1e-3, 5.0
    )
    if len(numbers) < len(crystal.atomic_numbers):
        numbers = numbers.astype(np.uint8)
        crystal = Crystal(crystal.material_id, numbers, frac, cell)
    reduced = crystal.to_pymatgen().get_reduced_structure(reduction_algo="niggli")
    tolerance = 0.02 if test == "strained" else 0.25
    return Crystal.from_pymatgen(
        reduced.get_primitive_structure(tolerance=tolerance), crystal.material_id
    )


# pymatgen takes seconds for their large symmetric cells.
SLOW = ("MgAl2O4",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in parents()],
)
def test_disguises_get_the_verdicts_of_pymatgen(name: str) -> None:
    parent = parents()[name]
    clothes = ("stretched", "sheared", "shaken", "all together", "mirrored")
    dressed = disguises(parent, 4)
    one = Crystal.from_pymatgen(parent, name)
    for test in TESTS:
        for kind in clothes:
            other = Crystal.from_pymatgen(dressed[kind], kind)
            cells = [matching.primitive(c, test) for c in (one, other)]
            if not comparable(*cells, test):
                continue
            answer = matching.compiled_answer(*cells, test)
            assert answer in (None, by_pymatgen(*cells, test)), (kind, test)


def test_polymorphs_get_the_verdicts_of_pymatgen() -> None:
    clear = 0
    for forms in polymorphs().values():
        crystals = [Crystal.from_pymatgen(s, name) for name, s in forms.items()]
        for first, second in itertools.combinations(crystals, 2):
            for test in TESTS:
                cells = [matching.primitive(c, test) for c in (first, second)]
                if not comparable(*cells, test):
                    continue
                answer = matching.compiled_answer(*cells, test)
                assert answer in (None, by_pymatgen(*cells, test)), (first, second)
                clear += answer is not None
    assert clear > 20


def test_a_value_at_the_edge_of_a_tolerance_is_left_to_pymatgen() -> None:
    cube = Crystal("a", np.array([26], np.uint8), np.zeros((1, 3)), 2.8 * np.eye(3))
    edge = 1.1 ** (2 / 3)  # at equal volumes, one length differs by 10 % exactly

    def long(factor: float) -> Crystal:
        cell = np.diag([1.0, 1.0, factor])
        return replace(cube, cell=cell * 2.8 / np.cbrt(factor))

    exact = long(edge ** (9 / 4))
    answers = [matching.compiled_answer(cube, long(f), "same") for f in (1.05, 1.3)]
    assert answers == [True, False]
    lengths = np.diag(exact.cell) / 2.8
    assert max(lengths) == pytest.approx(1.1)
    assert matching.compiled_answer(cube, exact, "same") is None
    assert matching.agree(cube, exact, "same") == by_pymatgen(cube, exact, "same")


def test_a_shift_to_either_side_is_left_to_pymatgen() -> None:
    """An atom halfway between two images of its partner could go to either."""
    numbers = np.array([26, 8], np.uint8)
    thin = np.diag([2.4, 2.5, 12.0])

    def sheet(x: float) -> Crystal:
        return Crystal("a", numbers, np.array([[0, 0, 0], [x, 0, 0.3]]), thin)

    answers = [matching.compiled_answer(sheet(0), sheet(x), "same") for x in (0.3, 0.5)]
    assert answers == [True, None]
    verdict = matching.agree(sheet(0), sheet(0.5), "same")
    assert verdict == by_pymatgen(sheet(0), sheet(0.5), "same")


@pytest.mark.parametrize("seed", range(20))
def test_niggli_cells_equal_those_of_pymatgen(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * 5
    if seed % 2:  # a skewed cell of a symmetric lattice
        shape = rng.integers(-3, 4, (3, 3)) + 4 * np.eye(3, dtype=int)
        cell = shape @ np.array([[0, 2, 2], [2, 0, 2], [2, 2, 0.0]])
    basis = niggli(cell, abs(np.linalg.det(cell)))
    assert abs(np.linalg.det(basis)) == pytest.approx(1)
    ours = Lattice(basis @ cell)
    theirs = Lattice(cell).get_niggli_reduced_lattice()
    np.testing.assert_allclose(ours.parameters, theirs.parameters, atol=1e-4)


@pytest.mark.parametrize("name", [*parents(), "tilted", "random"])
def test_no_cell_that_repeats_is_taken_for_primitive(name: str) -> None:
    structure = parents().get(name)
    if name == "tilted":  # periodic within 0.25 Å, not within 0.02 Å
        structure = polymorphs()["SrTiO3"]["tilted"]
    structure = structure or random_crystal(5, atoms=6).to_pymatgen()
    dressed = disguises(structure, 3)
    for kind in ("plain", "supercell", "slanted supercell", "conventional", "shaken"):
        crystal = Crystal.from_pymatgen(dressed.get(kind, structure), kind)
        for test in ("same", "strained"):
            tolerance = 0.02 if test == "strained" else 0.25
            plain = matching.primitive_already(crystal, tolerance)
            cell = old_primitive(crystal, test)
            if plain is not None:
                assert len(cell.atomic_numbers) == len(crystal.atomic_numbers)
                np.testing.assert_allclose(cell.volume, crystal.volume)


# ------------------------------------------------------------------------ fingerprints


def test_compositions_of_many_are_those_of_each() -> None:
    crystals = CrystalList(random_crystal(seed, atoms=4 + seed) for seed in range(12))
    offsets, species, amounts = compositions(
        crystals.atom_offsets, crystals.atomic_numbers
    )
    for row, crystal in enumerate(crystals.crystals):
        expected = composition(crystal.atomic_numbers)
        some = slice(offsets[row], offsets[row + 1])
        np.testing.assert_array_equal(species[some], expected[0])
        np.testing.assert_array_equal(amounts[some], expected[1])


@pytest.mark.parametrize("amounts", [(1,), (1, 1), (1, 1, 2), (1, 1, 1, 3, 3)])
def test_all_pairs_that_are_alike_are_found(amounts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    size = len(amounts)
    first = 1 + rng.random((9, size, 64)).astype(np.float32)
    # From nearly equal to very different, with allowed exchanges of species.
    orders = exchanges(amounts)
    scale = np.geomspace(1e-3, 0.3, 40)[:, None, None]
    source = first[rng.integers(0, 9, 40)]
    second = np.stack([c[orders[rng.integers(len(orders))]] for c in source])
    second += (scale * rng.normal(size=second.shape)).astype(np.float32)
    flat, others = first.reshape(-1, 64), second.reshape(-1, 64)
    starts, other_starts = np.arange(9) * size, np.arange(40) * size
    means = part_means(starts, size, flat)
    other_means = part_means(other_starts, size, others)
    by_level = np.argsort(other_means.mean(axis=1))
    rows, partners, lengths, near, near_length = alike(
        np.arange(9),
        means,
        by_level,
        other_means,
        starts,
        other_starts,
        flat,
        others,
        orders,
        0.05,
        np.ones(9, bool),
    )
    [(_, ordered, exchanged)] = distances(first, second, amounts)
    expected = set(zip(*np.nonzero(exchanged <= 0.05), strict=True))
    assert set(zip(rows, partners, strict=True)) == expected
    assert expected
    np.testing.assert_allclose(lengths, exchanged[rows, partners], atol=1e-9)
    np.testing.assert_array_equal(near, exchanged.argmin(axis=1))
    np.testing.assert_allclose(near_length, exchanged.min(axis=1), atol=1e-9)
    i, j = np.indices((9, 40)).reshape(2, -1)
    found = pair_distances(starts[i], other_starts[j], np.full(360, size), flat, others)
    np.testing.assert_allclose(found, ordered.reshape(-1), atol=1e-9)


# --------------------------------------------------------------------- several datasets


def test_several_datasets_in_one_search_give_what_each_gives() -> None:
    corpus = collection(parents())
    salt, rutile = parents()["NaCl"], parents()["rutile"]
    sets = {
        "one": collection({"NaCl": salt, "x": salt * [1, 1, 2]}),
        "two": collection({"r": rutile, "t": exchange(rutile, Ti="Sn")}),
        "three": corpus,
    }
    together = find_overlaps(corpus, sets)
    for overlap, side in zip(together, sets.values(), strict=True):
        alone = find_overlap(corpus, side)
        assert overlap.hash == alone.hash
        assert overlap.counts == alone.counts
    assert find_overlaps(corpus, {}) == []


def test_groups_are_found_only_where_the_answer_hangs_on_them(monkeypatch) -> None:
    asked = []

    def count(crystal: Crystal) -> tuple[int, int]:
        asked.append(crystal.material_id)
        return 1, 1

    monkeypatch.setattr(verdicts, "space_groups", count)
    corpus = collection(parents())
    dataset = collection({f"{name} again": s for name, s in parents().items()})
    overlap = find_overlap(corpus, dataset, kinds=["structure"])
    assert overlap.counts["structure"]["dataset"] == len(parents())
    assert asked == []


def test_the_table_of_pairs_is_sorted_and_names_a_pair_once() -> None:
    pairs = np.array([[1, 0, 3], [0, 0, 1], [2, 0, 0], [0, 1, 2]])
    table = pair_table(pairs, ["b", "a", "b"], ["y", "x"], ["i", "s", "p", "f"])
    assert table.to_numpy().tolist() == [
        ["b", "x", "p"],
        ["b", "y", "i"],
        ["a", "y", "f"],
    ]
    assert pair_digest({"a": 1}, table) != pair_digest({"a": 2}, table)
    none = pair_table(np.empty((0, 3), np.int64), [], [], ["i"])
    assert none.empty
    assert list(none.columns) == ["corpus_id", "dataset_id", "kind"]


# ------------------------------------------------------------------------ real crystals


@pytest.mark.slow
def test_real_pairs_get_the_verdicts_of_pymatgen(shared_data) -> None:
    """All 500 pairs of one formula get pymatgen's verdict under each of four tests."""
    forms = defaultdict(list)
    with gzip.open(shared_data / "mp36k" / "structures.jsonl.gz") as lines:
        for line in itertools.islice(lines, 20000):
            record = json.loads(line)
            counts = Counter(record["species"])
            divisor = math.gcd(*counts.values())
            key = tuple(sorted((e, n // divisor) for e, n in counts.items()))
            forms[key].append(record)
    rng = np.random.default_rng(0)
    several = [group for group in forms.values() if len(group) > 1]
    pairs: list[tuple[Crystal, Crystal]] = []
    for place in rng.permutation(len(several)).tolist():
        group = [
            make_crystal(r["id"], r["lattice"], r["species"], r["frac"])
            for r in several[place][:4]
        ]
        for first, second in itertools.combinations(group, 2):
            [(_, ordered, _)] = distances(
                *(fingerprint(c)[None] for c in (first, second)),
                tuple(range(len(np.unique(first.atomic_numbers)))),
            )
            ratio = first.volume / len(first.atomic_numbers)
            ratio /= second.volume / len(second.atomic_numbers)
            if ordered[0, 0] <= 0.08 and 1 / 1.2 <= ratio <= 1.2:
                pairs.append((first, second))
        if len(pairs) >= 500:
            break
    assert len(pairs) >= 500
    cells: dict[tuple[str, bool], Crystal] = {}

    def cell(one: Crystal, exact: bool) -> Crystal:
        """Return the cell that all tests of one tolerance share; cached."""
        key = one.material_id, exact
        if key not in cells:
            cells[key] = old_primitive(one, "strained" if exact else "same")
        return cells[key]

    agreed = defaultdict(int)
    for first, second in pairs:
        for test in TESTS[:4]:
            ours = [matching.primitive(c, test) for c in (first, second)]
            theirs = [cell(c, test == "strained") for c in (first, second)]
            verdict = comparable(*theirs, test) and by_pymatgen(*theirs, test)
            assert matching.agree(*ours, test) == verdict, (first, second, test)
            agreed[test, verdict] += 1
    assert agreed["same", True] > 30
    assert agreed["same", False] > 100
