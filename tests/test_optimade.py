"""OPTIMADE: against the reference server, with typical faults of servers."""

from __future__ import annotations

import gzip
import json
import re
import time
from email.utils import formatdate
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from crysdistill.corpus.build import build
from crysdistill.errors import BadStructure, InputError
from crysdistill.sources import open_source, parse
from crysdistill.sources.snapshot import fetch, read_origin
from crysdistill.store.origins import Origin, is_non_commercial
from crysdistill.store.store import Store

from .forks import Command, run
from .optimade_server import Proxy, reference_server, resource

for _package in ("optimade", "tenacity", "fastapi", "mongomock"):
    _reason = f"{_package} is not installed: pip install 'crysdistill[dev]'"
    pytest.importorskip(_package, reason=_reason)

from crysdistill.sources import optimade, web  # noqa: E402
from crysdistill.sources.optimade import (  # noqa: E402
    DATABASES,
    OptimadeService,
    Query,
)
from crysdistill.sources.optimade_entries import entry_of  # noqa: E402

PAGE = 9
ELEMENTS = ("Si", "O", "Fe", "Na", "Cl", "Ti", "La", "S")


def random_structure(rng: np.random.Generator) -> Structure:
    """Return a structure without symmetry and with some atoms outside the cell."""
    while True:
        lengths, angles = rng.uniform(3, 9, 3), rng.uniform(70, 110, 3)
        number = int(rng.integers(1, 9))
        structure = Structure(
            Lattice.from_parameters(*lengths, *angles),
            rng.choice(ELEMENTS, number),
            rng.uniform(-1, 2, (number, 3)),
        )
        if structure.is_valid(tol=1):
            return structure


_rng = np.random.default_rng(7)
STRUCTURES = {f"s-{n:02d}": random_structure(_rng) for n in range(60)}
_ROCK = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])


def _species(*symbols: str, share: float = 1.0, **more) -> list[dict]:
    shares = [share] * len(symbols)
    return [
        {"name": "Na", "chemical_symbols": symbols, "concentration": shares, **more},
        {"name": "Cl", "chemical_symbols": ["Cl"], "concentration": [1.0]},
    ]


REFUSED = {
    "disordered": (
        {"species": _species("Na", "K", share=0.5)},
        "site 0 is disordered (Na 0.5 + K 0.5)",
    ),
    "vacant": (
        {"species": _species("Na", "vacancy", share=0.5)},
        "site 0 is disordered (Na 0.5 + vacancy 0.5)",
    ),
    "unknown": (
        {"species": _species("X")},
        "site 0 holds `X`, not an element between H and",
    ),
    "attached": (
        {"species": _species("Na", attached=["H"], nattached=[2])},
        "site 0 has H attached, without positions",
    ),
    "nameless": ({"species_at_sites": ["Na", "Br"]}, "site 1 holds `Br`, which"),
    "layer": (
        {"dimension_types": [1, 1, 0], "nperiodic_dimensions": 2},
        "periodic in 2 of 3 directions",
    ),
    "hydrogens": (
        {"structure_features": ["implicit_atoms"]},
        "has implicit_atoms: not every atom has one known position",
    ),
    "no-lattice": ({"lattice_vectors": None}, "no `lattice_vectors` in the database"),
    "no-sites": (
        {"cartesian_site_positions": None},
        "no `cartesian_site_positions` in the database",
    ),
    "flat": (
        {"lattice_vectors": [[4, 0, 0], [0, 4, 0], [0, 4, 0]]},
        "span no volume",
    ),
    "odd": ({"species_at_sites": ["Na"]}, "1 atoms but coordinates of shape (2, 3)"),
}  # fmt: skip
RESOURCES = [
    *(resource(k, s, gap=float(n)) for n, (k, s) in enumerate(STRUCTURES.items())),
    *(resource(name, _ROCK, **change) for name, (change, _) in REFUSED.items()),
]
PAGES = -(-len(RESOURCES) // PAGE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with reference_server(tmp_path_factory.mktemp("server"), RESOURCES) as port:
        yield port


@pytest.fixture
def proxy(server, monkeypatch) -> Proxy:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(web, "FIRST_WAIT", 0.002)
    return Proxy(server)


@pytest.fixture
def spec(proxy) -> str:
    return f"optimade:{proxy.url}?page_limit={PAGE}"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "got.jsonl.gz"


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> bytes:
    """The result of an undisturbed download."""
    path = tmp_path_factory.mktemp("whole") / "got.jsonl.gz"
    spec = f"optimade:http://127.0.0.1:{server}?page_limit={PAGE}"
    return fetch(spec, path, progress=False).read_bytes()


def ids(path: Path) -> list[str]:
    lines = gzip.decompress(path.read_bytes()).splitlines()
    return [json.loads(line)["id"] for line in lines]


def assert_same(crystal, structure: Structure) -> None:
    numbers = [site.specie.Z for site in structure]
    assert crystal.atomic_numbers.tolist() == numbers
    assert np.allclose(crystal.cell, structure.lattice.matrix, rtol=0, atol=1e-12)
    apart = crystal.frac_coords - structure.frac_coords
    assert np.abs(apart - np.round(apart)).max() < 1e-9


def read(path: Path) -> tuple[dict, dict[str, str]]:
    good, refused = {}, {}
    for record in open_source(path).records():
        try:
            good[record.material_id] = parse(record)
        except BadStructure as error:
            refused[record.material_id] = str(error)
    return good, refused


# ------------------------------------------------------------------------------ results


def test_structures_come_out_as_they_went_in(spec, out, proxy):
    fetch(f"{spec}&properties=_exmpl_gap", out, progress=False)
    assert len(proxy.pages_asked()) == PAGES + 1  # and what properties there are
    assert open_source(out).count == len(RESOURCES)
    good, refused = read(out)
    assert list(good) == list(STRUCTURES)
    for number, (name, structure) in enumerate(STRUCTURES.items()):
        assert_same(good[name], structure)
        assert good[name].properties == {"_exmpl_gap": number}
    assert set(refused) == set(REFUSED)
    for name, (_, reason) in REFUSED.items():
        assert reason in refused[name]


def test_a_filter_is_asked_of_the_server(proxy, out):
    spec = f'optimade:{proxy.url}/v1?filter=elements HAS "Si" AND nelements=2'
    fetch(spec, out, progress=False)
    wanted = [
        name
        for name, s in STRUCTURES.items()
        if len(s.composition) == 2 and "Si" in s.composition
    ]
    assert wanted
    assert ids(out) == wanted
    assert read_origin(out).origin.query == 'elements HAS "Si" AND nelements=2'


def test_pages_that_are_too_large_are_asked_again_smaller(proxy, out):
    fetch(f"optimade:{proxy.url}", out, progress=False)  # the server allows 50
    assert len(ids(out)) == len(RESOURCES)
    first, second = proxy.pages_asked()[:2]
    assert "page_limit=100" in first
    assert "page_limit" not in second


def test_a_build_reads_a_database(spec, tmp_path):
    report = build([spec], tmp_path / "s.h5", workers=1, symmetry=None, progress=False)
    assert report.built == len(STRUCTURES)
    assert {r.material_id for r in report.rejections} == set(REFUSED)
    assert {r.source for r in report.rejections} == {spec}
    assert Store.open(report.store).material_ids == list(STRUCTURES)


@pytest.mark.slow
def test_real_structures(shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with gzip.open(shared_data / "mp_corpus" / "structures.jsonl.gz") as file:
        entries = [json.loads(line) for line in islice(file, 200)]
    structures = {
        e["id"]: Structure(Lattice(e["lattice"]), e["species"], e["frac"])
        for e in entries
    }
    resources = [resource(name, s) for name, s in structures.items()]
    with reference_server(tmp_path, resources) as port:
        path = fetch(f"optimade:http://127.0.0.1:{port}", tmp_path / "a.jsonl.gz")
    good, refused = read(path)
    assert not refused
    assert list(good) == list(structures)
    for name, structure in structures.items():
        assert_same(good[name], structure)


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "fault",
    [
        "drop",
        "cut",
        "half",
        "html",
        "status 500",
        "status 503 0",
        "status 429",
        "slow 0.1",
    ],
)
def test_one_fault_changes_nothing(spec, out, proxy, whole, fault):
    proxy.faults = ["", "", fault, "", fault, fault]
    fetch(spec, out, progress=False)
    assert out.read_bytes() == whole
    more = 0 if fault.startswith("slow") else 3
    assert len(proxy.pages_asked()) == PAGES + more


def test_a_service_that_takes_too_long_is_asked_again(
    spec, out, proxy, whole, monkeypatch
):
    monkeypatch.setattr(web, "TIMEOUT", (1.0, 0.5))
    proxy.faults = ["", "slow 1"]
    fetch(spec, out, progress=False)
    assert out.read_bytes() == whole
    assert len(proxy.pages_asked()) == PAGES + 1


@pytest.mark.parametrize("as_date", [False, True])
def test_we_wait_as_long_as_the_service_asks(spec, out, proxy, whole, as_date):
    # Dates have whole seconds, so a wait of two may last just over one second.
    after = (
        formatdate(time.time() + 2, usegmt=True).replace(" ", "_") if as_date else "1"
    )
    proxy.faults = ["", f"status 429 {after}"]
    fetch(spec, out, progress=False)
    asked = [when for when, path in proxy.asked if "/structures" in path]
    assert asked[2] - asked[1] > 0.9
    assert asked[3] - asked[2] < 0.9
    assert out.read_bytes() == whole


def test_waits_grow_and_long_ones_are_told(monkeypatch, proxy, caplog):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    monkeypatch.setattr(web, "FIRST_WAIT", 1.0)
    proxy.faults = ["status 500"] * 8
    with pytest.raises(InputError, match=r"no usable answer after 8 tries"):
        web.Web().get(f"{proxy.url}/v1/structures")
    assert [wait for wait in waits if wait] == [1, 2, 4, 8, 16, 32, 60]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert told[-1] == (
        f"{proxy.url}/v1/structures: it answers 500 Internal Server Error; waiting 60 s"
    )


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("drop", r"after 8 tries, it drops the connection; look whether"),
        ("cut", r"after 8 tries, its answer ends early; look whether"),
        ("status 502", r"after 8 tries, it answers 502 Bad Gateway; look whether"),
        (
            "html",
            r"its answer is not JSON: `<html><body> <h1>Down for maintenance</h1>",
        ),
        ("half", r'its answer is not JSON: `{"data":\[{"id":"s-18",.{58}\.\.\.`'),
        ("status 429 7200", r"429 .* asks to wait 7,200 s; come back then"),
        ("json [1, 2]", r"unexpected answer `\[1, 2\]`; is this the right address"),
        ('json {"data": 5}', r"not an answer in OPTIMADE's format: `{'data': 5}`"),
        (
            'json {"data": [], "meta": {"more_data_available": true}}',
            r"has more entries but does not say where they are",
        ),
    ],
)
def test_what_does_not_end_is_told_and_gone_on_with(
    spec, out, proxy, whole, fault, text
):
    proxy.faults = ["", "", *[fault] * 8]
    with pytest.raises(InputError, match=text) as caught:
        fetch(spec, out, progress=False)
    assert f"{2 * PAGE} entries are kept in {out}.parts, the same" in str(caught.value)
    assert not out.exists()
    proxy.faults = []
    fetch(spec, out, progress=False)
    assert out.read_bytes() == whole


def test_an_entry_that_is_none_is_quarantined(spec, out, proxy):
    proxy.faults = ['json {"data": [5, {"type": "structures"}, {"id": "a"}]}']
    fetch(spec, out, progress=False)
    _, refused = read(out)
    assert refused == {
        "got-1": "line 1: an entry without `id`: `5`",
        "got-2": "line 2: an entry without `id`: `{'type': 'structures'}`",
        "a": "line 3: no `attributes`; ask the database",
    }


def test_what_the_server_refuses_is_told(proxy, out):
    spec = f"optimade:{proxy.url}?filter=colour=2"
    with pytest.raises(InputError, match=r"/v1/structures: refused, 400 .*colour"):
        fetch(spec, out, progress=False)
    assert not list(out.parent.iterdir())
    with pytest.raises(
        InputError, match=r"/none/v1/structures: refused, 404 Not Found"
    ):
        fetch(f"optimade:{proxy.url}/none", out, progress=False)


def test_nobody_there(out, monkeypatch):
    monkeypatch.setattr(web, "FIRST_WAIT", 0.002)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(
        InputError, match=r"9/v1/info: no usable answer after 3 tries, it"
    ):
        fetch("optimade:http://127.0.0.1:9", out, progress=False)


def test_killed_again_and_again_it_ends_the_same(spec, out, proxy, whole):
    proxy.delay = 0.1
    # Always within a page: while the service computes, or while we write the page.
    for pages, later in ((2, 0.05), (3, 0.0), (2, 0.11)):
        begun = len(proxy.pages_asked())
        process = Command("fetch", spec, "-o", out)
        while len(proxy.pages_asked()) < begun + pages:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(later)
        process.kill()
        assert not out.exists()
    proxy.delay = 0.0
    done = run("fetch", spec, "-o", out)
    assert done.returncode == 0, done.stderr
    assert f"{len(RESOURCES)} entries of Example provider (licence not" in done.stdout
    assert out.read_bytes() == whole
    # At most the interrupted page is requested again.
    assert len(proxy.pages_asked()) <= PAGES + 3
    assert [p.name for p in out.parent.iterdir() if "parts" in p.name] == []


# ---------------------------------------------------------------------------- origins


@pytest.mark.parametrize(
    ("attributes", "licence"),
    [
        ({}, ""),
        ({"available_licenses": ["CC-BY-4.0"]}, "CC-BY-4.0"),
        ({"available_licenses": ["CC-BY-NC-4.0", "MIT"]}, "MIT"),
        ({"available_licenses": ["CC-BY-NC-4.0"]}, "CC-BY-NC-4.0"),
        ({"available_licenses": ["MIT", "CC0-1.0"]}, "MIT OR CC0-1.0"),
        (
            {"license": "https://creativecommons.org/licenses/by-nc/4.0/"},
            "CC-BY-NC-4.0",
        ),
        (
            {"license": {"href": "https://spdx.org/licenses/CC-BY-4.0.html"}},
            "CC-BY-4.0",
        ),
        ({"license": "https://creativecommons.org/publicdomain/zero/1.0/"}, "CC0-1.0"),
        ({"license": "https://example.org/terms", "available_licenses": []}, ""),
    ],
)
def test_the_service_says_its_licence(proxy, attributes, licence):
    proxy.info = {"data": {"attributes": attributes}}
    assert optimade.open_service(proxy.url).origin.licence == licence


@pytest.mark.parametrize("info", [{}, {"data": []}, {"data": None, "meta": []}])
def test_a_service_that_says_nothing_of_itself(proxy, info):
    proxy.info = info
    origin = optimade.open_service(proxy.url).origin
    assert origin == Origin(f"{proxy.url}/v1", f"{proxy.url}/v1")


@pytest.mark.parametrize("offered", [[], ["CC-BY-4.0"]])
def test_what_forbids_commercial_use_is_not_lost(proxy, monkeypatch, offered):
    gnome = DATABASES["gnome"]._replace(url=proxy.url)
    monkeypatch.setitem(DATABASES, "gnome", gnome)
    proxy.info = {"data": {"attributes": {"available_licenses": offered}}}
    origin = optimade.open_service("gnome").origin
    assert (origin.name, origin.licence) == ("GNoME (odbx)", "CC-BY-NC-4.0")
    assert is_non_commercial(origin.licence)


def test_known_databases():
    wanted = {"mp", "oqmd", "alexandria", "odbx", "jarvis", "nomad", "cod", "mcloud"}
    assert wanted <= set(DATABASES)
    assert all(d.url.startswith("https://") for d in DATABASES.values())
    assert DATABASES["mp"].licence == DATABASES["oqmd"].licence == "CC-BY-4.0"


# ------------------------------------------------------------------------------ queries


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ("http://?page_limit=5", r"`http:/v1/info` is not the address of a web"),
        ("mpp", r"unknown database `mpp`; did you mean `mp`\?"),
        ("zzzz", r"unknown database `zzzz`; known: mp, oqmd, .*; or give an address"),
        ("mp?filtr=nelements=2", r"unknown option `filtr`; did you mean `filter`\?"),
        ("mp?xyz=1", r"unknown option `xyz`; known: filter, properties, page_limit"),
        ("mp?page_limit=0", r"`page_limit` is `0` but must be at least 1"),
        ("mp?page_limit=ten", r"`page_limit` is `ten` but must be at least 1"),
        (
            "mp?filter=nelements==2",
            r"`nelements==2` is not understood from `=2` on; it",
        ),
        (
            "mp?filter=nelements=",
            r"`nelements=` is not understood at its end; it should",
        ),
    ],
)
def test_queries_that_are_not_understood(rest, text):
    with pytest.raises(InputError, match=text):
        optimade.open_service(rest)


def test_an_unknown_property_is_told(proxy):
    with pytest.raises(InputError, match=r"`_exmpl_gab`; did you mean `_exmpl_gap`\?"):
        optimade.open_service(f"{proxy.url}?properties=_exmpl_gab")


def test_a_query_may_be_encoded_or_not(proxy):
    plain = optimade.open_service(
        f'{proxy.url}?filter=elements HAS "Si" AND nelements=2&page_limit=5'
    )
    encoded = optimade.open_service(
        f"{proxy.url}/v1/structures?page_limit=5"
        "&filter=elements%20HAS%20%22Si%22%20AND%20nelements%3D2"
    )
    assert plain.query == encoded.query
    assert plain.query.base == f"{proxy.url}/v1"
    assert plain.query.page_limit == 5


class Answers:
    """A fake web with given answers."""

    def __init__(self, *answers: dict) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def get(self, url: str, params: object = None) -> dict:
        self.asked.append(url)
        return self.answers.pop(0)


def service(*answers: dict) -> OptimadeService:
    query = Query("http://a.example/v1")
    return OptimadeService(Origin("a"), query, Answers(*answers))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "link",
    [
        "http://a.example/v1/structures?page=2",
        {"href": "http://a.example/v1/structures?page=2"},
        "/v1/structures?page=2",
        "?page=2",
    ],
)
def test_the_next_page_is_named_in_several_ways(link):
    asked = service({"data": [], "links": {"next": link}}, {"data": []})
    first, last = asked.pages()
    assert first.cursor == asked.web.asked[1] == "http://a.example/v1/structures?page=2"
    assert last.cursor is None


def test_a_circle_of_pages_ends():
    again = {"data": [], "links": {"next": "?page=2"}}
    asked = service(again, again)
    with pytest.raises(InputError, match=r"page=2: leads back to itself"):
        list(asked.pages())
    other = {"data": [], "links": {"next": "?page=3"}}
    asked = service(again, other, again)
    with pytest.raises(InputError, match=r"page=2: leads back to itself"):
        list(asked.pages())


def test_the_service_sets_the_pace(monkeypatch):
    waits = []
    monkeypatch.setattr("crysdistill.sources.optimade.time.sleep", waits.append)
    pages = [
        {"data": [], "links": {"next": f"?page={n}"}, "meta": {"request_delay": delay}}
        for n, delay in enumerate([1.5, 500])
    ]
    list(service(*pages, {"data": []}).pages())
    assert waits == [0.0, 1.5, 60.0]


def test_a_property_that_is_no_number():
    entry = entry_of(resource("a", _ROCK, gap="wide"), ["gap"])
    assert entry["problem"] == "`gap` is `wide`, not a number; leave it out"
    assert entry_of(resource("a", _ROCK), ["gap"])["gap"] is None


def test_species_may_be_left_out_where_every_site_holds_an_element():
    entry = entry_of(resource("a", _ROCK, species=None))
    assert entry["species"] == ["Na", "Cl"]


@pytest.mark.parametrize(
    "garbage",
    [
        {"species": [5]},
        {"species": [{"name": ["a"]}]},
        {"species": 7},
        {"species_at_sites": 5},
        {"species": [{"name": "Na", "chemical_symbols": ["Na"], "concentration": 5}]},
        {"dimension_types": 3},
        {"structure_features": 8},
        {"lattice_vectors": "abc"},
        {"cartesian_site_positions": [[0, 0], [1, 1]]},
    ],
)  # fmt: skip
def test_garbage_in_an_entry_stops_no_other(garbage):
    entry = entry_of(resource("a", _ROCK, **garbage))
    assert entry["id"] == "a"
    assert re.search("not in OPTIMADE's format|are not numbers", entry["problem"])
