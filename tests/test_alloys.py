"""Generated alloys: the same on every machine, and physically right."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from crysdistill.demo import (
    METALS,
    PROPERTIES,
    alloy_corpus,
    alloys,
    demo_sets,
    label_alloys,
    prototype_of,
    prototypes,
)
from crysdistill.demo.emt import atomic_volumes, radius, symbols_of
from crysdistill.errors import InputError
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import atomic_numbers_by_symbol


def to_atoms(crystal: Crystal) -> Atoms:
    return Atoms(
        crystal.atomic_numbers,
        cell=crystal.cell,
        scaled_positions=crystal.frac_coords,
        pbc=True,
    )


def volume_per_atom(crystal: Crystal) -> float:
    return abs(np.linalg.det(crystal.cell)) / len(crystal.atomic_numbers)


def content_hash(crystals: list[Crystal]) -> str:
    digest = hashlib.sha256()
    for crystal in crystals:
        digest.update(crystal.material_id.encode())
        for array in (crystal.atomic_numbers, crystal.frac_coords, crystal.cell):
            digest.update(array.tobytes())
        digest.update(repr(sorted(crystal.properties.items())).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def corpus() -> list[Crystal]:
    return alloy_corpus(3000, seed=0)


@pytest.fixture(scope="module")
def labelled(corpus: list[Crystal]) -> list[Crystal]:
    return label_alloys(corpus[:100])


# --- The same everywhere -------------------------------------------------------------


def test_another_process_makes_the_same_bytes(corpus, labelled):
    program = (
        "from tests.test_alloys import *\n"
        "print(content_hash(alloy_corpus(300, seed=0)))\n"
        "print(content_hash(label_alloys(alloy_corpus(20, seed=0))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [
        content_hash(corpus[:300]),
        content_hash(labelled[:20]),
    ]


def test_a_shorter_corpus_is_the_beginning_of_a_longer_one(corpus):
    assert content_hash(alloy_corpus(20, seed=0)) == content_hash(corpus[:20])


def test_another_seed_makes_another_corpus(corpus):
    other = alloy_corpus(100, seed=1)
    kinds = {crystal.material_id.rsplit("-", 1)[0] for crystal in corpus[:100]}
    assert sum(c.material_id.rsplit("-", 1)[0] in kinds for c in other) < 20


# --- Structures ----------------------------------------------------------------------


def test_ids_tell_prototype_and_formula():
    assert prototype_of("A15-AlNi3-0123") == "A15"
    assert prototype_of("AB2_oP6_58_a_g-CuPt2-12345") == "AB2_oP6_58_a_g"
    names = {prototype.name for prototype in prototypes(16)}
    for crystal in alloy_corpus(400, seed=3):
        prototype, formula, _ = crystal.material_id.split("-")
        counts = Counter(symbols_of(crystal))
        largest = max(counts, key=counts.get)
        assert largest in formula
        assert prototype in names


def test_corpus_is_distinct_unlabelled_and_of_two_to_four_metals(corpus):
    assert len(corpus) == 3000
    assert len({c.material_id for c in corpus}) == 3000
    assert len({c.material_id.rsplit("-", 1)[0] for c in corpus}) == 3000
    numbers = atomic_numbers_by_symbol()
    allowed = {numbers[symbol] for symbol in METALS}
    for crystal in corpus:
        present = set(crystal.atomic_numbers.tolist())
        assert present <= allowed
        assert 2 <= len(present) <= 4
        assert len(crystal.atomic_numbers) <= 16
        assert crystal.atomic_numbers.dtype == np.uint8
        assert crystal.properties == {}
        assert np.all((crystal.frac_coords >= 0) & (crystal.frac_coords < 1))


def test_each_round_takes_every_prototype_once(corpus):
    count = len(prototypes(16))
    first = [prototype_of(crystal.material_id) for crystal in corpus[:count]]
    assert sorted(first) == sorted(prototype.name for prototype in prototypes(16))


def test_volumes_and_distances_are_sensible(corpus):
    radii = {atomic_numbers_by_symbol()[symbol]: radius(symbol) for symbol in METALS}
    closest = []
    for crystal in corpus[:300]:
        atoms = to_atoms(crystal)
        elemental = sum(
            atomic_volumes()[symbol] for symbol in atoms.get_chemical_symbols()
        )
        assert 0.95 < atoms.get_volume() / elemental < 2.05
        i, j, distances = neighbor_list("ijd", atoms, 3.2)
        z = crystal.atomic_numbers
        contact = np.array(
            [radii[a] + radii[b] for a, b in zip(z[i], z[j], strict=True)]
        )
        closest.append(np.min(distances / contact))
        assert distances.min() > 1.9
    assert min(closest) > 0.74  # 0.75 before the jitter
    assert 0.85 < np.mean(closest) < 1.0


def test_estimated_volumes_are_near_equilibrium(corpus, labelled):
    ratios = [
        volume_per_atom(relaxed) / volume_per_atom(crystal)
        for crystal, relaxed in zip(corpus, labelled, strict=False)
    ]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.03)
    assert np.std(ratios) < 0.08


# --- The two sets of the demo --------------------------------------------------------


def test_demo_sets_share_no_structure():
    unlabelled, dataset = demo_sets(seed=2, corpus_size=500, dataset_size=40)
    assert (len(unlabelled), len(dataset)) == (500, 40)
    assert all(set(crystal.properties) == set(PROPERTIES) for crystal in dataset)
    assert not any(crystal.properties for crystal in unlabelled)
    decorated = [c.material_id.rsplit("-", 1)[0] for c in unlabelled + dataset]
    assert len(set(decorated)) == 540
    # The dataset has one crystal of each of 40 prototypes; the corpus has them all.
    seen = {prototype_of(crystal.material_id) for crystal in dataset}
    assert len(seen) == 40
    assert seen <= {prototype_of(crystal.material_id) for crystal in unlabelled}
    other = demo_sets(seed=2, corpus_size=10, dataset_size=40)[1]
    assert content_hash(other) == content_hash(dataset)


def test_a_crystal_without_labels_is_replaced_by_the_next(monkeypatch):
    def forgetful(crystals: list[Crystal], workers: int) -> list[Crystal]:
        return [c for c in crystals if not c.material_id.endswith("-0003")]

    monkeypatch.setattr(alloys, "label_alloys", forgetful)
    unlabelled, dataset = demo_sets(seed=0, corpus_size=5, dataset_size=6)
    serials = [int(crystal.material_id[-4:]) for crystal in dataset + unlabelled]
    assert serials == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


# --- What a user can get wrong -------------------------------------------------------


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="`count` is 0 but must be at least 1"):
        alloy_corpus(0, seed=0)
    with pytest.raises(InputError, match="`max_atoms` is 1 but must be at least 2"):
        alloy_corpus(1, seed=0, max_atoms=1)
    with pytest.raises(
        InputError, match="but there are 189 alloys of at most 2 atoms; increase"
    ):
        alloy_corpus(10_000, seed=0, max_atoms=2)
    with pytest.raises(InputError, match="`corpus_size` is 0 but must be"):
        demo_sets(0, 0, 10)
    with pytest.raises(InputError, match="`dataset_size` is -1 but must be"):
        demo_sets(0, 10, -1)
    with pytest.raises(InputError, match="`mp-149` is no id of this corpus"):
        prototype_of("mp-149")
