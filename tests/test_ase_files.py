"""ASE's formats: frames, labels, ids; we refuse faults that ASE accepts.

Nothing is faked: ASE writes the files and the databases.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, graphene, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Structure

from crysdistill.errors import InputError
from crysdistill.sources import open_source

from .test_sources import CIFS, FLAT, labels, outcome

COMMENT = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3'


def crystals() -> list[Atoms]:
    salt, copper = bulk("NaCl", "rocksalt", a=5.6), bulk("Cu", cubic=True)
    salt.info.update(gap=5.0, note="x", stable=True)
    copper.info.update(gap=0, stable=False)
    return [salt, copper, bulk("Si")]


def same(crystal, atoms: Atoms) -> None:
    np.testing.assert_array_equal(crystal.atomic_numbers, atoms.numbers)
    np.testing.assert_allclose(crystal.cell, atoms.cell.array, atol=1e-6)
    difference = crystal.frac_coords - atoms.get_scaled_positions()
    np.testing.assert_allclose(difference, np.rint(difference), atol=1e-6)


# ------------------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("a.extxyz", True),
        ("a.xyz", True),
        ("a.extxyz.gz", True),
        ("a.traj", True),
        ("a.xsf", False),
    ],
)
def test_frames_of_a_file(tmp_path, name, known):
    path = tmp_path / name
    written = crystals() if known else [bulk("Cu", a=a) for a in (3.5, 3.6, 3.7)]
    ase.io.write(path, written, format="extxyz" if "xyz" in name else None)
    good, refused = outcome(path)
    assert not refused
    assert list(good) == ["a-0", "a-1", "a-2"]
    for crystal, atoms in zip(good.values(), written, strict=True):
        same(crystal, atoms)
    if known:
        assert labels(good) == {
            "a-0": {"gap": 5.0, "stable": 1.0},
            "a-1": {"gap": 0.0, "stable": 0.0},
            "a-2": {},
        }
        assert open_source(path).count == 3
        assert not labels(outcome(path, labels=False)[0])["a-0"]


@pytest.mark.parametrize("name", ["one.extxyz", "one.traj", "one.gen", "one.res"])
def test_one_frame_has_the_name_of_its_file(tmp_path, name):
    path = tmp_path / name
    ase.io.write(path, bulk("NaCl", "rocksalt", a=5.6))
    good, refused = outcome(path)
    assert not refused
    assert list(good) == ["one"]
    assert good["one"].formula == "NaCl"
    assert good["one"].volume == pytest.approx(5.6**3 / 4, rel=1e-5)


@pytest.mark.parametrize(("name", "layout"), [("a.in", "aims"), ("a.cfg", "cfg")])
def test_anything_else_that_ase_reads(tmp_path, name, layout):
    ase.io.write(tmp_path / name, bulk("Si"), format=layout)
    good, refused = outcome(tmp_path / name)
    assert not refused
    assert {name: crystal.formula for name, crystal in good.items()} == {"a": "Si"}


def test_energies_that_ase_keeps_apart_are_labels(tmp_path):
    atoms = bulk("Cu")
    atoms.calc = SinglePointCalculator(atoms, energy=-3.5)
    for name in ("a.traj", "a.extxyz"):
        ase.io.write(tmp_path / name, atoms)
        assert labels(outcome(tmp_path / name)[0]) == {"a": {"energy": -3.5}}


def test_ids_beside_frames_count(tmp_path):
    atoms = crystals()
    atoms[0].info["material_id"] = "mp-22862"
    atoms[1].info["id"] = 7
    ase.io.write(tmp_path / "a.extxyz", atoms)
    (tmp_path / "properties.csv").write_text("material_id,k\nmp-22862,1\na-2,2\n")
    good, refused = outcome(tmp_path / "a.extxyz")
    assert list(good) == ["mp-22862", "a-2"]
    assert labels(good)["mp-22862"] == {"gap": 5.0, "stable": 1.0, "k": 1.0}
    assert refused[0][0] == "7"
    assert "no row in properties.csv" in refused[0][1]


def test_what_is_no_ordered_crystal_is_refused(tmp_path):
    half, mixed, column = bulk("Cu"), bulk("Cu"), bulk("Cu")
    half.info["occupancy"] = {"0": {"Cu": 0.5}}
    mixed.info["occupancy"] = {"0": {"Cu": 0.5, "Au": 0.5}}
    column.new_array("occupancy", np.array([0.25]))
    full = bulk("Cu")
    full.info["occupancy"] = {"0": {"Cu": 1.0}}
    doubled = bulk("Cu") + bulk("Cu")
    nothing = bulk("Cu")
    nothing.numbers[:] = 0
    atoms = [full, molecule("H2O"), graphene(vacuum=8.0), half, mixed, column, doubled]
    ase.io.write(tmp_path / "a.extxyz", [*atoms, nothing])
    good, refused = outcome(tmp_path / "a.extxyz")
    assert list(good) == ["a-0"]
    reasons = [
        reason.removeprefix(f"frame {n}: ") for n, (_, reason) in enumerate(refused, 1)
    ]
    starts = (
        "no cell; add its three vectors, or leave molecules out",
        "periodic in 2 of 3 directions (pbc = T T F); only crystals are read",
        "site 0 is disordered (Cu 0.5)",
        "site 0 is disordered (Cu 0.5 + Au 0.5)",
        "site 0 is disordered (occupancy 0.25)",
        "two atoms on one point",
        "site 0 holds `Z = 0`",
    )
    for reason, start in zip(reasons, starts, strict=True):
        assert reason.startswith(start), reason


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (f"1\n{COMMENT}\nQq 0 0 0\n", r"cannot be read as extxyz \(KeyError"),
        (f"1\n{COMMENT}\nCu 0 0\n", "cannot be read as extxyz"),
        (f"1\n{COMMENT}\nCu 0 0 nan\n", "a coordinate of atom 0"),
        (
            f"1\n{COMMENT.replace('4 0 0 0', '0 0 0 0', 1)}\nCu 0 0 0\n",
            "lattice vector a",
        ),
        (
            f"1\n{COMMENT.replace('4 0 0 0 4 0', '4 0 0 4 0 0')}\nCu 0 0 0\n",
            "too small",
        ),
        (f"1\n{COMMENT} gap=inf\nCu 0 0 0\n", "`gap` is `inf`, not a finite number"),
        (f"1\n{COMMENT} gap=wide\nCu 0 0 0\n", "`gap` is `wide`, not a finite number"),
    ],
)
def test_a_bad_frame_stops_no_other(tmp_path, frame, reason):
    good = f"1\n{COMMENT} gap=1\nCu 0 0 0\n"
    (tmp_path / "a.xyz").write_text(good + frame + "\n" + good)
    kept, refused = outcome(tmp_path / "a.xyz")
    assert list(kept) == ["a-0", "a-2"]
    assert [name for name, _ in refused] == ["a-1"]
    assert re.search(reason, refused[0][1]), refused


def test_what_was_read_before_the_damage_stays(tmp_path):
    frame = f"1\n{COMMENT}\nCu 0 0 0\n"
    path = tmp_path / "a.xyz"
    for end, reason in (
        ("2\n" + COMMENT, "ends early, in the frame at line 7; get the file again"),
        ("<html>", "line 7 is `<html>`, not the number of atoms of a frame"),
        ("-5\n", "line 7 is `-5`, not the number of atoms"),
    ):
        path.write_text(frame * 2 + end)
        good, refused = outcome(path)
        assert list(good) == ["a-0", "a-1"]
        assert reason in refused[0][1]
    path.write_bytes(gzip.compress((frame * 999).encode())[:-30])
    good, refused = outcome(path)
    assert good
    assert "ends early" in refused[0][1]
    ase.io.write(tmp_path / "b.traj", [bulk("Cu")] * 3)
    whole = (tmp_path / "b.traj").read_bytes()
    (tmp_path / "b.traj").write_bytes(whole[: len(whole) // 2])
    good, refused = outcome(tmp_path / "b.traj")
    assert "cannot be read from here on" in refused[-1][1]
    for name in ("c.xyz", "c.traj"):
        (tmp_path / name).write_bytes(b"")
        reason = "no frames in it; get it again or leave it out"
        assert outcome(tmp_path / name)[1] == [("c", reason)]


def test_memory_stays_flat(tmp_path):
    peaks = []
    for count in (200, 2000):
        path = tmp_path / f"{count}.extxyz"
        ase.io.write(path, [bulk("Cu", cubic=True)] * count)
        tracemalloc.start()
        assert sum(1 for _ in open_source(path).records()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


# --------------------------------------------------------------------------- RES, CSSR


RES = """TITL si 0 40 -1 0 0 2 (P1) n - 1
CELL 1.54180 4 4 4 90 90 90
LATT -1
SFAC Cs Cl
Cs 1 0.0 0.0 0.0 1.0
Cl 2 0.5 0.5 0.5 1.0
END
"""
CSSR = """4.0 4.0 4.0
90.0 90.0 90.0 SPGR =  1 P 1    OPT = 1
2 0
0 CsCl
1 Cs 0.0 0.0 0.0
2 Cl 0.5 0.5 0.5
"""


@pytest.mark.parametrize(("name", "text"), [("a.res", RES), ("a.cssr", CSSR)])
def test_res_and_cssr(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    good, refused = outcome(tmp_path)
    assert not refused
    assert good["a"].formula == "CsCl"
    assert good["a"].cell.tolist() == [[4, 0, 0], [0, 4, 0], [0, 0, 4]] or np.allclose(
        good["a"].cell, 4 * np.eye(3)
    )


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.res", RES.replace("0.5 1.0", "0.5 0.5"), "site Cl is disordered (occ"),
        ("a.res", RES.replace("LATT -1", "LATT 1"), "has symmetry (`LATT 1`)"),
        ("a.res", RES.replace("SFAC", "SYMM -x,-y,z\nSFAC"), "has symmetry (`SYMM"),
        ("a.res", RES.replace("CELL", "CELLO"), "cannot be read as res"),
        ("a.res", RES.replace("END\n", ""), "cannot be read as res"),
        ("a.cssr", CSSR.rpartition("2 Cl")[0], "1 atoms but line 3 says 2: cut short"),
        ("a.cssr", CSSR.replace("2 0\n", "2 1\n"), "Cartesian coordinates"),
        ("a.cssr", "junk", "no number of atoms in line 3"),
    ],
)
def test_bad_res_and_cssr(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    good, refused = outcome(tmp_path / name)
    assert not good
    assert reason in refused[0][1]


# -------------------------------------------------------------------- folders and zips


def test_frames_in_folders_and_zips(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "1.cif").write_text(CIFS["NaCl"])
    ase.io.write(folder / "many.extxyz", crystals())
    ase.io.write(folder / "two.xsf", [bulk("Cu", a=a) for a in (3.5, 3.6)])
    ase.io.write(folder / "one.gen", bulk("Si"))
    (folder / "rows.db").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    for source in (folder, path):
        good, refused = outcome(source)
        assert list(good) == [
            "1",
            "many-0",
            "many-1",
            "many-2",
            "one",
            "two-0",
            "two-1",
        ]
        assert labels(good)["many-0"] == {"gap": 5.0, "stable": 1.0}
        reason = "rows.db: an ASE database; give it as a source of its own"
        assert refused == [("rows.db", reason)]
    (folder / "id_prop.csv").write_text("1,10\nmany-1,11\n")
    good, refused = outcome(folder)
    assert labels(good) == {"1": {"target": 10.0}, "many-1": {"target": 11.0}}
    assert len(refused) == 6


# --------------------------------------------------------------------------- databases


def database(path: Path, copies: int = 1) -> Path:
    with ase.db.connect(path) as rows:
        for _ in range(copies):
            rows.write(bulk("NaCl", "rocksalt", a=5.6), material_id="mp-22862", gap=5.0)
            energetic = bulk("Cu")
            energetic.calc = SinglePointCalculator(energetic, energy=-3.5)
            rows.write(energetic, stable=True, note="x")
            rows.write(molecule("H2O"))
            rows.write(bulk("Si"), data={"occupancy": {"0": {"Si": 0.5}}})
    return path


def check_database(path: Path) -> None:
    good, refused = outcome(path)
    unique = [row.unique_id for row in ase.db.connect(path).select()]
    assert list(good) == ["mp-22862", unique[1]]
    same(good["mp-22862"], bulk("NaCl", "rocksalt", a=5.6))
    assert labels(good) == {
        "mp-22862": {"gap": 5.0},
        unique[1]: {"energy": -3.5, "stable": 1.0},
    }
    assert [name for name, _ in refused] == unique[2:]
    assert refused[0][1].startswith("frame 2: no cell")
    assert refused[1][1].startswith("frame 3: site 0 is disordered (Si 0.5)")
    assert open_source(path).count == 4
    assert not open_source(path, labels=False).properties


def test_database(tmp_path):
    check_database(database(tmp_path / "a.db"))


def test_lmdb_database(tmp_path):
    pytest.importorskip("ase_db_backends", reason="`.aselmdb` needs ase-db-backends")
    check_database(database(tmp_path / "a.aselmdb"))
    (tmp_path / "b.aselmdb").write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot be read as an ASE database"):
        open_source(tmp_path / "b.aselmdb")


def test_lmdb_database_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ase_db_backends", None)
    monkeypatch.delitem(sys.modules, "ase_db_backends.aselmdb", raising=False)
    (tmp_path / "a.aselmdb").write_bytes(b"")
    with pytest.raises(
        InputError,
        match=r"a.aselmdb: `ase-db-backends` is not installed; `pip install crysd",
    ):
        open_source(tmp_path / "a.aselmdb")


def test_json_databases_are_to_be_converted(tmp_path):
    database(tmp_path / "a.json")
    good, refused = outcome(tmp_path / "a.json")
    assert not good
    assert refused[0][1].startswith("an ASE database in JSON; convert it with `ase db")
    with (
        ase.db.connect(tmp_path / "a.json") as old,
        ase.db.connect(tmp_path / "b.db") as new,
    ):
        for row in old.select():
            new.write(row)
    assert next(iter(outcome(tmp_path / "b.db")[0])) == "mp-22862"


def test_long_databases_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("crysdistill.sources.ase_files._ROWS_AT_ONCE", 3)
    path = database(tmp_path / "a.db", copies=3)
    with ase.db.connect(path) as rows:
        rows.delete([2, 9])
    ids = [record.place for record in open_source(path).records()]
    assert ids == [f"frame {n}" for n in range(10)]


def test_what_is_no_ase_database(tmp_path):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE other (id)")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"a.db: not an ASE database .*no such table"):
        open_source(path)
    assert path.read_bytes() == before
    path.write_text("junk " * 99)
    with pytest.raises(InputError, match=r"a.db: not an ASE database"):
        open_source(path)


# ------------------------------------------------------- CIF blocks, JSON per crystal


def test_all_blocks_of_a_cif(tmp_path):
    blocks = [CIFS["NaCl"].replace("data_NaCl", "data_mp-1"), CIFS["CsCl"]]
    blocks.append(
        CIFS["NaCl"].replace("data_NaCl", "data_half").replace("  1\n", "  0.5\n")
    )
    path = tmp_path / "many.cif"
    path.write_text("data_global\n_journal_year 1990\n" + "\n".join(blocks))
    good, refused = outcome(path)
    assert {name: crystal.formula for name, crystal in good.items()} == {
        "mp-1": "NaCl",
        "CsCl": "CsCl",
    }
    assert refused[0][0] == "half"
    assert refused[0][1].startswith("data_half: site Na0 is disordered")
    (tmp_path / "other.cif").write_text(CIFS["NaCl"])
    good, refused = outcome(tmp_path)
    assert list(good) == ["many-1", "many-2", "other"]
    assert refused[0][0] == "many-3"
    assert refused[0][1].startswith("many.cif, data_half: ")
    path.write_text("\n".join([CIFS["NaCl"]] * 2))
    assert list(outcome(path)[0]) == ["many-1", "many-2"]
    path.write_text("data_a\n" + CIFS["NaCl"])
    assert list(outcome(path)[0]) == ["many"]


def test_a_folder_of_json(tmp_path):
    salt = Structure.from_str(CIFS["NaCl"], fmt="cif")
    (tmp_path / "a.json").write_text(json.dumps(salt.as_dict()))
    (tmp_path / "b.json").write_text(json.dumps({"structure": FLAT, "gap": 1}))
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text(json.dumps([FLAT, FLAT] * 50))
    (tmp_path / "atom_init.json").write_text("{}")
    (tmp_path / "id_prop.csv").write_text("a,1\nb,2\nc,3\nd,4\n")
    path = tmp_path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in tmp_path.iterdir():
            archive.write(file, file.name)
    for source in (tmp_path, path):
        good, refused = outcome(source)
        assert labels(good) == {"a": {"target": 1.0}, "b": {"target": 2.0}}
        reasons = dict(refused)
        assert reasons["c"].startswith("c.json: not valid JSON")
        assert (
            reasons["d"] == "d.json: not one structure; give it as a source of its own"
        )
