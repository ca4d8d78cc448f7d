"""Sources: nothing is lost, and every refusal has a reason."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pymatgen.io.cif import CifWriter

from crysdistill.errors import BadStructure, InputError
from crysdistill.sources import Record, open_source, open_sources, parse
from crysdistill.structures.crystal import Crystal

from .conftest import structures

STRUCTURES = structures()
CIFS = {name: str(CifWriter(structure)) for name, structure in STRUCTURES.items()}
FLAT = {
    "lattice": [[4, 0, 0], [0, 4, 0], [0, 0, 4]],
    "species": ["Cs", "Cl"],
    "frac": [[0, 0, 0], [0.5, 0.5, 0.5]],
}


def outcome(path: Path, **options) -> tuple[dict[str, Crystal], list[tuple[str, str]]]:
    """Read a whole source: crystals by id, and reasons by refused id."""
    source = open_source(path, **options)
    good, refused = {}, []
    for record in source.records():
        assert record.source == str(source.path)
        record = pickle.loads(pickle.dumps(record))
        try:
            crystal = parse(record)
        except BadStructure as error:
            refused.append((record.material_id, str(error)))
            continue
        assert crystal.material_id == record.material_id
        assert set(crystal.properties) <= set(source.properties)
        good[crystal.material_id] = crystal
    return good, refused


def labels(crystals: dict[str, Crystal]) -> dict[str, dict[str, float]]:
    return {name: dict(crystal.properties) for name, crystal in crystals.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder in the style of CGCNN: three crystals and unrelated files."""
    path = tmp_path / "data"
    path.mkdir()
    for name, key in (("1", "NaCl"), ("2", "CsCl"), ("3", "TiO2")):
        (path / f"{name}.cif").write_text(CIFS[key])
    (path / "atom_init.json").write_text("{}")
    (path / "README.md").write_text("hello")
    (path / ".hidden.cif").write_text("")
    return path


def lines(path: Path, *entries) -> Path:
    text = [e if isinstance(e, str) else json.dumps(e) for e in entries]
    path.write_text("".join(f"{line}\n" for line in text))
    return path


# --------------------------------------------------------------------- single files


@pytest.mark.parametrize(
    ("name", "material_id"),
    [
        ("mp-149.cif", "mp-149"),
        ("a.b.cif", "a.b"),
        ("x.CIF", "x"),
        ("mp-149.cif.gz", "mp-149"),
        ("POSCAR", "POSCAR"),
        ("POSCAR.mp-1", "POSCAR.mp-1"),
        ("CONTCAR_2", "CONTCAR_2"),
        ("si.vasp", "si"),
        ("si.poscar", "si"),
    ],
)
def test_single_file(tmp_path, name, material_id):
    path = tmp_path / name
    text = (
        CIFS["NaCl"] if "cif" in name.lower() else STRUCTURES["NaCl"].to(fmt="poscar")
    )
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    good, refused = outcome(path)
    assert not refused
    assert list(good) == [material_id]
    assert good[material_id].formula == "NaCl"
    assert open_source(path).count == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.cif", b"", "empty file"),
        ("a.cif", b"\xff\xfe\x00", "starts like UTF-16 but is not"),
        ("POSCAR", b"", "empty file"),
        (
            "a.cif.gz",
            gzip.compress(b"data_x" * 99, mtime=0)[:-9],
            "compressed data end early",
        ),
    ],
)
def test_single_file_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    good, refused = outcome(tmp_path / name)
    assert not good
    assert reason in refused[0][1]


def test_missing_and_unknown_sources(folder):
    with pytest.raises(
        InputError, match=r"dato: no such file.*; did you mean `data`\?"
    ):
        open_source(folder.parent / "dato")
    with pytest.raises(
        InputError, match=r"README.md: cannot read structures from it; giv"
    ):
        open_source(folder / "README.md")
    with pytest.raises(
        InputError, match="no source; give a CIF or POSCAR file, a folder"
    ):
        open_sources([])
    with pytest.raises(InputError, match="no such file"):
        open_sources([folder, folder / "4.cif"])
    assert [s.path for s in open_sources([folder, folder / "1.cif"])] == [
        folder,
        folder / "1.cif",
    ]


# -------------------------------------------------------------------------- folders


def test_folder_without_labels(folder):
    good, refused = outcome(folder)
    assert not refused
    assert list(good) == ["1", "2", "3"]
    assert open_source(folder).count == 3
    assert open_source(folder).properties == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1,0.5\n2,-1e-3\n3,7\n", ("target",)),
        ("\ufeff1,0.5\r\n\r\n 2 , -1e-3\r\n3,7", ("target",)),
        ("id,gap\n1,0.5\n2,-1e-3\n3,7\n", ("gap",)),
        ("1;0.5\n2;-1e-3\n3;7\n", ("target",)),
        ("1\t0.5\n2\t-1e-3\n3\t7\n", ("target",)),
        ("1.cif,0.5\n2.cif,-1e-3\n3.cif,7\n", ("target",)),
        ('"1","0.5"\n"2","-1e-3"\n"3","7"\n', ("target",)),
    ],
)
def test_id_prop(folder, text, names):
    (folder / "id_prop.csv").write_bytes(text.encode())
    good, refused = outcome(folder)
    assert not refused
    assert open_source(folder).properties == names
    expected = {"1": 0.5, "2": -1e-3, "3": 7.0}
    assert labels(good) == {k: {names[0]: v} for k, v in expected.items()}


def test_id_prop_with_several_labels(folder):
    (folder / "id_prop.csv").write_text("1,0.5,1\n2,,2\n3,7,\n")
    good, refused = outcome(folder)
    assert not refused
    assert labels(good) == {
        "1": {"target_1": 0.5, "target_2": 1.0},
        "2": {"target_2": 2.0},
        "3": {"target_1": 7.0},
    }


@pytest.mark.parametrize(
    ("text", "refused_id", "reason"),
    [
        (
            "1,0.5\n2,1\n",
            "3",
            "3.cif: no row in id_prop.csv; add one or build with `--ke",
        ),
        (
            "1,0.5\n2,\n3,1\n",
            "2",
            "2.cif: no label in id_prop.csv (line 2); fill it in or",
        ),
        ("1,0.5\n2\n3,1\n", "2", "2.cif: no label in id_prop.csv (line 2)"),
        (
            "1,0.5\n2,abc\n3,1\n",
            "2",
            "2.cif: `target` is `abc` in id_prop.csv (line 2), not a finite number;",
        ),
        ("1,n/a\n2,1\n3,1\n", "1", "1.cif: `target` is `n/a` in id_prop.csv (line 1)"),
        ("1,0.5\n2,nan\n3,1\n", "2", "`target` is `nan` in id_prop.csv (line 2)"),
        ("1,0.5\n2,inf\n3,1\n", "2", "`target` is `inf` in id_prop.csv (line 2)"),
        ("1,0.5\n2,1_0\n3,1\n", "2", "`target` is `1_0` in id_prop.csv (line 2)"),
        ("1,0.5\n2,1,2\n3,1\n", "2", "3 cells in line 2 of id_prop.csv, but 2 columns"),
    ],
)
def test_bad_labels_refuse_their_structure(folder, text, refused_id, reason):
    (folder / "id_prop.csv").write_text(text)
    good, refused = outcome(folder)
    assert [name for name, _ in refused] == [refused_id]
    assert reason in refused[0][1]
    assert len(good) == 2
    assert open_source(folder).count == 3


@pytest.mark.parametrize(
    ("text", "refused_id", "reason"),
    [
        (
            "1,0\n2,1\n3,2\n4,3\n",
            "4",
            "in id_prop.csv (line 4), but there is no such structure; add it or remove",
        ),
        ("9,x\n1,0\n2,1\n3,2\n", "9", "in id_prop.csv (line 1), but there is no such"),
        (
            "1,0\n2,1\n3,2\n2,3\n",
            "2",
            "a second row in id_prop.csv (line 4, the first is line 2); remove one",
        ),
        ("1,0\n2,1\n3,2\n,3\n", "line 4", "no id in id_prop.csv; add it"),
    ],
)
def test_rows_without_a_structure_are_listed(folder, text, refused_id, reason):
    (folder / "id_prop.csv").write_text(text)
    good, refused = outcome(folder)
    assert [name for name, _ in refused] == [refused_id]
    assert reason in refused[0][1]
    assert labels(good) == {str(n): {"target": n - 1.0} for n in (1, 2, 3)}
    assert open_source(folder).count == 4


def test_keep_unlabelled_and_no_labels(folder):
    (folder / "id_prop.csv").write_text("1,0.5\n2,\n4,x\n")
    good, refused = outcome(folder, keep_unlabelled=True)
    assert labels(good) == {"1": {"target": 0.5}, "2": {}, "3": {}}
    assert [name for name, _ in refused] == ["4"]
    good, refused = outcome(folder, labels=False)
    assert labels(good) == {"1": {}, "2": {}, "3": {}}
    assert not refused
    assert open_source(folder, labels=False).properties == ()


def test_properties_csv_in_a_folder(folder):
    (folder / "properties.csv").write_text("material_id,gap,k\n1,0.5,\n2,,\n3,1,2\n")
    good, refused = outcome(folder)
    assert not refused
    assert labels(good) == {"1": {"gap": 0.5}, "2": {}, "3": {"gap": 1.0, "k": 2.0}}
    (folder / "id_prop.csv").write_text("1,0\n")
    with pytest.raises(
        InputError, match=r"both id_prop.csv and properties.csv; remove"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "properties.csv: no column `material_id` in its first line"),
        ("materialid,gap\n1,2\n", "no column `material_id`.*did you mean `materialid`"),
        (
            "material_id,gap,gap\n1,2,3\n",
            "the column name `gap` is empty or occurs twice",
        ),
        ("material_id,,gap\n1,2,3\n", "the column name `` is empty or occurs twice"),
    ],
)
def test_unusable_property_tables(folder, text, reason):
    (folder / "properties.csv").write_text(text)
    with pytest.raises(InputError, match=reason):
        open_source(folder)


def test_bad_structures_in_a_folder_name_their_file(folder):
    (folder / "4.cif").write_text("")
    (folder / "5.cif").write_text(CIFS["NaCl"].replace("  1\n", "  0.5\n"))
    (folder / "6.vasp").write_text("junk")
    (folder / "7.xyz").write_text("2\n\nH 0 0 0\nH 0 0 1\n")
    (folder / "8.pdb").write_text("ATOM")
    (folder / "more.jsonl").write_text("{}")
    good, refused = outcome(folder)
    assert sorted(good) == ["1", "2", "3"]
    reasons = dict(refused)
    assert reasons["4"].startswith("4.cif: empty file")
    assert reasons["5"].startswith("5.cif: site Na0 is disordered (occupancy 0.5)")
    assert reasons["6"].startswith("6.vasp: not a whole POSCAR")
    assert reasons["7"].startswith("7.xyz: no cell; add its three vectors")
    assert reasons["8.pdb"] == "8.pdb: `.pdb` is not read; write it as CIF or POSCAR"
    assert "give it as a source of its own" in reasons["more.jsonl"]
    assert open_source(folder).count == len(good) + len(refused)


def test_folders_in_folders(folder):
    for name in ("run-1", "run-2"):
        (folder / name).mkdir()
        (folder / name / "POSCAR").write_text(STRUCTURES["NaCl"].to(fmt="poscar"))
    (folder / "run-2" / "id_prop.csv").write_text("a,1\n")
    good, refused = outcome(folder)
    assert list(good) == ["1", "2", "3", "run-1", "run-2"]
    assert refused == [
        (
            "id_prop.csv",
            "run-2/id_prop.csv: labels in a sub-folder are not read; give that folder "
            "as a source of its own",
        )
    ]
    nested = folder.parent
    (folder / "id_prop.csv").write_text("1,1\n2,2\n3,3\n")
    good, refused = outcome(nested)
    assert labels(good)["1"] == {"target": 1.0}


def test_folder_without_structures(tmp_path):
    with pytest.raises(InputError, match=r"no structures in it; it should hold CIF"):
        open_source(tmp_path)
    (tmp_path / "id_prop.csv").write_text("1,2\n")
    assert outcome(tmp_path)[1][0][0] == "1"


def test_folder_that_holds_a_table(tmp_path):
    path = lines(tmp_path / "structures.jsonl", {"id": "a", **FLAT})
    (tmp_path / "properties.csv").write_text("material_id,gap\na,1\n")
    source = open_source(tmp_path)
    assert source.path == path
    assert [r.properties for r in source.records()] == [{"gap": 1.0}]
    lines(tmp_path / "others.jsonl", {"id": "b", **FLAT})
    with pytest.raises(
        InputError, match="2 tables of structures; give them one by one"
    ):
        open_source(tmp_path)


def test_zip_is_read_like_its_folder(folder):
    (folder / "id_prop.csv").write_text("1,0.5\n2,abc\n4,7\n")
    (folder / "5.cif").write_text("")
    (folder / ".hidden.cif").unlink()
    path = folder.parent / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"top/{file.name}")
        archive.writestr("__MACOSX/top/._1.cif", b"junk")
    unpacked, zipped = outcome(folder), outcome(path)
    assert labels(unpacked[0]) == labels(zipped[0]) == {"1": {"target": 0.5}}
    assert dict(zipped[1]) == {
        name: reason.replace(f"{name}.cif", f"top/{name}.cif", 1)
        for name, reason in unpacked[1]
    }
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        InputError, match=r"data.zip: not a readable zip .*get the file"
    ):
        open_source(path)


# ---------------------------------------------------------------------- JSON lines


@pytest.mark.parametrize(
    "name", ["structures.jsonl", "structures.jsonl.gz", "x.ndjson"]
)
def test_json_lines(tmp_path, name):
    path = lines(
        tmp_path / name,
        {"id": "a", **FLAT},
        "",
        json.loads(STRUCTURES["NaCl"].to_json()),
        {"material_id": "c", "structure": json.loads(STRUCTURES["TiO2"].to_json())},
        {"id": 7, **FLAT},
    )
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    good, refused = outcome(path)
    assert not refused
    stem = name.split(".")[0]
    assert list(good) == ["a", f"{stem}-3", "c", "7"]
    assert [c.formula for c in good.values()] == ["CsCl", "NaCl", "TiO2", "CsCl"]


def test_bad_lines_are_listed(tmp_path):
    path = lines(
        tmp_path / "structures.jsonl",
        {"id": "a", **FLAT},
        '{"id": "b", "latt',
        "[1, 2]",
        {"id": "d"},
        {"id": "e", "structure": None},
        {"id": "f", **FLAT, "species": ["Cs", "Xx"]},
        json.dumps({"id": "g", **FLAT, "frac": [[0, 0, 0], [math.nan] * 3]}),
        {"id": "a", **FLAT},
    )
    source = open_source(path)
    assert source.count == 8
    good, refused = outcome(path)
    assert list(good) == ["a"]  # the build will refuse the second
    reasons = dict(refused)
    assert reasons["line 2"].startswith("not valid JSON (")
    assert "mend or remove the line" in reasons["line 2"]
    assert reasons["structures-3"].startswith("line 3: not a structure; give a dict")
    assert reasons["d"].startswith(
        "line 4: no structure; give `lattice`, `species` and"
    )
    assert reasons["e"].startswith("line 5: `structure` holds no structure; add it")
    assert reasons["f"].startswith("line 6: site 1 holds `Xx`, not an element")
    assert reasons["g"].startswith(
        "line 7: a coordinate of atom 1 (Cl) is not a number"
    )
    assert len(list(source.records())) == 8


def test_properties_beside_json_lines(tmp_path):
    path = lines(
        tmp_path / "structures.jsonl", *({"id": name, **FLAT} for name in "abcdf")
    )
    (tmp_path / "properties.csv").write_text(
        "gap,material_id,k\n1,a,2\n,b,\nx,c,1\n1,e,2\n1,a,2\n,d,nan\n"
    )
    source = open_source(path)
    assert source.properties == ("gap", "k")
    good, refused = outcome(path)
    assert labels(good) == {"a": {"gap": 1.0, "k": 2.0}, "b": {}}
    assert refused == [
        (
            "c",
            "line 3: `gap` is `x` in properties.csv (line 4), not a finite number; "
            "mend it; leave it empty where it is not known",
        ),
        (
            "d",
            "line 4: `k` is `nan` in properties.csv (line 7), not a finite number; "
            "mend it; leave it empty where it is not known",
        ),
        (
            "f",
            "line 5: no row in properties.csv; add one (empty cells mean not known) or "
            "build with `--keep-unlabelled`",
        ),
        (
            "e",
            "in properties.csv (line 5), but there is no such structure; add it or "
            "remove the row",
        ),
        (
            "a",
            "a second row in properties.csv (line 6, the first is line 2); remove one",
        ),
    ]


def test_numbers_beside_structures_are_labels(tmp_path):
    structure = json.loads(STRUCTURES["NaCl"].to_json())
    path = lines(
        tmp_path / "s.jsonl",
        {"material_id": "a", "structure": structure, "gap": 1, "name": "salt"},
        {"material_id": "b", "structure": structure, "gap": None, "stable": True},
        {"material_id": "c", "structure": structure, "gap": "wide"},
    )
    for file in (path, tmp_path / "s.json"):
        if file.suffix == ".json":
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            file.write_text(json.dumps(entries))
        assert open_source(file).properties == ("gap", "stable")
        good, refused = outcome(file)
        assert labels(good) == {"a": {"gap": 1.0}, "b": {"stable": 1.0}}
        assert "`gap` is `wide`, not a finite number; mend it" in dict(refused)["c"]
        assert open_source(file, labels=False).properties == ()


def test_truncated_and_empty_json_lines(tmp_path):
    path = tmp_path / "structures.jsonl.gz"
    rng = np.random.default_rng(0)
    entries = [
        {"id": str(n), **FLAT, "frac": rng.uniform(0, 0.3, (2, 3)).tolist()}
        for n in range(400)
    ]
    for entry in entries:
        entry["frac"][1][0] += 0.5
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    whole = gzip.compress(text.encode())
    path.write_bytes(whole)
    assert len(outcome(path)[0]) == open_source(path).count == 400
    path.write_bytes(whole[: len(whole) // 2])
    good, refused = outcome(path)
    assert 100 < len(good) < 300
    assert refused == [
        (
            "structures.jsonl.gz",
            f"ends early after line {len(good)}: get the file again",
        )
    ]
    path.write_bytes(b"")
    assert outcome(path) == (
        {},
        [("structures.jsonl.gz", "empty file; get it again or leave it out")],
    )
    path.write_text(text)  # not compressed, despite the name
    assert len(outcome(path)[0]) == 400


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "structures.jsonl"
    line = json.dumps({"id": "a", **FLAT, "note": "x" * 1000}) + "\n"
    path.write_text(line * 20_000)  # 20 MB
    source = open_source(path)
    assert source.count == 20_000
    tracemalloc.start()
    assert sum(1 for _ in source.records()) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# ------------------------------------------------------------------- JSON documents


def test_json_layouts(tmp_path):
    one, two = (json.loads(STRUCTURES[name].to_json()) for name in ("NaCl", "TiO2"))
    layouts = {
        "one": (one, ["one"]),
        "flat": ({"id": "f", **FLAT}, ["f"]),
        "entry": ({"material_id": "mp-1", "structure": one}, ["mp-1"]),
        "list": ([one, two], ["list-0", "list-1"]),
        "entries": (
            [{"id": "a", "structure": one}, {"entry_id": "b", "structure": two}],
            ["a", "b"],
        ),
        "dict": ({"a": one, "b": two}, ["a", "b"]),
        "flats": ({"a": FLAT, "b": FLAT}, ["a", "b"]),
        "matbench": (
            {
                "index": [0, 1],
                "columns": ["structure", "e"],
                "data": [[one, 1], [two, 2]],
            },
            ["matbench-0", "matbench-1"],
        ),
        "named": (
            {"index": ["mb-1"], "columns": ["structure", "e"], "data": [[one, 1.5]]},
            ["mb-1"],
        ),
    }
    for name, (content, ids) in layouts.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        good, refused = outcome(path)
        assert (list(good), refused) == (ids, []), name
        assert open_source(path).count == len(ids)
    assert labels(outcome(tmp_path / "matbench.json")[0]) == {
        "matbench-0": {"e": 1.0},
        "matbench-1": {"e": 2.0},
    }
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "dict.json").read_bytes()))
    assert list(outcome(packed)[0]) == ["a", "b"]
    mislabelled = lines(
        tmp_path / "lines.json", {"id": "a", **FLAT}, {"id": "b", **FLAT}
    )
    assert list(outcome(mislabelled)[0]) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty file; get it again or leave it out"),
        ('{"a": ', "not valid JSON"),
        ("3", "neither a list nor a dictionary of structures; mend it"),
        ("[]", "no structures in it; add them or leave the file out"),
        (
            '{"columns": ["composition"], "data": [["NaCl"]]}',
            "without a column `structure`",
        ),
        (
            '[{"a": 1}]',
            "no structure; give `lattice`, `species` and `frac`, or pymatgen",
        ),
    ],
)
def test_bad_json(tmp_path, content, reason):
    path = tmp_path / "bad.json"
    path.write_text(content)
    good, refused = outcome(path)
    assert not good
    assert len(refused) == 1
    assert reason in refused[0][1]


def test_properties_beside_json(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"a": FLAT, "b": FLAT}))
    (tmp_path / "properties.csv").write_text("material_id,gap\na,1\nb,2\n")
    assert labels(outcome(path)[0]) == {"a": {"gap": 1.0}, "b": {"gap": 2.0}}


# ------------------------------------------------------------------- all of them


def test_fingerprint_changes_with_the_files(folder):
    first = open_source(folder).fingerprint
    assert open_source(folder).fingerprint == first
    (folder / "store.h5.parts").mkdir()
    (folder / "store.h5.parts" / "000000.npz").write_text("")
    assert open_source(folder).fingerprint == first
    assert open_source(folder, keep_unlabelled=True).fingerprint != first
    os.utime(folder / "1.cif", (1, 1))  # the save time has no effect
    assert open_source(folder).fingerprint == first
    (folder / "1.cif").write_text((folder / "1.cif").read_text() + "\n")
    second = open_source(folder).fingerprint
    assert second != first
    (folder / "id_prop.csv").write_text("1,2\n")
    assert open_source(folder).fingerprint not in (first, second)


def test_records_can_be_read_again(folder):
    source = open_source(folder)
    assert list(source.records()) == list(source.records())


def test_crystals_pass_through():
    crystal = Crystal("a", np.array([55, 17]), FLAT["frac"], FLAT["lattice"])
    record = Record("memory", "b", "crystal", crystal, {"gap": 1.0})
    assert parse(record).material_id == "b"
    assert parse(record).properties == {"gap": 1.0}


def test_store_as_source(folder):
    build = pytest.importorskip("crysdistill.corpus.build")
    (folder / "id_prop.csv").write_text("1,0.5\n2,1.5\n3,2.5\n")
    path = folder.parent / "store.h5"
    build.build([folder], path, workers=1, progress=False)
    good, refused = outcome(path)
    assert not refused
    assert labels(good) == {str(n): {"target": n - 0.5} for n in (1, 2, 3)}
    assert labels(outcome(path, labels=False)[0]) == {"1": {}, "2": {}, "3": {}}
    path.write_bytes(b"no store")
    with pytest.raises(InputError, match=r"store.h5"):
        open_source(path)


@pytest.mark.parametrize(
    ("name", "count", "labelled"),
    [
        ("phonons/structures.jsonl.gz", 1265, 1265),
        ("cgcnn_folder/cgcnn_folder.zip", 1000, 1000),
        ("cgcnn_published/structures.zip", 120, 0),
    ],
)
def test_real_sources(shared_data, name, count, labelled):
    source = open_source(shared_data / name)
    records = list(source.records())
    assert len(records) == source.count == count
    assert sum(bool(record.properties) for record in records) == labelled
    assert not [record for record in records if record.problem]
    for record in records[:: count // 20]:
        parse(record)


MAGNETIC = """data_m
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 5.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_space_group_symop_magn_operation.id
_space_group_symop_magn_operation.xyz
1 x,y,z,+1
2 -x,-y,z+1/2,-1
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Mn1 Mn 0.25 0.25 0.1
"""


def test_a_magnetic_cif_is_read_without_its_moments(tmp_path):
    (tmp_path / "mn.mcif").write_text(MAGNETIC)
    for source in (tmp_path, tmp_path / "mn.mcif"):
        (record,) = open_source(source).records()
        crystal = parse(record)
        assert crystal.material_id == "mn"
        assert crystal.atomic_numbers.tolist() == [25, 25]
        np.testing.assert_allclose(
            sorted(crystal.frac_coords.tolist()),
            [[0.25, 0.25, 0.1], [0.75, 0.75, 0.6]],
            atol=1e-6,
        )
