"""Hugging Face: the real client on tables from the tests, without a hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crysdistill.errors import InputError

datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from crysdistill.sources import hugging_face  # noqa: E402
from crysdistill.sources.hugging_face import open_service  # noqa: E402

from .test_sources import outcome  # noqa: E402


def row(number: int, **changes) -> dict:
    """A row in the format of LeMat-Bulk."""
    kinds = [
        {"name": n, "chemical_symbols": [n], "concentration": [1]} for n in ("Cs", "Cl")
    ]
    return {
        "immutable_id": f"agm{number}",
        "lattice_vectors": [[4.0, 0, 0], [0, 5, 0], [1, 0, 6]],
        "cartesian_site_positions": [[0.0, 0, 0], [2.5, 2.5, 3]],
        "species_at_sites": ["Cs", "Cl"],
        "species": json.dumps(kinds),
        "dimension_types": [1, 1, 1],
        "energy": float(number),
        **changes,
    }


def write(folder: Path, rows: list[dict], files: int = 2, licence="cc-by-4.0") -> Path:
    folder.mkdir()
    for number in range(files):
        part = pa.Table.from_pylist(rows[number::files])
        pq.write_table(part, folder / f"train-{number:05d}-of-{files:05d}.parquet")
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Crystals\n")
    return folder


def built(service, path: Path, **options) -> tuple[dict, dict]:
    """The result of a build from the pages of a service."""
    entries = [entry for page in service.pages() for entry in page.entries]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    good, refused = outcome(path, **options)
    return good, dict(refused)


def test_rows_become_crystals(tmp_path):
    write(tmp_path / "t", [row(n) for n in range(5)])
    service = open_service(f"{tmp_path / 't'}?properties=energy")
    assert service.origin.licence == "CC-BY-4.0"
    assert service.origin.query.endswith("/default/train")
    good, refused = built(service, tmp_path / "a.jsonl")
    assert not refused
    assert sorted(good) == [f"agm{n}" for n in range(5)]
    assert good["agm3"].properties == {"energy": 3.0}
    assert good["agm3"].frac_coords[1].tolist() == [0.5, 0.5, 0.5]
    assert good["agm3"].cell.tolist() == [[4, 0, 0], [0, 5, 0], [1, 0, 6]]


def test_a_page_goes_on_where_the_last_one_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(hugging_face, "PAGE_SIZE", 3)
    write(tmp_path / "t", [row(n) for n in range(10)], files=3)
    pages = list(open_service(str(tmp_path / "t")).pages())
    assert [len(page.entries) for page in pages] == [3, 3, 3, 1]
    assert pages[-1].cursor is None
    names = [[e["material_id"] for e in page.entries] for page in pages]
    assert sorted(name for page in names for name in page) == sorted(
        f"agm{n}" for n in range(10)
    )
    for number, page in enumerate(pages[:-1]):
        cursor = json.loads(json.dumps(page.cursor))
        rest = list(open_service(str(tmp_path / "t")).pages(cursor))
        found = [[e["material_id"] for e in page.entries] for page in rest]
        assert found == names[number + 1 :]


def test_bad_rows_say_why(tmp_path):
    mixed = json.dumps(
        [{"name": "M", "chemical_symbols": ["Fe", "Mn"], "concentration": [0.5, 0.5]}]
    )
    rows = [
        row(0),
        row(1, lattice_vectors=None),
        row(2, dimension_types=[1, 1, 0]),
        row(3, species=mixed, species_at_sites=["M", "Cl"]),
        row(4, species="{"),
        row(5, cartesian_site_positions=[[0.0, 0, 0], [0, 0, 0.1]]),
        row(6, species_at_sites=["Cs", "Xx"]),
        row(7, lattice_vectors=[[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]),
        row(8, cartesian_site_positions=[[0.0, 0, 0], [2.0]]),
        row(9, energy=float("inf")),
        row(10, immutable_id=None),
    ]
    write(tmp_path / "t", rows, files=1)
    service = open_service(f"{tmp_path / 't'}?properties=energy")
    good, refused = built(service, tmp_path / "a.jsonl")
    assert list(good) == ["agm0", "t-10"]
    starts = {
        "agm1": "no `lattice_vectors` in its row",
        "agm2": "periodic in 2 of 3 directions",
        "agm3": "site 0 is disordered (Fe 0.5 + Mn 0.5)",
        "agm4": "`species` is not valid JSON",
        "agm5": "two atoms on one point",
        "agm6": "site 1 holds `Xx`",
        "agm7": "its cell of 0 Å³ is too small",
        "agm8": "lattice or positions are no numbers",
        "agm9": "`energy` is `inf`, not a finite number",
    }
    assert refused.keys() == starts.keys()
    for name, start in starts.items():
        assert start in refused[name]


def test_flat_and_pymatgen_columns(tmp_path):
    from .test_sources import FLAT, STRUCTURES

    write(tmp_path / "flat", [{"id": "x", **FLAT}], files=1, licence="mit")
    service = open_service(str(tmp_path / "flat"))
    assert service.origin.licence == "MIT"
    assert built(service, tmp_path / "a.jsonl")[0]["x"].formula == "CsCl"
    text = json.dumps(STRUCTURES["NaCl"].as_dict())
    write(tmp_path / "text", [{"structure": text}, {"structure": "[]"}], files=1)
    good, refused = built(open_service(str(tmp_path / "text")), tmp_path / "a.jsonl")
    assert good["text-0"].formula == "NaCl"
    assert "not what pymatgen writes" in refused["text-1"]


def test_json_lines_and_saved_folders(tmp_path):
    rows = [row(n) for n in range(4)]
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(built(open_service(str(folder)), tmp_path / "a.jsonl")[0]) == 4
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    service = open_service(str(tmp_path / "saved"))
    assert len(built(service, tmp_path / "a.jsonl")[0]) == 4
    assert service.origin.licence == ""


def test_configurations_and_splits(tmp_path):
    folder = write(tmp_path / "t", [row(n) for n in range(4)])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: train-00000*\n"
        "- config_name: b\n  data_files: train-00001*\n---\n"
    )
    with pytest.raises(
        InputError, match="has several configurations; name one; known: a, b"
    ):
        open_service(str(folder))


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("LeMat-Bulk", r"should be `OWNER/NAME\[/CONFIG\[/SPLIT\]\]`"),
        ("a/b/c/d/e", "should be `OWNER"),
        ("./nothing", "nothing: no such folder"),
        (
            "{t}?propertys=energy",
            "unknown option `propertys`; did you mean `properties`",
        ),
        ("{t}?properties=enrgy", "no column `enrgy`; did you mean `energy`"),
        ("{bad}", "has the columns a; structures need `lattice_vectors"),
        ("{empty}", "cannot be read"),
    ],
)
def test_what_cannot_be_opened(tmp_path, rest, reason):
    write(tmp_path / "t", [row(0)], files=1)
    write(tmp_path / "bad", [{"a": 1}], files=1)
    (tmp_path / "empty").mkdir()
    folders = {name: tmp_path / name for name in ("t", "bad", "empty")}
    with pytest.raises(InputError, match=reason):
        open_service(rest.format(**folders))


def test_the_hub_is_asked_for_its_newest_revision(monkeypatch):
    """The hub is a fake; checks the requests, and the message of a failure."""
    import huggingface_hub

    asked = []

    def info(self, name, **options):
        asked.append(name)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    with pytest.raises(
        InputError,
        match=r"`LeMaterial/LeMat-Bulk` cannot be read \(Conn.*no route to host",
    ):
        open_service("LeMaterial/LeMat-Bulk/compatible_pbe")
    assert asked == ["LeMaterial/LeMat-Bulk"]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        InputError,
        match=r"`datasets` is not installed; `pip install crysdistill\[hf\]`",
    ):
        open_service("a/b")
