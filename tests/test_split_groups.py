"""The crystals that a split keeps together: textbook and real structures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crysdistill.corpus.build import build
from crysdistill.errors import InputError
from crysdistill.overlap import CrystalList, find_overlap
from crysdistill.splits import (
    GROUPINGS,
    SplitSettings,
    find_groups,
    make_folds,
    make_split,
)
from crysdistill.splits.groups import with_elements
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from tests.conftest import from_structure

FCC = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
CUBE = [[-1, 1, 1], [1, -1, 1], [1, 1, -1]]  # of primitive fcc cells


def fcc(a: float, *species: str) -> Structure:
    """A primitive fcc cell with one atom, or with two as in rock salt."""
    sites = [[0.0] * 3, [0.5] * 3][: len(species)]
    return Structure(Lattice(a * FCC), species, sites)


def simple(a: float, *species: str) -> Structure:
    """Two atoms as in CsCl; bcc if both are the same element."""
    return Structure(Lattice.cubic(a), species, [[0.0] * 3, [0.5] * 3])


def rutile() -> Structure:
    u, v = 0.305, 0.5 + 0.305
    oxygen = [[u, u, 0], [-u, -u, 0], [v, 1 - v, 0.5], [1 - v, v, 0.5]]
    return Structure(
        Lattice.tetragonal(4.594, 2.959),
        ["Ti"] * 2 + ["O"] * 4,
        [[0] * 3, [0.5] * 3, *oxygen],
    )


@pytest.fixture(scope="module")
def textbook() -> CrystalList:
    """Three rock salts, two of them twice, and other types, with space groups."""
    found = {
        "MgO-rs": (fcc(4.21, "Mg", "O"), 225),
        "MgO-cube": (fcc(4.2, "Mg", "O") * CUBE, 225),
        "NaCl-rs": (fcc(5.64, "Na", "Cl"), 225),
        "NaCl-super": (fcc(5.64, "Na", "Cl") * (2, 1, 1), 225),
        "PbTe-rs": (fcc(6.46, "Pb", "Te"), 225),
        "CsCl": (simple(4.12, "Cs", "Cl"), 221),
        "NaCl-high-pressure": (simple(3.0, "Na", "Cl"), 221),
        "fcc-Cu": (fcc(3.61, "Cu"), 225),
        "bcc-Fe": (simple(2.87, "Fe", "Fe"), 229),
        "TiO2": (rutile(), 136),
    }
    crystals = [from_structure(name, s) for name, (s, _) in found.items()]
    groups = np.array([[g, g] for _, g in found.values()], np.uint8)
    return CrystalList(crystals, groups)


def by_group(crystals: CrystalList, by: str, **more: int) -> dict[str, set[str]]:
    groups = find_groups(crystals, np.arange(len(crystals)), by, **more)
    found: dict[str, set[str]] = {}
    for row, name in zip(groups.rows.tolist(), groups.names, strict=True):
        found.setdefault(name, set()).add(crystals.material_ids[row])
    return found


def test_formulas(textbook):
    groups = by_group(textbook, "formula")
    assert groups["NaCl"] == {"NaCl-rs", "NaCl-super", "NaCl-high-pressure"}
    assert groups["MgO"] == {"MgO-rs", "MgO-cube"}
    assert set(groups) == {
        "MgO", "NaCl", "TePb", "CsCl", "Cu", "Fe", "TiO2",
    }  # fmt: skip


def test_prototypes_see_through_cells_elements_and_scale(textbook):
    groups = by_group(textbook, "prototype")
    assert groups == {
        "AB like MgO-cube": {
            "MgO-rs", "MgO-cube", "NaCl-rs", "NaCl-super", "PbTe-rs",
        },
        "AB like CsCl": {"CsCl", "NaCl-high-pressure"},
        "A like fcc-Cu": {"fcc-Cu"},
        "A like bcc-Fe": {"bcc-Fe"},
        "AB2 like TiO2": {"TiO2"},
    }  # fmt: skip


def test_prototypes_hang_together_through_others():
    """A chain of small distortions is one group, although its ends differ."""
    steps = np.linspace(0, 0.4, 17)
    crystals = []
    for number, step in enumerate(steps):
        lattice = Lattice.tetragonal(4.12, 4.12 * (1 + step))
        structure = Structure(lattice, ["Cs", "Cl"], [[0] * 3, [0.5] * 3])
        crystals.append(from_structure(f"c{number:02}", structure))
    groups = np.full((len(steps), 2), 123, np.uint8)
    every = CrystalList(crystals, groups)
    assert len(by_group(every, "prototype")) == 1
    ends = CrystalList([crystals[0], crystals[-1]], groups[:2])
    assert len(by_group(ends, "prototype")) == 2


def test_crystal_systems_and_space_groups(textbook):
    systems = by_group(textbook, "crystal_system")
    assert set(systems) == {"cubic", "tetragonal"}
    assert systems["tetragonal"] == {"TiO2"}
    assert by_group(textbook, "space_group")["221"] == {"CsCl", "NaCl-high-pressure"}


def test_clusters_part_metals_from_salts(textbook):
    names = textbook.material_ids
    rows = np.array([r for r, n in enumerate(names) if "O" not in n])
    groups = find_groups(textbook, rows, "cluster", clusters=2)
    # The larger cluster is first.
    metals = {names[r] for r, g in zip(rows, groups.names, strict=True) if g == "001"}
    assert set(groups.names) == {"000", "001"}
    assert metals == {"fcc-Cu", "bcc-Fe"}


@pytest.mark.parametrize("by", GROUPINGS)
def test_groups_do_not_depend_on_the_order_of_rows(textbook, by):
    order = np.random.default_rng(0).permutation(len(textbook))
    moved = CrystalList(
        [textbook.crystals[i] for i in order], textbook.space_groups[order]
    )
    more = {"clusters": 4} if by == "cluster" else {}
    assert by_group(moved, by, **more) == by_group(textbook, by, **more)


def test_elements(textbook):
    rows = np.arange(len(textbook))
    found = with_elements(textbook, rows, ["Cl", "Fe"])
    assert {textbook.material_ids[r] for r in found} == {
        "NaCl-rs", "NaCl-super", "NaCl-high-pressure", "CsCl", "bcc-Fe",
    }  # fmt: skip
    split = make_split(
        textbook, SplitSettings(by="element", elements=("Cl",), train=4, val=2)
    )
    assert {textbook.material_ids[r] for r in split.test} == {
        "NaCl-rs", "NaCl-super", "NaCl-high-pressure", "CsCl",
    }  # fmt: skip
    assert (len(split.train), len(split.val)) == (4, 2)
    assert split.made_by == "Cl left out, seed 0"


def test_what_cannot_be_grouped_is_refused(textbook):
    rows = np.arange(len(textbook))
    with pytest.raises(InputError, match="no groups by `formla`; did you mean"):
        find_groups(textbook, rows, "formla")
    with pytest.raises(
        InputError, match=r"`split\.clusters` is 99 but must be between 2 and 9"
    ):
        find_groups(textbook, rows, "cluster", clusters=99)
    with pytest.raises(
        InputError, match=r"`split\.elements` names 'Xx', which is not an element"
    ):
        with_elements(textbook, rows, ["Xx"])
    with pytest.raises(
        InputError, match=r"names Au, but no crystal of the dataset holds it; leave"
    ):
        with_elements(textbook, rows, ["Au"])
    unknown = CrystalList(textbook.crystals)
    with pytest.raises(InputError, match="has no space groups; build it again"):
        find_groups(unknown, rows, "space_group")


# ------------------------------------------------------------------------ real crystals


@pytest.fixture(scope="module")
def phonons(shared_data, tmp_path_factory) -> Store:
    store = tmp_path_factory.mktemp("phonons") / "phonons.h5"
    build([shared_data / "phonons"], store, workers=1, progress=False)
    return Store.open(store)


def part(store: Store, rows: np.ndarray) -> CrystalList:
    """Return some crystals as a collection, whose fingerprints are not rounded."""
    crystals: list[Crystal] = [store.crystal(row) for row in rows.tolist()]
    return CrystalList(crystals, np.asarray(store.space_groups)[rows])


@pytest.mark.slow
def test_no_real_crystal_or_prototype_stands_in_two_subsets(phonons):
    kinds = ("structure", "prototype")
    counts = []
    for by in ("random", "prototype"):
        split = make_split(phonons, SplitSettings(by=by, seed=1))
        known = np.concatenate([split.train, split.val])
        sides = part(phonons, known), part(phonons, split.test)
        overlap = find_overlap(*sides, kinds=kinds, workers=1)
        counts.append([overlap.counts[kind]["pairs"] for kind in kinds])
    assert sum(counts[0]) > 1000  # otherwise the test proves nothing
    assert counts[1] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("by", [*GROUPINGS, "element", "id"])
def test_real_splits_are_whole_and_near_to_what_is_asked(phonons, by):
    settings = SplitSettings(by=by, elements=("F",) if by == "element" else ())
    split = make_split(phonons, settings)
    sizes = np.array([len(split.train), len(split.val), len(split.test)])
    if by == "element":
        holds = [9 in phonons.crystal(r).atomic_numbers for r in split.test]
        assert all(holds)
        return
    assert sizes.sum() >= 1263  # int() of the fractions drops two
    assert np.abs(sizes - [1012, 126, 126]).max() <= 16
    if by not in GROUPINGS:
        return
    folds = make_folds(phonons, replace(settings, folds=5))
    tested = Counter(np.concatenate([fold.test for fold in folds]).tolist())
    assert tested == Counter(range(1265))


@pytest.mark.slow
def test_a_formula_split_of_elastic_data(shared_data, tmp_path):
    store = build(
        [shared_data / "elasticity"],
        tmp_path / "elasticity.h5",
        symmetry=None,
        workers=1,
        progress=False,
    ).store
    opened = Store.open(Path(store))
    labels = opened.property("bulk_modulus_vrh")
    split = make_split(opened, SplitSettings(by="formula"), labels)
    sizes = [len(split.train), len(split.val), len(split.test)]
    assert sizes == [4575 - 457 - 457, 457, 457]
    formulas = [
        {opened.crystal(row).formula for row in rows.tolist()}
        for rows in (split.train, split.val, split.test)
    ]
    assert not formulas[0] & formulas[2]
    assert not formulas[0] & formulas[1]
    assert not formulas[1] & formulas[2]
