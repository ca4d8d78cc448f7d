"""JARVIS, Matbench and the Materials Project, without a network.

The real clients run where they are installed: `jarvis-tools` and `matminer` on files in
their caches, `mp-api` against a server on this machine. Elsewhere - in the development
environment, with which the last two do not agree - a fake of the client's module stands
in for them. Each test says which client it uses.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest

from crysdistill.errors import InputError
from crysdistill.sources import jarvis, matbench, materials_project, whole_sets
from crysdistill.sources.layouts import matbench_id

from .test_sources import STRUCTURES, labels, outcome


def atoms(key: str, cartesian: bool = False) -> dict:
    """A structure as JARVIS writes it."""
    structure = STRUCTURES[key]
    return {
        "lattice_mat": structure.lattice.matrix.tolist(),
        "coords": (
            structure.cart_coords if cartesian else structure.frac_coords
        ).tolist(),
        "elements": [site.specie.symbol for site in structure],
        "abc": list(structure.lattice.abc),
        "angles": list(structure.lattice.angles),
        "cartesian": cartesian,
        "props": [""] * len(structure),
    }


def jarvis_entries() -> list:
    """Entries as in `dft_3d`: "na" for unknown values, mixed types, garbage."""
    collapsed = atoms("NaCl")
    collapsed["coords"] = [[0, 0, 0]] * len(collapsed["coords"])
    return [
        {"jid": "JVASP-1", "atoms": atoms("NaCl"), "gap": 5.0, "slme": "na", "icsd": 7},
        {
            "jid": "JVASP-2",
            "atoms": atoms("TiO2", True),
            "gap": 0,
            "slme": 3.5,
            "icsd": [],
        },
        {"jid": "JVASP-3", "atoms": {"elements": ["Si"]}, "gap": "na"},
        {"jid": "JVASP-4", "atoms": collapsed, "gap": 1.0},
        {"jid": "JVASP-5", "gap": 1.0},
        {"jid": "JVASP-6", "atoms": atoms("CsCl"), "gap": "na", "slme": "na"},
    ]


def check_jarvis(good: dict, refused: list) -> None:
    assert list(good) == ["JVASP-1", "JVASP-2", "JVASP-6"]
    assert labels(good) == {
        "JVASP-1": {"gap": 5.0},
        "JVASP-2": {"gap": 0.0, "slme": 3.5},
        "JVASP-6": {},
    }
    assert good["JVASP-2"].formula == "TiO2"
    for key, name in (("NaCl", "JVASP-1"), ("TiO2", "JVASP-2")):
        assert good[name].volume == pytest.approx(STRUCTURES[key].volume)
    reasons = dict(refused)
    assert "no `lattice_mat` in its `atoms`" in reasons["JVASP-3"] or (
        "no structure" in reasons["JVASP-3"]
    )
    assert "two atoms on one point" in reasons["JVASP-4"]
    assert "no structure" in reasons["JVASP-5"] or "no `atoms`" in reasons["JVASP-5"]


def write_pages(service, path: Path) -> Path:
    """Write the pages of a service as a download does."""
    entries = [entry for page in service.pages() for entry in page.entries]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# ------------------------------------------------------------------------------ JARVIS


def test_a_file_of_jarvis(tmp_path):
    path = tmp_path / "jdft_3d.json"
    path.write_text(json.dumps(jarvis_entries()))
    check_jarvis(*outcome(path))
    path = tmp_path / "jdft_3d.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in jarvis_entries()))
    check_jarvis(*outcome(path))


def fake_figshare(monkeypatch, answer) -> None:
    """A fake of `jarvis.db.figshare`."""
    figshare = types.ModuleType("jarvis.db.figshare")
    figshare.get_db_info = lambda: {"dft_3d": [], "alex_pbe_hull": [], "cord19": []}
    figshare.data = answer
    database = types.ModuleType("jarvis.db")
    database.figshare = figshare
    package = types.ModuleType("jarvis")
    package.db = database
    for module in (package, database, figshare):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_jarvis_with_a_fake_client(tmp_path, monkeypatch, capsys):
    def data(name):
        print("Obtaining 3D dataset 94k ...")
        return [*jarvis_entries(), "garbage"]

    fake_figshare(monkeypatch, data)
    monkeypatch.setattr(whole_sets, "PAGE_SIZE", 3)
    service = jarvis.open_service("dft_3d")
    assert capsys.readouterr().out == ""
    assert service.total == 7
    assert service.origin.name == "JARVIS dft_3d"
    assert jarvis.open_service("alex_pbe_hull").origin.licence == "CC-BY-4.0"
    pages = list(service.pages())
    assert [(len(page.entries), page.cursor) for page in pages] == [
        (3, 3),
        (3, 6),
        (1, None),
    ]
    again = list(service.pages(pages[0].cursor))
    assert [page.entries for page in again] == [page.entries for page in pages[1:]]
    good, refused = outcome(write_pages(service, tmp_path / "a.jsonl"))
    check_jarvis(good, refused[:-1])
    assert refused[-1] == ("a-7", "line 7: `garbage` is no entry of JARVIS")
    for answer in ([{"abstract": "x"}], {}):
        fake_figshare(monkeypatch, lambda name, answer=answer: answer)
        with pytest.raises(InputError, match="`cord19` holds no structures"):
            jarvis.open_service("cord19")

    def fails(name):
        raise zipfile.BadZipFile("File is not a zip file")

    fake_figshare(monkeypatch, fails)
    with pytest.raises(InputError, match=r"cannot be downloaded \(BadZipFile: File is"):
        jarvis.open_service("dft_3d")
    with pytest.raises(
        InputError, match="unknown data set `dft3d`; did you mean `dft_3d`"
    ):
        jarvis.open_service("dft3d")


def test_jarvis_with_its_client(tmp_path, monkeypatch):
    """The client is real; its cache holds the file, so it needs no network."""
    figshare = pytest.importorskip("jarvis.db.figshare", reason="no jarvis-tools")
    _, name, *_ = figshare.get_db_info()["dft_3d"]
    monkeypatch.setattr(figshare, "get_cache_dir", lambda *_: str(tmp_path))
    with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
        archive.writestr(name, json.dumps(jarvis_entries()))
    service = jarvis.open_service("dft_3d")
    check_jarvis(*outcome(write_pages(service, tmp_path / "a.jsonl")))


# ---------------------------------------------------------------------------- Matbench


def matbench_file(index: list | None = None) -> dict:
    rows = [
        [STRUCTURES[key].as_dict(), 90.5 + n] for n, key in enumerate(("NaCl", "CsCl"))
    ]
    table = {"columns": ["structure", "last phdos peak"], "data": rows}
    return table if index is None else {"index": index, **table}


@pytest.mark.parametrize(
    ("name", "index", "ids"),
    [
        ("matbench_phonons.json", [0, 1], ["mb-phonons-1", "mb-phonons-2"]),
        ("matbench_log_gvrh.json", None, ["mb-log-gvrh-1", "mb-log-gvrh-2"]),
        (
            "a.json",
            ["mb-phonons-0001", "mb-phonons-0007"],
            ["mb-phonons-0001", "mb-phonons-0007"],
        ),
        ("matbench_phonons.json", [3, 5], ["matbench_phonons-3", "matbench_phonons-5"]),
        ("a.json", [0, 1], ["a-0", "a-1"]),
    ],
)
def test_a_file_of_matbench(tmp_path, name, index, ids):
    (tmp_path / name).write_text(json.dumps(matbench_file(index)))
    good, refused = outcome(tmp_path / name)
    assert not refused
    assert list(good) == ids
    assert [crystal.formula for crystal in good.values()] == ["NaCl", "CsCl"]
    assert good[ids[1]].properties == {"last phdos peak": 91.5}


def test_ids_of_matbench_are_as_long_as_the_number_of_rows():
    assert matbench_id("matbench_phonons", 0, 1265) == "mb-phonons-0001"
    assert matbench_id("matbench_mp_gap", 106112, 106113) == "mb-mp-gap-106113"


def test_matbench_with_a_fake_loader(tmp_path, monkeypatch):
    """matminer's loader is a fake that returns a table in matminer's form."""
    table = pd.DataFrame(
        {
            "last phdos peak": [98.5, 7.0, float("inf"), 2.0],
            "structure": [
                STRUCTURES["NaCl"],
                STRUCTURES["CsCl"],
                STRUCTURES["NaCl"],
                None,
            ],
        }
    )
    module = types.ModuleType("matminer.datasets")
    module.load_dataset = lambda name: table
    monkeypatch.setitem(sys.modules, "matminer", types.ModuleType("matminer"))
    monkeypatch.setitem(sys.modules, "matminer.datasets", module)
    service = matbench.open_service("matbench_phonons")
    assert service.origin.licence == "CC-BY-4.0"
    assert service.origin.url.endswith("/matbench_phonons.json.gz")
    good, refused = outcome(write_pages(service, tmp_path / "a.jsonl"))
    assert labels(good) == {
        "mb-phonons-1": {"last phdos peak": 98.5},
        "mb-phonons-2": {"last phdos peak": 7.0},
    }
    assert dict(refused) == {
        "mb-phonons-3": "line 3: `last phdos peak` is `inf`, not a finite number; mend "
        "it, or write null",
        "mb-phonons-4": "line 4: no structure in its row; leave it out",
    }

    def fails(name):
        raise UserWarning("hash does not match")

    module.load_dataset = fails
    with pytest.raises(
        InputError, match=r"\(UserWarning: hash.*\); download https:.*sha256 4db5"
    ):
        matbench.open_service("phonons")


def test_matbench_with_its_loader(tmp_path, monkeypatch):
    """matminer is real; its folder holds the file, so it needs no network."""
    retrieval = pytest.importorskip(
        "matminer.datasets.dataset_retrieval", reason="no matminer"
    )
    path = tmp_path / "matbench_phonons.json.gz"
    path.write_bytes(gzip.compress(json.dumps(matbench_file([0, 1])).encode()))
    known = retrieval._load_dataset_dict()
    known["matbench_phonons"]["hash"] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(retrieval, "_dataset_dict", known)
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path))
    service = matbench.open_service("phonons")
    good, refused = outcome(write_pages(service, tmp_path / "a.jsonl"))
    assert not refused
    assert labels(good)["mb-phonons-2"] == {"last phdos peak": 91.5}
    assert good["mb-phonons-2"].formula == "CsCl"


def test_matbench_without_matminer(monkeypatch):
    monkeypatch.setitem(sys.modules, "matminer", None)
    monkeypatch.setitem(sys.modules, "matminer.datasets", None)
    with pytest.raises(
        InputError,
        match=r"`matminer` is not installed, and does not work with pandas 3; "
        r"download https://.*/matbench_phonons.json.gz \(sha256 4db551f.* as a source",
    ):
        matbench.open_service("matbench_phonons")


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("matbench_steels", "`matbench_steels` holds compositions, no structures"),
        ("matbench_phonon", "did you mean `phonons`"),
        ("x", "unknown task `x`; known: dielectric, "),
    ],
)
def test_unknown_tasks(task, reason):
    with pytest.raises(InputError, match=reason):
        matbench.open_service(task)


# ------------------------------------------------------------------- Materials Project


def documents(count: int) -> list[dict]:
    """Documents of the summary endpoint, one of them without a structure."""
    found = [
        {
            "material_id": f"mp-{n}",
            "structure": STRUCTURES["NaCl" if n % 2 else "CsCl"].as_dict(),
            "band_gap": float(n),
        }
        for n in range(1, count + 1)
    ]
    del found[1]["structure"]
    return found


class FakeSearch:
    """A fake of `SummaryRester`, with those arguments of the real one that we use."""

    def __init__(self):
        self.asked, self.fails = [], False

    def search(
        self,
        elements: list[str] | None = None,
        num_sites: tuple[int, int] | None = None,
        band_gap: tuple[float, float] | None = None,
        is_stable: bool | None = None,
        spacegroup_number: int | None = None,
        formula: str | None = None,
        magnetic_ordering=None,
        include_gnome: bool = True,
        num_chunks: int | None = None,
        chunk_size: int = 1000,
        all_fields: bool = True,
        fields: list[str] | None = None,
        _page: int | None = None,
        _sort_fields: str | None = None,
        **kwargs,
    ):
        self.asked.append(
            {k: v for k, v in locals().items() if k != "self" and v is not None}
        )
        if self.fails:
            raise RuntimeError(
                "REST query returned with error status code 502\nbad gateway"
            )
        start = (_page - 1) * chunk_size
        return documents(5)[start : start + chunk_size]


@pytest.fixture
def fake_mp(monkeypatch) -> FakeSearch:
    """A fake of `mp_api.client`."""
    summary = FakeSearch()

    class MPRester:
        db_version = "2026.10.1"

        def __init__(self, key, **options):
            assert key == "k" * 32
            self.materials = types.SimpleNamespace(summary=summary)

    client = types.ModuleType("mp_api.client")
    client.MPRester = MPRester
    routes = types.ModuleType("mp_api.client.routes.materials.summary")
    routes.SummaryRester = FakeSearch
    for name in ("mp_api", "mp_api.client.routes", "mp_api.client.routes.materials"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mp_api.client", client)
    monkeypatch.setitem(sys.modules, routes.__name__, routes)
    monkeypatch.setenv("MP_API_KEY", "k" * 32)
    monkeypatch.setattr(materials_project, "PAGE_SIZE", 2)
    return summary


def test_materials_project_with_a_fake_client(tmp_path, fake_mp):
    service = materials_project.open_service("elements=Si,O&properties=band_gap")
    service.page_size = 2
    assert service.origin.licence == "CC-BY-4.0"
    assert service.origin.query == "elements=Si,O&properties=band_gap"
    pages = list(service.pages())
    assert [len(page.entries) for page in pages] == [2, 2, 1]
    assert pages[0].cursor == {"page": 2, "db_version": "2026.10.1"}
    assert pages[-1].cursor is None
    again = list(service.pages(json.loads(json.dumps(pages[0].cursor))))
    assert [page.entries for page in again] == [page.entries for page in pages[1:]]
    assert all(asked["_sort_fields"] == "material_id" for asked in fake_mp.asked)
    assert all(asked["num_chunks"] == 1 for asked in fake_mp.asked)
    good, refused = outcome(write_pages(service, tmp_path / "a.jsonl"))
    assert list(good) == ["mp-1", "mp-3", "mp-4", "mp-5"]
    assert good["mp-4"].properties == {"band_gap": 4.0}
    assert refused == [("mp-2", "line 2: no `structure` in the answer; leave it out")]
    with pytest.raises(
        InputError, match=r"database has changed from 2025 to 2026.10.1"
    ):
        next(service.pages({"page": 2, "db_version": "2025"}))
    fake_mp.fails = True
    with pytest.raises(
        InputError, match=r"mp: no usable answer \(RuntimeError: REST.*502 bad"
    ):
        next(service.pages())


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", {}),
        ("?elements=Si", {"elements": ["Si"]}),
        ("num_sites=1,20&is_stable=true", {"num_sites": (1, 20), "is_stable": True}),
        ("band_gap=0.5,", {"band_gap": (0.5, None)}),
        ("band_gap=1.5", {"band_gap": 1.5}),
        ("spacegroup_number=225", {"spacegroup_number": 225}),
        ("spacegroup_number=225,227", {"spacegroup_number": [225, 227]}),
        ("formula=Fe2O3", {"formula": "Fe2O3"}),
    ],
)
def test_queries(fake_mp, query, asked):
    service = materials_project.open_service(query)
    next(service.pages())
    own = (
        "num_chunks",
        "chunk_size",
        "all_fields",
        "fields",
        "_page",
        "_sort_fields",
        "kwargs",
    )
    found = {k: v for k, v in fake_mp.asked[0].items() if k not in own}
    assert found == {"include_gnome": False, **asked}
    assert fake_mp.asked[0]["fields"] == ["material_id", "structure"]


def test_gnome_is_non_commercial(fake_mp):
    service = materials_project.open_service("include_gnome=true")
    assert service.origin.licence == "CC-BY-4.0 AND CC-BY-NC-4.0"


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("element=Si", "unknown option `element`; did you mean `elements`"),
        ("is_stable=", "`is_stable` has no value"),
        ("magnetic_ordering=up", "`magnetic_ordering` is `up`; known: FM, AFM"),
        ("num_chunks=3", "unknown option `num_chunks`"),
    ],
)
def test_bad_queries(fake_mp, query, reason):
    with pytest.raises(InputError, match=reason):
        materials_project.open_service(query)


def test_no_key(fake_mp, monkeypatch):
    monkeypatch.delenv("MP_API_KEY")
    with pytest.raises(InputError, match=r"mp: no API key; get yours at .* MP_API_KEY"):
        materials_project.open_service("elements=Si")


class Summaries(BaseHTTPRequestHandler):
    """A summary endpoint for `mp-api`; its second response is an error."""

    asked: list[dict]

    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path.endswith("heartbeat"):
            answer = {
                "version": "0.86.0",
                "db_version": "2026.10.1",
                "access_controlled_batch_ids": [],
            }
        else:
            self.asked.append({"path": url.path, **query})
            if len(self.asked) == 2:
                self.send_error(502)
                return
            size, page = int(query["_per_page"]), int(query["_page"])
            found = documents(5)
            answer = {
                "data": found[(page - 1) * size : page * size],
                "meta": {"total_doc": len(found)},
            }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.slow  # the client waits before it tries again
def test_materials_project_with_its_client(tmp_path, monkeypatch):
    """The client is real, the server is ours, and fails once."""
    settings = pytest.importorskip("mp_api.client.core.settings", reason="no mp-api")
    handler = type("Handler", (Summaries,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setattr(settings.MAPI_CLIENT_SETTINGS, "ENDPOINT", endpoint)
        monkeypatch.setenv("MP_API_KEY", "k" * 32)
        service = materials_project.open_service(
            "elements=Na,Cl&num_sites=1,20&properties=band_gap"
        )
        service.page_size = 2
        pages = list(service.pages())
        assert [len(page.entries) for page in pages] == [2, 2, 1]
        again = list(service.pages(pages[0].cursor))
        assert [page.entries for page in again] == [page.entries for page in pages[1:]]
        first = handler.asked[0]
        assert first["path"].rstrip("/") == "/materials/summary"
        assert first["elements"] == "Na,Cl"
        assert (first["nsites_min"], first["nsites_max"]) == ("1", "20")
        assert first["_fields"] == "material_id,structure,band_gap"
        good, refused = outcome(write_pages(service, tmp_path / "a.jsonl"))
        assert list(good) == ["mp-1", "mp-3", "mp-4", "mp-5"]
        assert good["mp-3"].properties == {"band_gap": 3.0}
        assert [name for name, _ in refused] == ["mp-2"]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("module", "package", "text"),
    [
        (
            jarvis,
            "jarvis",
            r"`jarvis-tools` is not installed; `pip install crysdistill\[jarvis\]`",
        ),
        (
            materials_project,
            "mp_api",
            r"`mp-api` is not installed; `pip install crysdistill\[mp\]`",
        ),
    ],
)
def test_without_the_package(monkeypatch, module, package, text):
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=text):
        module.open_service("x")
