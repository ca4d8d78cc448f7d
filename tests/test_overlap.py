"""Planted duplicates of every kind are found, and polymorphs are not merged."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from crysdistill.errors import InputError
from crysdistill.overlap import CrystalList, Overlap, find_overlap, matching
from crysdistill.overlap.search import KINDS
from crysdistill.store.fingerprints import (
    NEIGHBORS,
    composition,
    distances,
    fingerprint,
)
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.symmetry import space_group
from tests.conftest import random_crystal

make = Structure.from_spacegroup
HEXAGONAL, CUBIC, TETRAGONAL = Lattice.hexagonal, Lattice.cubic, Lattice.tetragonal


@cache  # pymatgen takes a second for each cubic group
def parents() -> dict[str, Structure]:
    """One structure of each type, in its conventional cell."""
    low = random_crystal(3, atoms=7)
    return {
        "NaCl": make("Fm-3m", CUBIC(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]),
        "SrTiO3": make(
            "Pm-3m",
            CUBIC(3.905),
            ["Sr", "Ti", "O"],
            [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]],
        ),
        "MgAl2O4": make(
            "Fd-3m",
            CUBIC(8.08),
            ["Mg", "Al", "O"],
            [[0, 0, 0], [0.625] * 3, [0.3874] * 3],
        ),
        "wurtzite": make(
            "P6_3mc",
            HEXAGONAL(3.82, 6.26),
            ["Zn", "S"],
            [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.375]],
        ),
        "Mg": make("P6_3/mmc", HEXAGONAL(3.21, 5.21), ["Mg"], [[1 / 3, 2 / 3, 0.25]]),
        "rutile": make(
            "P4_2/mnm",
            TETRAGONAL(4.594, 2.959),
            ["Ti", "O"],
            [[0, 0, 0], [0.305, 0.305, 0]],
        ),
        "MoS2": make(
            "P6_3/mmc",
            HEXAGONAL(3.16, 12.3),
            ["Mo", "S"],
            [[1 / 3, 2 / 3, 0.25], [1 / 3, 2 / 3, 0.621]],
        ),
        "quartz": make(
            "P3_221",
            HEXAGONAL(4.916, 5.405),
            ["Si", "O"],
            [[0.4697, 0, 2 / 3], [0.4135, 0.2669, 0.7858]],
        ),
        "P1": low.to_pymatgen(),
    }


def disguises(structure: Structure, seed: int) -> dict[str, Structure]:
    """Other descriptions of the same crystal."""
    rng = np.random.default_rng(seed)

    def sites(cell: np.ndarray, frac: np.ndarray, order: np.ndarray) -> Structure:
        species = [structure[i].specie for i in order]
        return Structure(Lattice(cell), species, frac[order])

    cell, frac = structure.lattice.matrix, structure.frac_coords
    plain = np.arange(len(structure))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    stretch = np.eye(3) + 0.05 * np.outer(axis, axis)
    shear = np.eye(3) + 0.03 * np.outer(turn[0], turn[1])
    noise = rng.normal(scale=0.02, size=frac.shape) @ np.linalg.inv(cell)
    shaken = sites(cell * 1.01, frac + noise, plain)
    out = {
        "another cell": structure * [[1, 1, 0], [0, 1, 0], [0, 1, 1]],
        "supercell": structure * [2, 1, 1],
        "slanted supercell": structure * [[1, 1, 0], [-1, 1, 0], [0, 0, 1]],
        "primitive": structure.get_primitive_structure(),
        "conventional": SpacegroupAnalyzer(
            structure
        ).get_conventional_standard_structure(),
        "shuffled": sites(cell, frac, rng.permutation(len(structure))),
        "translated": sites(cell, frac + rng.random(3), plain),
        "rotated": sites(cell @ turn, frac, plain),
        "mirrored": sites(-cell @ turn, frac, plain),
        "expanded by 1 %": sites(cell * 1.01 ** (1 / 3), frac, plain),
        "expanded by 5 %": sites(cell * 1.05 ** (1 / 3), frac, plain),
        "compressed by 5 %": sites(cell * 0.95 ** (1 / 3), frac, plain),
        "stretched": sites(cell @ stretch, frac, plain),
        "sheared": sites(cell @ shear, frac, plain),
        "shaken": shaken,
        "shaken supercell": shaken * [1, 1, 2],
    }
    together = sites(cell @ turn @ stretch, frac + rng.random(3), plain) * [1, 2, 1]
    order = rng.permutation(len(together))
    out["all together"] = Structure.from_sites([together[i] for i in order])
    return out


def exchange(structure: Structure, **species: str) -> Structure:
    other = structure.copy()
    other.replace_species(species)
    return other


def collection(structures: dict[str, Structure]) -> CrystalList:
    return CrystalList(Crystal.from_pymatgen(s, name) for name, s in structures.items())


def kinds_of(overlap: Overlap) -> dict[tuple[str, str], str]:
    return {(c, d): kind for c, d, kind in overlap.pairs.itertuples(index=False)}


@cache
def polymorphs() -> dict[str, dict[str, Structure]]:
    """Real polymorphs from the literature, by formula."""
    third = [1 / 3, 2 / 3]
    perovskite = ["Ba", "Ti", "O"]
    return {
        "TiO2": {
            "rutile": parents()["rutile"],
            "anatase": make(
                "I4_1/amd",
                TETRAGONAL(3.785, 9.514),
                ["Ti", "O"],
                [[0, 0, 0], [0, 0, 0.2081]],
            ),
            "brookite": make(
                "Pbca",
                Lattice.orthorhombic(9.174, 5.449, 5.138),
                ["Ti", "O", "O"],
                [
                    [0.1289, 0.0972, 0.8628],
                    [0.0095, 0.1491, 0.1835],
                    [0.2314, 0.1110, 0.5366],
                ],
            ),
        },
        "C": {
            "diamond": make("Fd-3m", CUBIC(3.567), ["C"], [[0, 0, 0]]),
            "lonsdaleite": make(
                "P6_3/mmc", HEXAGONAL(2.51, 4.12), ["C"], [[*third, 0.0625]]
            ),
            "graphite": make(
                "P6_3/mmc",
                HEXAGONAL(2.464, 6.711),
                ["C", "C"],
                [[0, 0, 0.25], [*third, 0.25]],
            ),
        },
        "ZnS": {
            "wurtzite": parents()["wurtzite"],
            "zincblende": make(
                "F-43m", CUBIC(5.41), ["Zn", "S"], [[0, 0, 0], [0.25] * 3]
            ),
            "4H": make(
                "P6_3mc",
                HEXAGONAL(3.82, 12.52),
                ["Zn", "Zn", "S", "S"],
                [[0, 0, 0], [*third, 0.25], [0, 0, 0.1875], [*third, 0.4375]],
            ),
        },
        "Fe": {
            "bcc": make("Im-3m", CUBIC(2.87), ["Fe"], [[0, 0, 0]]),
            "fcc": make("Fm-3m", CUBIC(3.59), ["Fe"], [[0, 0, 0]]),
            "hcp": make("P6_3/mmc", HEXAGONAL(2.52, 4.07), ["Fe"], [[*third, 0.25]]),
        },
        "SiO2": {
            "quartz": parents()["quartz"],
            "high quartz": make(
                "P6_222",
                HEXAGONAL(4.996, 5.456),
                ["Si", "O"],
                [[0.5, 0, 0], [0.2072, 0.4144, 0.5]],
            ),
            "cristobalite": make(
                "P4_12_12",
                TETRAGONAL(4.971, 6.928),
                ["Si", "O"],
                [[0.3003, 0.3003, 0], [0.2392, 0.1044, 0.1787]],
            ),
            "high cristobalite": make(
                "Fd-3m", CUBIC(7.16), ["Si", "O"], [[0, 0, 0], [0.125] * 3]
            ),
            "stishovite": make(
                "P4_2/mnm",
                TETRAGONAL(4.18, 2.667),
                ["Si", "O"],
                [[0, 0, 0], [0.306, 0.306, 0]],
            ),
        },
        "CsCl": {
            "CsCl type": make("Pm-3m", CUBIC(4.12), ["Cs", "Cl"], [[0] * 3, [0.5] * 3]),
            "NaCl type": make("Fm-3m", CUBIC(7.1), ["Cs", "Cl"], [[0] * 3, [0.5] * 3]),
        },
        "BaTiO3": {
            "cubic": make(
                "Pm-3m", CUBIC(4.0), perovskite, [[0] * 3, [0.5] * 3, [0.5, 0.5, 0]]
            ),
            "tetragonal": make(
                "P4mm",
                TETRAGONAL(3.994, 4.034),
                [*perovskite, "O"],
                [[0] * 3, [0.5, 0.5, 0.5215], [0.5, 0.5, -0.0233], [0.5, 0, 0.4895]],
            ),
        },
        "SrTiO3": {
            "cubic": parents()["SrTiO3"],
            "tilted": make(
                "I4/mcm",
                TETRAGONAL(5.507, 7.796),
                ["Sr", "Ti", "O", "O"],
                [[0, 0.5, 0.25], [0] * 3, [0, 0, 0.25], [0.24, 0.74, 0]],
            ),
        },
        "MgSiO3": {
            "perovskite": exchange(parents()["SrTiO3"], Sr="Mg", Ti="Si"),
            "ilmenite": make(
                "R-3",
                HEXAGONAL(4.728, 13.56),
                ["Mg", "Si", "O"],
                [[0, 0, 0.3597], [0, 0, 0.1577], [0.3214, 0.0361, 0.2408]],
            ),
        },
    }


# ------------------------------------------------------------------------ planted pairs


@pytest.fixture(scope="module")
def planted() -> tuple[Overlap, dict[str, str]]:
    """The parents as the corpus, and all their disguises as the dataset."""
    corpus = parents()
    dataset = {
        f"{name} {clothes}": structure
        for seed, (name, parent) in enumerate(corpus.items())
        for clothes, structure in disguises(parent, seed).items()
    }
    owner = {entry: entry.split()[0] for entry in dataset}
    return find_overlap(collection(corpus), collection(dataset)), owner


def test_every_disguise_of_a_crystal_is_seen_through(planted) -> None:
    overlap, owner = planted
    found = kinds_of(overlap)
    missed = [d for d, c in owner.items() if found.get((c, d)) != "structure"]
    assert len(owner) == 9 * 17
    assert not missed


def test_no_other_pair_is_taken_for_the_same_crystal(planted) -> None:
    overlap, owner = planted
    found = kinds_of(overlap)
    assert all(owner[d] == c for (c, d), kind in found.items() if kind == "structure")
    assert overlap.statement == (
        "transductive (153 of 153 dataset structures are also in the corpus)"
    )


@pytest.mark.parametrize("formula", polymorphs())
def test_polymorphs_are_not_merged(formula: str) -> None:
    forms = polymorphs()[formula]
    copies = {f"{name} again": s for name, s in forms.items()}
    found = kinds_of(find_overlap(collection(forms), collection(copies)))
    for first, second in itertools.product(forms, forms):
        kind = "structure" if first == second else "formula"
        assert found[first, f"{second} again"] == kind, (first, second)


def test_left_and_right_handed_quartz_are_the_same_crystal() -> None:
    right = parents()["quartz"]
    left = Structure(right.lattice, right.species, -right.frac_coords)
    groups = [
        space_group(Crystal.from_pymatgen(s, "quartz"), 0.01) for s in (right, left)
    ]
    found = find_overlap(collection({"right": right}), collection({"left": left}))
    assert sorted(groups) == [152, 154]
    assert kinds_of(found) == {("right", "left"): "structure"}


def test_a_primitive_cell_with_averaged_atoms_is_still_the_same_crystal() -> None:
    tilted = polymorphs()["SrTiO3"]["tilted"]
    averaged = tilted.get_primitive_structure()  # atoms move by up to 0.25 Å
    assert (len(tilted), len(averaged)) == (20, 5)
    found = find_overlap(collection({"a": tilted}), collection({"b": averaged}))
    assert kinds_of(found) == {("a", "b"): "structure"}


def test_a_supercell_that_did_not_shrink_still_agrees() -> None:
    parent = Crystal.from_pymatgen(parents()["rutile"], "rutile")
    double = Crystal.from_pymatgen(parents()["rutile"] * [1, 1, 2], "double")
    triple = Crystal.from_pymatgen(parents()["rutile"] * [1, 1, 3], "triple")
    assert matching.agree(parent, double, "supercell")
    assert matching.agree(double, parent, "supercell")
    assert not matching.agree(parent, double, "same")
    assert not matching.agree(double, triple, "supercell")


def test_space_groups_lose_their_hand() -> None:
    groups = np.array([[154, 152], [213, 0], [96, 225]])
    expected = [[152, 152], [212, 0], [92, 225]]
    np.testing.assert_array_equal(matching.unhanded(groups), expected)


def test_real_crystals_in_disguise_are_found(shared_data) -> None:
    path = shared_data / "phonons" / "structures.jsonl.gz"
    with gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in itertools.islice(file, 100)]
    small_cells = [r for r in records if len(r["species"]) <= 12][:15]
    corpus = {
        r["id"]: Structure(Lattice(r["lattice"]), r["species"], r["frac"])
        for r in small_cells
    }
    dataset = {
        f"{name} {clothes}": disguises(structure, seed)[clothes]
        for seed, (name, structure) in enumerate(corpus.items())
        for clothes in ("all together", "primitive", "shaken")
    }
    found = kinds_of(find_overlap(collection(corpus), collection(dataset)))
    assert [d for d in dataset if found.get((d.split()[0], d)) != "structure"] == []


@pytest.mark.parametrize(
    ("parent", "species", "scale"),
    [
        ("NaCl", {"Na": "Mg", "Cl": "O"}, 0.75),
        ("SrTiO3", {"Sr": "Ba", "Ti": "Zr"}, 1.07),
        ("MgAl2O4", {"Mg": "Zn", "Al": "Ga"}, 1.03),
        ("wurtzite", {"Zn": "Ga", "S": "N"}, 0.84),
        ("Mg", {"Mg": "Co"}, 0.78),
        ("rutile", {"Ti": "Sn"}, 1.03),
        ("MoS2", {"Mo": "W", "S": "Se"}, 1.04),
        ("quartz", {"Si": "Ge"}, 1.02),
        ("P1", {"Si": "Ti", "Fe": "Ru"}, 1.05),
        ("SrTiO3", {"Sr": "Ti", "Ti": "Sr"}, 1.0),  # same formula, exchanged sites
    ],
)
def test_prototypes_are_found_in_any_cell(parent, species, scale) -> None:
    structure = parents()[parent]
    other = exchange(structure, **species)
    other.scale_lattice(other.volume * scale**3)
    shaken = disguises(other, 1)["shaken"]
    dataset = {"plain": other, "supercell": other * [1, 2, 1], "shaken": shaken}
    found = kinds_of(
        find_overlap(collection({"parent": structure}), collection(dataset))
    )
    assert found == {("parent", name): "prototype" for name in dataset}


def test_other_types_with_the_same_anonymised_formula_make_no_pair() -> None:
    corpus = {
        "zincblende": polymorphs()["ZnS"]["zincblende"],
        "CsCl type": polymorphs()["CsCl"]["CsCl type"],
        "wurtzite": parents()["wurtzite"],
    }
    overlap = find_overlap(collection(corpus), collection({"NaCl": parents()["NaCl"]}))
    assert overlap.pairs.empty
    assert overlap.statement == "clean"
    assert len(overlap.nearest) == 1  # near, but not equivalent


def test_the_same_crystal_at_quite_another_density_is_not_the_same() -> None:
    dense = parents()["NaCl"]
    light = dense.copy()
    light.scale_lattice(1.3 * dense.volume)
    found = kinds_of(find_overlap(collection({"a": dense}), collection({"b": light})))
    assert found == {("a", "b"): "prototype"}


# ------------------------------------------------------------------------ the report


def small() -> tuple[CrystalList, CrystalList]:
    """A corpus, and a dataset with one pair of each kind and one unmatched crystal."""
    forms = polymorphs()
    corpus = {
        "mp-1": parents()["NaCl"],
        "mp-2": parents()["rutile"],
        "mp-3": forms["Fe"]["bcc"],
        "mp-4": forms["TiO2"]["anatase"],
        "mp-5": parents()["MgAl2O4"],
    }
    dataset = {
        "mp-1": parents()["NaCl"] * [2, 1, 1],
        "x-2": disguises(parents()["rutile"], 0)["all together"],
        "x-3": exchange(forms["Fe"]["bcc"], Fe="W"),
        "x-4": forms["TiO2"]["brookite"],
        "x-5": parents()["MoS2"],
    }
    return collection(corpus), collection(dataset)


def test_pairs_have_the_strongest_kind_that_holds(tmp_path) -> None:
    overlap = find_overlap(*small())
    assert kinds_of(overlap) == {
        ("mp-1", "mp-1"): "id",
        ("mp-2", "x-2"): "structure",
        ("mp-4", "x-2"): "formula",
        ("mp-3", "x-3"): "prototype",
        ("mp-2", "x-4"): "formula",
        ("mp-4", "x-4"): "formula",
    }
    overlap.write(tmp_path / "pairs.csv")
    table = pd.read_csv(tmp_path / "pairs.csv")
    assert list(table.columns) == ["corpus_id", "dataset_id", "kind"]
    pd.testing.assert_frame_equal(table, overlap.pairs, check_dtype=False)


def test_counts_rows_and_statement() -> None:
    overlap = find_overlap(*small())
    assert overlap.statement == (
        "transductive (2 of 5 dataset structures are also in the corpus)"
    )
    assert overlap.counts["formula"] == {
        "pairs": 3,
        "dataset": 2,
        "strongest": 1,
        "corpus": 2,
        "left_out": 0,
    }
    assert [c["strongest"] for c in overlap.counts.values()] == [1, 1, 1, 1]
    np.testing.assert_array_equal(overlap.corpus_rows(), [0, 1])
    np.testing.assert_array_equal(overlap.corpus_rows(KINDS), [0, 1, 2, 3])
    np.testing.assert_array_equal(overlap.corpus_rows(["prototype"]), [2])
    np.testing.assert_array_equal(overlap.corpus_rows(dataset_rows=[1, 2, 4]), [1])
    assert overlap.corpus_rows(dataset_rows=[4]).dtype == np.int64


def test_tables_and_the_histogram_of_nearest_distances() -> None:
    overlap = find_overlap(*small())
    nearest = overlap.nearest.set_index("dataset_id")
    assert nearest.loc["x-2", "corpus_id"] == "mp-2"
    assert nearest.loc["x-3", "formula"] == "other"
    assert nearest.loc["x-3", "distance"] < 1e-5
    assert nearest.loc["mp-1", "distance"] < 1e-5
    histogram = overlap.histogram([0.0, 0.001, 1.0])
    assert histogram[["same", "other"]].to_numpy().tolist() == [[1, 1], [2, 1]]
    assert overlap.table().row_count == 5
    assert overlap.histogram_table().row_count == 10


def test_the_hash_depends_on_the_contents_alone(forked_workers) -> None:
    corpus, dataset = small()
    overlap = find_overlap(corpus, dataset)
    again = find_overlap(*small(), workers=2)
    assert overlap.hash == again.hash
    assert re.fullmatch("[0-9a-f]{64}", overlap.hash)
    moved = [replace(c, cell=c.cell * 1.0001) for c in corpus.crystals]
    others = {
        find_overlap(CrystalList(moved), dataset).hash,
        find_overlap(corpus, dataset, kinds=["id"]).hash,
        find_overlap(corpus, CrystalList(dataset.crystals[:4])).hash,
    }
    assert len(others | {overlap.hash}) == 4


def test_the_order_of_rows_and_known_space_groups_change_nothing() -> None:
    corpus, dataset = small()
    groups = [[space_group(c, p) for p in (0.01, 0.1)] for c in corpus.crystals]
    known = CrystalList(corpus.crystals[::-1], np.array(groups, np.uint8)[::-1])
    backwards = find_overlap(known, CrystalList(dataset.crystals[::-1]))
    pd.testing.assert_frame_equal(backwards.pairs, find_overlap(corpus, dataset).pairs)


def test_kinds_that_are_not_wanted_are_not_looked_for() -> None:
    overlap = find_overlap(*small(), kinds=["formula", "id"])
    assert set(overlap.pairs["kind"]) == {"id", "formula"}
    assert kinds_of(overlap)["mp-2", "x-2"] == "formula"
    assert list(overlap.counts) == ["id", "formula"]
    assert set(overlap.nearest["formula"]) == {"same"}


def test_long_lists_of_prototypes_are_cut_but_counted() -> None:
    salt = parents()["NaCl"]
    halides = ["F", "Cl", "Br", "I"]
    corpus = {f"Na{x}": exchange(salt, Cl=x) for x in halides}
    corpus["KCl"] = exchange(salt, Na="K")
    dataset = collection({"MgO": exchange(salt, Na="Mg", Cl="O"), "NaCl": salt})
    overlap = find_overlap(collection(corpus), dataset, pairs_per_entry=2)
    assert overlap.counts["prototype"] == {
        "pairs": 9,
        "dataset": 2,
        "strongest": 1,
        "corpus": 5,
        "left_out": 5,
    }
    listed = overlap.pairs[overlap.pairs["kind"] == "prototype"]
    # Ties are decided by name.
    assert listed["corpus_id"].tolist() == ["KCl", "NaBr", "KCl", "NaBr"]
    np.testing.assert_array_equal(overlap.corpus_rows(["prototype"]), range(5))
    assert "5 `prototype` pairs counted but not listed" in overlap.table().caption
    with pytest.raises(InputError, match="search with a larger `pairs_per_entry`"):
        overlap.corpus_rows(["prototype"], dataset_rows=[0])


def test_ids_of_different_databases_are_pointed_out() -> None:
    corpus, dataset = (
        collection({"17": parents()["NaCl"]}),
        collection({"17": parents()["Mg"]}),
    )
    overlap = find_overlap(corpus, dataset)
    assert kinds_of(overlap) == {("17", "17"): "id"}
    assert "1 pairs share an id but not the formula" in overlap.table().caption


def test_a_name_that_stands_twice_is_found_twice() -> None:
    salt = Crystal.from_pymatgen(parents()["NaCl"], "a")
    corpus = CrystalList([salt, salt, replace(salt, material_id="b")])
    overlap = find_overlap(corpus, CrystalList([salt]))
    np.testing.assert_array_equal(overlap.corpus_rows(["id"]), [0, 1])
    assert kinds_of(overlap) == {("a", "a"): "id", ("b", "a"): "structure"}


def test_cells_too_large_for_the_matcher_are_judged_by_fingerprint(monkeypatch) -> None:
    monkeypatch.setattr(matching, "MAX_ATOMS", 0)
    overlap = find_overlap(*small())
    assert kinds_of(overlap)["mp-4", "x-4"] == "formula"
    assert overlap.found.by_fingerprint == 0  # a strain of 5 % is too large to be sure
    corpus, dataset = collection(parents()), collection(parents())
    dataset.material_ids = [f"x-{name}" for name in dataset.material_ids]
    overlap = find_overlap(corpus, dataset, kinds=["structure"])
    assert overlap.counts["structure"]["dataset"] == 9
    assert "rest on the fingerprint alone" in overlap.table().caption


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"kinds": ["structures"]},
            "unknown kind `structures`; did you mean `structure`",
        ),
        ({"kinds": []}, "`kinds` is empty; give some of id, structure"),
        ({"pairs_per_entry": 0}, "`pairs_per_entry` is 0 but must be at least 1"),
        ({"workers": 0}, "`workers` is 0 but must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, text) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        find_overlap(*small(), **settings)


def test_empty_sides_and_kinds_not_looked_for_are_refused() -> None:
    corpus, dataset = small()
    with pytest.raises(InputError, match="the dataset holds no crystals"):
        find_overlap(corpus, CrystalList([]))
    with pytest.raises(InputError, match="the corpus holds no crystals"):
        find_overlap(CrystalList([]), dataset)
    with pytest.raises(InputError, match="`structure` pairs were not looked for"):
        find_overlap(corpus, dataset, kinds="id").corpus_rows()


# ----------------------------------------------------------------------- fingerprints


def test_fingerprint_of_rock_salt_is_textbook_knowledge() -> None:
    salt = Crystal.from_pymatgen(parents()["NaCl"], "NaCl")
    profiles = fingerprint(salt)
    # In units of the cube root of the volume per atom, which is the bond length:
    # a simple cubic lattice has 6, 12 and 8 neighbours at 1, √2 and √3.
    shells = np.repeat(np.sqrt([1, 2, 3, 4]), [6, 12, 8, 6])
    np.testing.assert_allclose(profiles[0, :NEIGHBORS], shells, rtol=1e-6)
    # Each species forms an fcc lattice: 12 and 6 neighbours at a / √2 and a.
    length = np.cbrt(4) * np.sqrt([1 / 2, 1, 3 / 2])
    np.testing.assert_allclose(
        profiles[1, NEIGHBORS:], np.repeat(length, [12, 6, 14]), rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_fingerprint_equals_the_plain_computation(seed: int) -> None:
    crystal = random_crystal(seed)
    structure = crystal.to_pymatgen()
    rows = []
    for species in composition(crystal.atomic_numbers)[0].tolist():
        own = [site for site in structure if int(species) == site.specie.Z]
        profiles = []
        for site in own:
            near = structure.get_sites_in_sphere(site.coords, 14.0)
            near = [n for n in near if n.nn_distance > 1e-6]
            alike = [n for n in near if n.specie == site.specie]
            profiles.append(
                [
                    sorted(n.nn_distance for n in group)[:NEIGHBORS]
                    for group in (near, alike)
                ]
            )
        free = np.cbrt([structure.volume / len(structure), structure.volume / len(own)])
        rows.append((np.mean(profiles, axis=0) / free[:, None]).reshape(-1))
    np.testing.assert_allclose(fingerprint(crystal), rows, rtol=1e-5)


@pytest.mark.parametrize("name", ["SrTiO3", "MoS2", "P1"])
def test_fingerprint_does_not_see_the_choice_of_cell(name: str) -> None:
    structure = parents()[name]
    clothes = disguises(structure, 5)
    expected = fingerprint(Crystal.from_pymatgen(structure, name))
    for kind in ("supercell", "primitive", "shuffled", "translated", "mirrored"):
        seen = fingerprint(Crystal.from_pymatgen(clothes[kind], name))
        np.testing.assert_allclose(seen, expected, atol=1e-5, err_msg=kind)
    seen = fingerprint(Crystal.from_pymatgen(clothes["expanded by 5 %"], name))
    np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_an_atom_alone_in_a_long_cell_has_a_fingerprint() -> None:
    cell = np.array([[2.5, 0, 0], [1.2, 2.2, 0], [0, 0, 120.0]])
    lone = Crystal("layer", np.array([6], np.uint8), np.zeros((1, 3)), cell)
    assert np.isfinite(fingerprint(lone)).all()


@pytest.mark.parametrize(
    "amounts", [(1,), (1, 1), (1, 1, 2), (1, 1, 1, 3, 3), (2,) * 6]
)
def test_distances_equal_the_search_of_all_exchanges(amounts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    first = rng.random((3, len(amounts), 4))
    second = rng.random((5, len(amounts), 4))
    [(rows, ordered, exchanged)] = distances(first, second, amounts)
    assert rows == slice(0, 3)
    for i, j in np.ndindex(3, 5):
        root = [
            np.sqrt(np.mean((first[i] - second[j][list(order)]) ** 2))
            for order in itertools.permutations(range(len(amounts)))
            if all(amounts[o] == n for o, n in zip(order, amounts, strict=True))
        ]
        assert ordered[i, j] == pytest.approx(root[0])
        assert exchanged[i, j] == pytest.approx(min(root))


def test_composition_puts_equal_roles_in_equal_places() -> None:
    fluorite = np.array([9, 20, 9], np.uint8)
    antifluorite = np.array([8, 3, 3, 8, 3, 3], np.uint8)
    for numbers, species in ((fluorite, [20, 9]), (antifluorite, [8, 3])):
        found, amounts = composition(numbers)
        assert found.tolist() == species
        assert amounts.tolist() == [1, 2]
