"""Thousands of damaged files: no traceback, and every entry is counted."""

from __future__ import annotations

import json
import random
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from crysdistill.corpus.shards import BuildSettings, build_shard, read_list
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.sources import open_source
from tests.conftest import random_crystal
from tests.toy_stores import simple_cif

HOW_MANY = 2000
SETTINGS = BuildSettings(GraphSettings(4.0, 4), None)
FLAT = {"lattice": [[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]], "species": ["Po"],
        "frac": [[0.0, 0, 0]]}  # fmt: skip
CIF = simple_cif("x", random_crystal(5, atoms=2))
WORDS = (b"null", b"NaN", b"1e999", b'"1,5"', b"[]", b"{}", b"-", b'"', b";", b"\t",
         b"\0", b"\xff\xfe", b"\xc3\x28", b"\n", b",,", b"9" * 400, b"true", b"id",
         b"structure", b"007", b"\\ud800", b"[" * 3000)  # fmt: skip


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Cut, repeat, swap, flip or insert bytes, one to four times."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 8, 40)))
        part, kind = data[start:end], rng.randrange(6)
        if kind == 0:
            data = data[:start] + data[end:]
        elif kind == 1:
            data = data[:end] + part * rng.randint(1, 3) + data[end:]
        elif kind == 2:
            data = data[:start] + rng.choice(WORDS) + data[end:]
        elif kind == 3:
            data = (
                data[:start]
                + bytes(b ^ 1 << rng.randrange(8) for b in part)
                + (data[end:])
            )
        elif kind == 4:
            data = data[:start]
        else:
            other = rng.randrange(len(data) + 1)
            data = data[:other] + part + data[other:]
    return data


def layouts() -> list[bytes]:
    rows = {"x": {"structure": FLAT, "gap": 1}, "y": {"structure": FLAT, "gap": "2"}}
    columns = {key: {name: row[key] for name, row in rows.items()} for key in rows["x"]}
    split = {"columns": ["structure", "gap"], "index": [0, 1],
             "data": [[FLAT, 1.0], [FLAT, None]]}  # fmt: skip
    sites = [{"species": [{"element": "Po", "occu": 1}], "abc": [0, 0, 0]}]
    full = {"@class": "Structure", "lattice": {"matrix": FLAT["lattice"]},
            "sites": sites}  # fmt: skip
    jarvis = {"lattice_mat": FLAT["lattice"], "coords": [[0, 0, 0]], "elements": ["Po"],
              "cartesian": False}  # fmt: skip
    listed = [{"id": "007", "structure": full, "properties": {"gap": 1}}, full]
    found = [FLAT, rows, columns, split, listed, {"data": listed},
             [{"jid": "J-1", "atoms": jarvis, "gap": "na"}, {"atoms": jarvis}],
             [{"cif": CIF, "name": "a"},
              {"structure": json.dumps(full), "name": "b"}]]  # fmt: skip
    return [json.dumps(content).encode() for content in found]


def json_files(folder: Path, rng: random.Random) -> Path:
    path = folder / rng.choice(("data.json", "matbench_x.json", "data.jsonl"))
    path.write_bytes(spoil(rng.choice(layouts()), rng))
    return path


TABLES = (
    "a,1.5\nb,2\nc,3\n",
    "a;1,5\nb;2\nc;3,25\n",
    ",material_id,gap [eV],note\n0,a,1.5,x\n1,b,2,y\n2,c,,z\n",
    "# some\nid,gap\na.cif,1\nb.cif,2\nc.cif,3\n",
    "sep=\t\nid\tgap\na\t1,5\nb\t2\nc\t3\n",
)


def csv_files(folder: Path, rng: random.Random) -> Path:
    for name in "abc":
        (folder / f"{name}.cif").write_text(CIF)
    data = rng.choice(TABLES).encode(rng.choice(("utf-8", "utf-8-sig", "utf-16")))
    name = rng.choice(("id_prop.csv", "properties.csv", "targets.csv"))
    (folder / name).write_bytes(spoil(data, rng))
    return folder


def zip_files(folder: Path, rng: random.Random) -> Path:
    memory = BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA,
                       zipfile.ZIP_BZIP2))  # fmt: skip
    with zipfile.ZipFile(memory, "w", kind) as archive:
        for name in ("a.cif", "b.xyz", "in/POSCAR", "c.json", "../d.cif"):
            archive.writestr(name, CIF if "cif" in name else "1\n\nPo 0 0 0\n")
        archive.writestr("id_prop.csv", TABLES[0])
    path = folder / "all.zip"
    path.write_bytes(spoil(memory.getvalue(), rng))
    return path


def counted(path: Path) -> bool:
    """Read a source as a build does; return whether it could be opened."""
    try:
        source = open_source(path)
    except InputError as error:
        return "\n" in str(error) and pytest.fail(f"more than one line: {error}")
    records = list(source.records())
    assert records, "an entry is lost without a word"
    arrays = build_shard(records, source.properties, SETTINGS)
    refused = read_list(arrays["rejections"])
    assert len(arrays["atoms"]) + len(refused) == len(records)
    assert all(reason for _, _, reason in refused)
    for remark in source.remarks:
        remark.encode("ascii", "backslashreplace")
    return True


def try_some(make: Callable, folder: Path, seeds: range) -> int:
    opened = 0
    for seed in seeds:
        where = folder / str(seed)
        where.mkdir()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opened += counted(make(where, random.Random(seed)))
        except Exception as error:
            raise AssertionError(f"seed {seed} of {make.__name__}") from error
    return opened


@pytest.mark.parametrize("make", [json_files, csv_files, zip_files])
def test_some_spoiled_files(tmp_path, make):
    assert try_some(make, tmp_path, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("make", [json_files, csv_files, zip_files])
def test_spoiled_files(tmp_path, make):
    opened = try_some(make, tmp_path, range(HOW_MANY))
    assert opened > HOW_MANY // 10
