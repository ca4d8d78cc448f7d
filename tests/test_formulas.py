"""The formulas in weights: what they tell of a corpus, and their storage."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crysdistill.errors import InputError
from crysdistill.overlap import CrystalList, find_overlap
from crysdistill.store.formulas import Formulas, join_formulas
from crysdistill.structures.crystal import Crystal
from tests.conftest import crystal, random_crystal

OLIVINE = Structure.from_spacegroup(
    "Pnma",
    Lattice.orthorhombic(10.2, 5.98, 4.76),
    ["Mg", "Mg", "Si", "O", "O", "O"],
    [[0, 0, 0], [0.277, 0.25, 0.99], [0.094, 0.25, 0.426],
     [0.092, 0.25, 0.766], [0.447, 0.25, 0.221], [0.163, 0.033, 0.277]],
)  # fmt: skip


def of(*structures: Structure) -> CrystalList:
    return CrystalList(
        Crystal.from_pymatgen(one, f"c{k}") for k, one in enumerate(structures)
    )


def supercell(structure: Structure) -> Structure:
    return structure.copy().make_supercell([[2, 1, 0], [0, 1, 0], [0, 0, 3]])


def shuffled(structure: Structure) -> Structure:
    order = np.random.default_rng(0).permutation(len(structure))
    return Structure.from_sites([structure[int(k)] for k in order])


def elsewhere(structure: Structure) -> Structure:
    """The crystal in another setting (axes permuted) and with another origin."""
    lattice = Lattice(structure.lattice.matrix[[1, 2, 0]])
    frac = structure.frac_coords[:, [1, 2, 0]] + [0.1, 0.2, 0.3]
    return Structure(lattice, structure.species, frac)


def strained(structure: Structure) -> Structure:
    return structure.copy().apply_strain([0.03, -0.02, 0.01])


def moved(structure: Structure) -> Structure:
    return structure.copy().perturb(0.05)


@pytest.mark.parametrize("change", [supercell, shuffled, elsewhere, strained, moved])
def test_a_crystal_in_another_guise_has_the_same_formula(change: Callable):
    known = Formulas.of(of(OLIVINE))
    assert len(known) == 1
    assert known == Formulas.of(of(change(OLIVINE)))
    assert known.has(of(change(OLIVINE))).tolist() == [True]


def test_other_compositions_are_not_known():
    cubic = Lattice.cubic(4.2)
    places = [[0, 0, 0], [0.5, 0.5, 0.5]]
    salt = Structure(cubic, ["Na", "Cl"], places)
    others = [
        Structure(cubic, ["K", "Cl"], places),
        Structure(cubic, ["Na"], places[:1]),
        Structure(cubic, ["Na", "Na", "Cl"], [*places, [0.5, 0, 0]]),
        Structure(cubic, ["Na", "Cl", "Cl"], [*places, [0.5, 0, 0]]),
    ]
    assert Formulas.of(of(salt)).has(of(salt, *others)).tolist() == [True, *[False] * 4]


def test_the_hash_is_the_documented_one():
    """Later versions must read the same hashes."""
    written = np.array([14, 1, 12, 2, 8, 4], "<u4").tobytes()  # Si Mg2 O4
    digest = hashlib.blake2b(written, digest_size=4).digest()
    assert Formulas.of(of(OLIVINE)).hashes == digest


def collections() -> tuple[CrystalList, CrystalList]:
    """A corpus, and a dataset of copies, strained copies and new crystals."""
    corpus = [random_crystal(seed, 1 + seed % 5) for seed in range(40)]
    dataset = []
    for seed in range(0, 40, 3):
        one = corpus[seed]
        cell = one.cell * (1.02 if seed % 2 else 1)
        dataset.append(replace(one, material_id=f"copy-{seed}", cell=cell))
    dataset += [random_crystal(seed, 4) for seed in range(100, 130)]
    dataset.append(corpus[1])
    return CrystalList(corpus), CrystalList(dataset)


def test_what_a_search_finds_lies_within_the_bound():
    corpus, dataset = collections()
    found = find_overlap(corpus, dataset, kinds=["id", "structure"], workers=1).found
    same = found.in_dataset[:2].any(axis=0)  # (B,)
    assert found.id_clashes == 0
    assert same.sum() >= 15
    bound = Formulas.of(corpus).has(dataset)
    assert not (same & ~bound).any()
    assert not bound.all()
    formula = find_overlap(corpus, dataset, kinds=["formula"], workers=1).found
    np.testing.assert_array_equal(bound, formula.in_dataset.any(axis=0))


def test_rows_and_unions():
    corpus = collections()[0]
    first, rest = np.arange(10), np.arange(10, 40)
    parts = [Formulas.of(corpus, rows) for rows in (first, rest)]
    assert parts[0] | parts[1] == Formulas.of(corpus)
    assert join_formulas(parts) == Formulas.of(corpus)
    assert parts[0] | Formulas() == parts[0]
    assert join_formulas([*parts, None]) is None
    assert join_formulas([]) == Formulas()
    assert not Formulas().has(corpus).any()
    assert Formulas.of(corpus, np.empty(0, int)) == Formulas()


def many(count: int, seed: int = 0) -> Formulas:
    """Formulas like those of a large corpus: hashes are spread evenly."""
    draw = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    return Formulas(np.unique(draw).astype("<u4").tobytes())


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 60_000])
def test_packed_and_unpacked(count):
    formulas = many(count)
    text = formulas.packed()
    assert Formulas.unpacked(text) == formulas
    assert text.isascii()
    if count == 60_000:
        assert len(text) < 190_000


def three_atoms(elements: range) -> CrystalList:
    """All choices of three atoms, without cells; reduced formulas are unique."""
    chosen = list(itertools.combinations_with_replacement(elements, 3))
    crystals = CrystalList([])
    crystals.atom_offsets = np.arange(len(chosen) + 1) * 3
    crystals.atomic_numbers = np.array(chosen, np.uint8).ravel()
    return crystals


def test_few_formulas_share_a_hash():
    """A new formula collides with one of n formulas with probability n / 2^32."""
    every = three_atoms(range(1, 91))
    formulas = Formulas.of(every)
    count = len(every.atom_offsets) - 1
    assert count == 125_580
    # A good hash has n^2 / 2^33 = 1.8 collisions; 10 or more have probability 1e-5.
    assert count - 9 <= len(formulas) <= count
    odd = three_atoms(range(91, 101))
    assert formulas.has(odd).sum() <= 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: text[:40] + "A" + text[41:],
        lambda text: "§" + text[1:],
        lambda text: "",
        lambda text: 7,
        lambda text: Formulas.unpacked(text).hashes.hex(),
    ],
)
def test_damage_is_told(damage):
    text = "the formulas of its corpus are damaged; copy or write the file again"
    with pytest.raises(InputError, match=f"^{text}$"):
        Formulas.unpacked(damage(many(1000).packed()))


def test_an_order_that_cannot_be_is_damage(monkeypatch):
    monkeypatch.setattr(Formulas, "_numbers", np.array([5, 3], "<u4"))
    text = Formulas().packed()
    monkeypatch.undo()
    with pytest.raises(InputError, match="are damaged;"):
        Formulas.unpacked(text)


def test_an_element_has_one_formula():
    iron = crystal("fe", np.eye(3) * 2.8, ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    one = crystal("fe1", np.eye(3) * 2.5, ["Fe"], [[0, 0, 0]])
    assert Formulas.of(CrystalList([iron])) == Formulas.of(CrystalList([one]))


def read(path: Path, count: int, step: int = 1) -> CrystalList:
    """Every `step`th of the first crystals of a file of the shared data."""
    with gzip.open(path / "structures.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in itertools.islice(file, 0, count, step)]
    return CrystalList(
        crystal(r["id"], np.array(r["lattice"]), r["species"], r["frac"])
        for r in records
    )


@pytest.mark.slow
def test_on_real_crystals(shared_data):
    """Part of the Materials Project against a task that was never excluded from it."""
    corpus = read(shared_data / "mp_corpus", 20_000, step=4)
    dataset = read(shared_data / "elasticity", 1300)
    found = find_overlap(corpus, dataset, kinds=["id", "structure"], workers=1).found
    same = found.in_dataset[:2].any(axis=0)  # (B,)
    bound = Formulas.of(corpus).has(dataset)
    assert (same.sum(), bound.sum()) == (125, 245)
    assert not (same & ~bound).any()
