"""The filter of duplicates: a crystal with several names enters once."""

from __future__ import annotations

import numpy as np

from crysdistill.cli import main
from crysdistill.corpus.build import build
from crysdistill.overlap import CrystalList
from crysdistill.overlap.exclusion import find_duplicates
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from tests.conftest import from_structure, random_crystal, structures
from tests.test_firewall import SMALL_GRAPH, quarantine, renamed, strained
from tests.toy_stores import write_lines


def supercell(crystal: Crystal) -> Crystal:
    doubled = crystal.to_pymatgen().make_supercell([2, 1, 1], in_place=False)
    return from_structure(f"big-{crystal.material_id}", doubled)


def test_what_is_dropped_and_what_stays():
    first = [random_crystal(seed) for seed in range(4)]
    again = [
        *renamed(first[:2], "again"),
        strained(renamed(first[1:2], "strained")[0]),
        supercell(first[2]),
    ]
    found = find_duplicates(CrystalList([*first, *again]))
    assert found == {
        4: "filtered: same as random-0 (`duplicates`)",
        5: "filtered: same as random-1 (`duplicates`)",
        6: "filtered: same as random-1 (`duplicates`)",
        7: "filtered: same as random-2 (`duplicates`)",
    }


def test_polymorphs_and_other_chemistry_are_no_duplicates():
    known = [from_structure(name, s) for name, s in structures().items()]
    hcp = next(c for c in known if c.material_id == "hcp-Mg")
    # fcc magnesium at the same volume per atom, and rock salt of other elements.
    edge = (hcp.volume / 4) ** (1 / 3)  # 2 atoms; this cell: 1 atom, 2 edge³
    cell = edge * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    fcc = Crystal("fcc-Mg", np.array([12], np.uint8), np.zeros((1, 3)), cell)
    assert find_duplicates(CrystalList([*known, fcc])) == {}


def test_what_is_left_out_anyway_stands_for_nothing():
    one, two = random_crystal(0), renamed([random_crystal(0)], "two")[0]
    both = CrystalList([one, two])
    assert list(find_duplicates(both)) == [1]
    assert find_duplicates(both, without={0: "excluded"}) == {}


def test_more_copies_than_an_overlap_lists():
    copies = [renamed([random_crystal(0)], f"{n}")[0] for n in range(12)]
    assert list(find_duplicates(CrystalList(copies))) == list(range(1, 12))


def test_a_build_without_duplicates(tmp_path, capsys):
    crystals = [random_crystal(seed) for seed in range(6)]
    source = write_lines(
        tmp_path / "s.jsonl", [*crystals, *renamed(crystals[:3], "twice")]
    )
    out = tmp_path / "s.h5"
    options = "--no-duplicates --no-symmetry --workers 1 --no-progress --cutoff 7"
    assert main(f"build {source} -o {out} {options}".split()) == 0
    store = Store.open(out)
    assert len(store) == 6
    assert quarantine(store) == {
        f"twice-random-{n}": f"filtered: same as random-{n} (`duplicates`)"
        for n in range(3)
    }
    assert "3 of them by `duplicates`" in capsys.readouterr().out
    kept = build(
        [source], tmp_path / "t.h5", graph=SMALL_GRAPH, symmetry=None, progress=False
    )
    assert kept.built == 9
