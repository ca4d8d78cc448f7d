"""No label is lost, and every made-up id is reported."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from crysdistill.corpus.build import build
from crysdistill.errors import InputError
from crysdistill.overlap import find_overlap
from crysdistill.overlap.sides import open_side
from crysdistill.sources import open_source, parse
from crysdistill.store.store import Store
from tests.conftest import random_crystal
from tests.toy_stores import simple_cif

FLAT = {"lattice": [[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]], "species": ["Po"],
        "frac": [[0.0, 0, 0]]}  # fmt: skip


def cube(a: float) -> dict:
    return {**FLAT, "lattice": [[a, 0, 0], [0, a, 0], [0, 0, a]]}


def cif() -> str:
    return simple_cif("x", random_crystal(5, atoms=3))


def outcome(path: Path, **options) -> tuple[dict[str, dict], list[str], tuple]:
    """Return labels by id, the reasons for refused entries, and remarks."""
    source = open_source(path, **options)
    found, refused = {}, []
    for record in source.records():
        try:
            crystal = parse(record)
        except InputError as error:
            refused.append(str(error))
        else:
            found[crystal.material_id] = dict(crystal.properties)
    return found, refused, source.remarks


@pytest.fixture
def cifs(tmp_path) -> Path:
    """A folder of three crystals without labels."""
    folder = tmp_path / "cifs"
    folder.mkdir()
    for name in ("007", "mp-149", "b.1"):
        (folder / f"{name}.cif").write_text(cif())
    return folder


VALUES = {"007": 1.25, "mp-149": 2.5, "b.1": 3.0}

# ------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "key", ["qmof_id", "ID", "refcode", "uuid", "icsd-id", "materialId", "name"]
)
def test_ids_under_other_keys(tmp_path, key):
    path = tmp_path / "data.json"
    entries = [{key: name, "structure": FLAT} for name in ("007", "x-2")]
    path.write_text(json.dumps(entries))
    found, refused, remarks = outcome(path)
    assert (list(found), refused, remarks) == (["007", "x-2"], [], ())
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert list(outcome(lines)[0]) == ["007", "x-2"]


def test_a_name_that_repeats_is_no_id(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"name": "NaCl", "structure": FLAT}] * 2))
    found, _, (remark,) = outcome(path)
    assert list(found) == ["data-0", "data-1"]
    assert remark == (
        f"{path}: no ids found (no `material_id`, `id`, `entry_id`, ...); entries are "
        "numbered, as in `data-0`, and none is compared by id"
    )


def test_ids_of_frames_keep_their_zeros(tmp_path):
    frame = '1\nLattice="4 0 0 0 4 0 0 0 4" pbc="T T T" {}=007\nPo 0 0 0\n'
    for key in ("material_id", "id", "qmof_id"):
        (tmp_path / "a.xyz").write_text(frame.format(key))
        assert list(outcome(tmp_path / "a.xyz")[0]) == ["007"]


def made_up_pair(folder: Path) -> list[Path]:
    """Write two files of unrelated crystals without ids."""
    paths = []
    for name, start in (("corpus", 3.0), ("dataset", 6.0)):
        path = folder / name / "data.json"
        path.parent.mkdir()
        path.write_text(json.dumps([{"structure": cube(start + n)} for n in range(2)]))
        path.write_text(path.read_text().replace("Po", "Po" if start < 4 else "W"))
        paths.append(path)
    return paths


def test_ids_that_were_made_up_are_no_identity(tmp_path):
    """Neither in sources, nor in stores, nor in stores made from stores."""
    paths = made_up_pair(tmp_path)
    stores = []
    for path in paths:
        first, again = (path.with_name(f"{n}.h5") for n in (1, 2))
        build([path], first, progress=False, workers=1, symmetry=None)
        build([first], again, progress=False, workers=1, symmetry=None)
        assert Store.open(again).made_up.tolist() == [True, True]
        stores.append(again)
    for sides in (paths, stores):
        corpus, dataset = (open_side(path).crystals for path in sides)
        overlap = find_overlap(corpus, dataset, kinds=["id"])
        assert overlap.statement.startswith("unknown")  # structures were not compared
        assert overlap.counts["id"]["pairs"] == 0
        assert list(corpus.material_ids) == ["data-0", "data-1"]
    report = build(
        [paths[0]], tmp_path / "clean.h5", exclude=[paths[1]], progress=False, workers=1
    )
    assert (report.read, report.built) == (2, 2)


def test_the_same_ids_of_sources_are_an_identity(tmp_path):
    for name in ("a", "b"):
        entry = {"id": "data-0", "structure": FLAT}
        (tmp_path / f"{name}.json").write_text(json.dumps([entry]))
    sides = [open_side(tmp_path / f"{name}.json").crystals for name in ("a", "b")]
    assert find_overlap(*sides, kinds=["id"]).counts["id"]["pairs"] == 1


# ------------------------------------------------------------- labels beside entries


def test_labels_as_text(tmp_path):
    path = tmp_path / "data.json"
    gaps = ["1.5", "-2e-3", "", None]
    entries = [
        {"id": str(n), "structure": FLAT, "gap": gap, "formula": "Po"}
        for n, gap in enumerate(gaps)
    ]
    path.write_text(json.dumps(entries))
    found, refused, remarks = outcome(path)
    assert found == {"0": {"gap": 1.5}, "1": {"gap": -2e-3}, "2": {}, "3": {}}
    assert (refused, remarks) == ([], ())
    entries[0]["gap"] = "high"
    path.write_text(json.dumps(entries))
    assert outcome(path)[1] == [
        "`gap` is `high`, not a finite number; mend it, or write null"
    ]


def test_labels_with_a_unit_are_mentioned(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "a", "structure": FLAT, "gap": "1.5 eV"}]))
    assert outcome(path)[2] == (
        f"{path}: `gap` holds text such as `1.5 eV`, so it is not read as a label; "
        "write only the number",
    )


def test_labels_within_a_flat_structure_and_in_an_inner_dictionary(tmp_path):
    path = tmp_path / "data.jsonl"
    entries = [
        {"id": "a", **FLAT, "gap": 1.0},
        {"id": "b", "structure": FLAT, "properties": {"gap": 2.0}},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert outcome(path)[0] == {"a": {"gap": 1.0}, "b": {"gap": 2.0}}


@pytest.mark.parametrize("column", ["structure", "initial_structure", "atoms"])
@pytest.mark.parametrize("orient", ["columns", "index", "list", "records", "table"])
def test_data_frames(tmp_path, orient, column):
    path = tmp_path / "frame.json"
    rows = {"x": {column: cube(4.1), "gap": 1}, "y": {column: cube(4.2), "gap": 2}}
    columns = {key: {name: row[key] for name, row in rows.items()} for key in rows["x"]}
    records = [{"material_id": name, **row} for name, row in rows.items()]
    content = {
        "columns": columns,
        "index": rows,
        "list": {key: [r[key] for r in records] for key in records[0]},
        "records": records,
        "table": {"schema": {}, "data": records},
    }[orient]
    path.write_text(json.dumps(content))
    assert outcome(path)[0] == {"x": {"gap": 1.0}, "y": {"gap": 2.0}}


def test_two_columns_of_structures_are_mentioned(tmp_path):
    path = tmp_path / "data.json"
    entry = {"id": "a", "initial_structure": cube(4.0), "final_structure": cube(5.0)}
    path.write_text(json.dumps([entry]))
    assert "read from `final_structure`; `initial_structure` is" in outcome(path)[2][0]


# ------------------------------------------------------------------- tables of labels


@pytest.mark.parametrize(
    "text",
    [
        "007,1.25\nmp-149,2.5\nb.1,3\n",
        "007;1,25\nmp-149;2,5\nb.1;3,0\n",
        "007\t1,25\nmp-149\t2,5\nb.1\t3\n",
        '007,"1,25"\nmp-149,"2,5"\nb.1,3\n',
        "007 1.25\nmp-149  2.5\nb.1 3\n",
        "007,1.25,\nmp-149,2.5,\nb.1,3,\n",
        "0,007,1.25\n1,mp-149,2.5\n2,b.1,3\n",
        ",id,target\n0,007,1.25\n1,mp-149,2.5\n2,b.1,3\n",
        "sep=;\n007;1,25\nmp-149;2,5\nb.1;3\n",
        "# made by hand\n007,1.25\nmp-149,2.5\nb.1,3\n",
        "007.cif,1.25\nMP-149.CIF,2.5\n".replace("MP", "mp") + "cifs/b.1.cif.gz,3\n",
        "007.xyz,1.25\nmp-149.vasp,2.5\nb.1.json,3\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_tables_as_spreadsheets_write_them(cifs, text, encoding):
    (cifs / "id_prop.csv").write_bytes(text.encode(encoding))
    found, refused, _ = outcome(cifs)
    assert refused == []
    assert found == {name: {"target": value} for name, value in VALUES.items()}


def test_thousands_are_not_taken_for_decimals(cifs):
    text = '007,"1,250"\nmp-149,"2,500"\nb.1,3\n'
    (cifs / "id_prop.csv").write_text(text)
    found, refused, _ = outcome(cifs)
    assert found == {"b.1": {"target": 3.0}}
    assert (
        "`target` is `1,250` in id_prop.csv (line 1), not a finite number"
        in (refused[0])
    )
    mixed = "007;1,25\nmp-149;2.5\nb.1;3\n"  # the comma is ambiguous here
    (cifs / "id_prop.csv").write_text(mixed)
    assert "`1,25`" in outcome(cifs)[1][0]


def test_zeros_that_a_spreadsheet_dropped_are_named(cifs):
    (cifs / "id_prop.csv").write_text("7,1\nmp-149,2.5\nb.1,3\n")
    assert any(
        "the structure is called `007`; a spreadsheet drops such zeros" in reason
        for reason in outcome(cifs)[1]
    )


def test_accents_of_macos(tmp_path):
    name = unicodedata.normalize("NFD", "é1")
    (tmp_path / f"{name}.cif").write_text(cif())
    (tmp_path / "id_prop.csv").write_text("é1,5\n", encoding="utf-8")
    assert outcome(tmp_path)[0] == {name: {"target": 5.0}}


@pytest.mark.parametrize(
    "text",
    [
        "{}material_id,gap [eV],formula\n007,1.25,A\nmp-149,2.5,B\nb.1,3,C\n",
        "{}filename;gap [eV]\n007.cif;1,25\nmp-149.cif;2,5\nb.1.cif;3\n",
        ",Unnamed: 0,ID,gap [eV]\n0,0,007,1.25\n1,1,mp-149,2.5\n2,2,b.1,3\n",
    ],
)
def test_properties(cifs, text):
    (cifs / "properties.csv").write_text(text.format(""))
    found, refused, remarks = outcome(cifs)
    assert refused == []
    assert found == {name: {"gap [eV]": value} for name, value in VALUES.items()}
    if "formula" in text:
        table = cifs / "properties.csv"
        assert remarks == (
            f"{table}: column `formula` holds text, no numbers: left out",
        )


@pytest.mark.parametrize("name", ["targets.csv", "labels.tsv", "y.CSV"])
def test_a_table_of_any_name_that_names_all_structures_is_read(cifs, name):
    (cifs / name).write_text("007,1.25\nmp-149,2.5\nb.1,3\n")
    found, refused, remarks = outcome(cifs)
    assert found == {name: {"target": value} for name, value in VALUES.items()}
    assert (refused, remarks) == (
        [], (f"{cifs}/{name}: read as the table of labels of all 3",)
    )  # fmt: skip
    assert outcome(cifs, labels=False)[2] == ()


def test_other_tables_are_mentioned(cifs):
    (cifs / "some.csv").write_text("007,1.25\nmp-149,2.5\n")
    (cifs / "notes.csv").write_text("who,when\nme,now\n")
    (cifs / "y.xlsx").write_bytes(b"PK")
    found, _, remarks = outcome(cifs)
    assert list(found.values()) == [{}, {}, {}]
    assert remarks == (
        f"{cifs}/notes.csv: not read, since it names none of the structures",
        f"{cifs}/some.csv: holds labels of 2 of 3 structures and is not read; call it "
        "id_prop.csv (with names of columns: properties.csv)",
        f"{cifs}/y.xlsx: not read; if it holds labels, save it as id_prop.csv",
    )
    (cifs / "id_prop.csv").write_text("007,1.25\nmp-149,2.5\nb.1,3\n")
    assert outcome(cifs)[2] == (
        f"{cifs}/some.csv: not read; labels come from id_prop.csv",
    )


def test_id_prop_beside_a_table_of_structures(tmp_path):
    path = tmp_path / "structures.jsonl"
    path.write_text(json.dumps({"id": "007", **FLAT}) + "\n")
    (tmp_path / "id_prop.csv").write_text("007,1.5\n")
    assert outcome(tmp_path)[0] == {"007": {"target": 1.5}}


# ----------------------------------------------------------------------- field reports


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ids_under_another_key.json", {"qmof-0001": {}, "qmof-0002": {}}),
        ("labels_as_text.json", {"a": {"gap": 1.5}, "b": {"gap": 2.5}}),
        ("table_by_columns.json", {"wbm-1-1": {}, "wbm-1-2": {}}),
        (
            "table_by_columns_with_index.json",
            {"id_1": {"e_form": -2.1}, "id_2": {"e_form": -1.9}},
        ),
        (
            "labels_name_xyz_files",
            {f"OMDB-{n}": {"target": float(n)} for n in (1, 2, 3)},
        ),
    ],
)
def test_field_reports(shared_data, name, found):
    assert outcome(shared_data / "field_reports" / name)[0] == found


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("labels_under_another_name", 1.0),
        ("utf16_labels", 1.0),
        ("semicolons_decimal_comma", 1.25),
    ],
)
def test_field_reports_of_tables(shared_data, name, first):
    found, refused, _ = outcome(shared_data / "field_reports" / name)
    assert refused == []
    values = {"0012": first, "mp-149": 2 * first if first == 1 else 2.5}
    values |= {"b.1.2": 3.0, "with space": 4.0, "é1": 5.0}
    assert found == {name: {"target": value} for name, value in values.items()}


def test_field_report_of_made_up_ids(shared_data, tmp_path):
    sides = [shared_data / "field_reports" / "ids_made_up" / n
             for n in ("corpus", "dataset")]  # fmt: skip
    overlap = find_overlap(
        *(open_side(side).crystals for side in sides), kinds=["id", "structure"]
    )
    assert overlap.statement == "clean"
    report = build(
        [sides[0]], tmp_path / "c.h5", exclude=[sides[1]], progress=False, workers=1
    )
    assert (report.read, report.built) == (5, 5)
    assert os.fspath(sides[0]) in report.remarks[0]
