"""Snapshots: a download that is killed anywhere resumes to the same result."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import importlib
import json
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crysdistill.cli import VERBS, main
from crysdistill.corpus import build as building
from crysdistill.corpus.build import build
from crysdistill.errors import BadStructure, InputError
from crysdistill.locks import only_one
from crysdistill.sources import open_source, open_sources, parse, snapshot
from crysdistill.sources.services import Page
from crysdistill.sources.snapshot import fetch, origin_path, read_origin
from crysdistill.sources.specs import SERVICES, is_spec, open_service
from crysdistill.store.origins import Origin
from crysdistill.store.store import Store

FLAT = {"lattice": [[4, 0, 0], [0, 4, 0], [0, 0, 4]], "species": ["Cs", "Cl"]}
ENTRIES = [{"id": f"x-{n}", **FLAT, "frac": [[0, 0, 0], [0.5] * 3]} for n in range(11)]
ORIGIN = Origin("Fake", "https://fake.example", "CC-BY-NC-4.0")
SPEC = "fake:all"


class Killed(BaseException):
    """Not caught by our code, as if the process was killed."""


@dataclass
class Fake:
    """A service with eleven entries, three per page; it may fail before a page."""

    fails: dict[int, BaseException] = field(default_factory=dict)
    origin: Origin = ORIGIN
    total: int | None = None
    size: int = 3
    entries: list = field(default_factory=lambda: ENTRIES)
    served: list[int] = field(default_factory=list)
    opened: int = 0

    def open(self, spec: str) -> Fake:
        self.opened += 1
        return self

    def pages(self, cursor=None):
        self.total = len(self.entries)
        at = cursor["at"] if cursor else 0
        while True:
            page = at // self.size
            if page in self.fails:
                raise self.fails.pop(page)
            self.served.append(page)
            end = at + self.size
            following = {"at": end} if end < len(self.entries) else None
            yield Page(self.entries[at:end], following)
            if following is None:
                return
            at = end


@pytest.fixture
def fake(monkeypatch) -> Fake:
    service = Fake()
    monkeypatch.setattr(snapshot, "open_service", service.open)
    return service


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "fake.jsonl.gz"


@pytest.fixture
def whole(fake, tmp_path) -> bytes:
    """The result of an uninterrupted download."""
    path = tmp_path / "whole.jsonl.gz"
    content = fetch(SPEC, path, progress=False).read_bytes()
    path.unlink()
    origin_path(path).unlink()
    fake.served.clear()
    fake.opened = 0
    return content


def lines(path: Path) -> list[bytes]:
    return gzip.decompress(path.read_bytes()).splitlines()


def names(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in lines(path)]


def test_a_download_becomes_one_file_with_its_origin(fake, out, capsys):
    assert fetch(SPEC, out) == out
    assert "11/11" in capsys.readouterr().out
    assert [json.loads(line) for line in lines(out)] == ENTRIES
    assert out.read_bytes()[4:8] == bytes(4)  # contains no time
    assert sorted(p.name for p in out.parent.iterdir()) == [
        out.name,
        "fake.origin.json",
    ]
    said = json.loads(origin_path(out).read_text())
    assert said["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (said["spec"], said["count"], said["total"]) == (SPEC, 11, 11)
    known = read_origin(out)
    origin = known.origin
    assert (known.count, known.sha256) == (11, said["sha256"])
    assert origin.retrieved.count("-") == 2
    assert origin == Origin(
        ORIGIN.name, ORIGIN.url, ORIGIN.licence, "", origin.retrieved
    )


@pytest.mark.parametrize("page", [1, 2, 3])
@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt(), InputError("gone")])
def test_an_interrupted_download_goes_on_after_its_last_page(
    fake, out, whole, page, error
):
    fake.fails[page] = error
    with pytest.raises(type(error)):
        fetch(SPEC, out, progress=False)
    assert not out.exists()
    fetch(SPEC, out, progress=False)
    assert fake.served == [0, 1, 2, 3]  # requests no page twice
    assert out.read_bytes() == whole


def test_it_may_die_at_every_step_on_the_disk(fake, out, whole, monkeypatch):
    left = 0

    def dying(function):
        def step(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **kwargs)

        return step

    steps = ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"))
    for place, name in steps:
        monkeypatch.setattr(place, name, dying(getattr(place, name)))
    deaths = 0
    while True:
        left = deaths
        try:
            fetch(SPEC, out, progress=False)
            break
        except Killed:
            deaths += 1
        if out.exists():
            assert out.read_bytes() == whole
            assert read_origin(out).count == 11
        left = 1000
        fetch(SPEC, out, progress=False)
        assert out.read_bytes() == whole
        assert sorted(p.name for p in out.parent.iterdir()) == [
            out.name,
            origin_path(out).name,
        ]
        out.unlink()
    assert deaths > 15


def test_the_day_is_that_on_which_it_began(fake, out):
    fake.fails[2] = Killed()
    with pytest.raises(Killed):
        fetch(SPEC, out, progress=False)
    manifest = out.with_name(f"{out.name}.parts") / "fetch.json"
    begun = json.loads(manifest.read_text())
    begun["origin"]["retrieved"] = "2001-01-01"
    manifest.write_text(json.dumps(begun))
    fetch(SPEC, out, progress=False)
    assert read_origin(out).origin.retrieved == "2001-01-01"


def test_a_limit_stops_and_may_change_between_runs(fake, out):
    fetch(SPEC, out, limit=4, progress=False)
    assert names(out) == [f"x-{n}" for n in range(4)]
    assert fake.served == [0, 1]
    assert read_origin(out).count == 4
    fake.fails[1] = Killed()
    with pytest.raises(Killed):
        fetch(SPEC, out, limit=4, overwrite=True, progress=False)
    fetch(SPEC, out, limit=8, overwrite=True, progress=False)
    assert names(out) == [f"x-{n}" for n in range(8)]


def test_pages_that_are_all_there_need_no_network(fake, out, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            snapshot, "_assemble", lambda *args: (_ for _ in ()).throw(Killed)
        )
        with pytest.raises(Killed):
            fetch(SPEC, out, progress=False)
    assert fake.opened == 1
    fetch(SPEC, out, progress=False)
    assert fake.opened == 1
    assert out.read_bytes() == whole


def test_what_is_kept_is_said(fake, out):
    fake.fails[2] = InputError("fake: no answer")
    parts = out.with_name(f"{out.name}.parts")
    with pytest.raises(InputError) as caught:
        fetch(SPEC, out, progress=False)
    assert str(caught.value) == (
        f"fake: no answer; 6 entries are kept in {parts}, the same command goes on "
        "from there"
    )
    fake.fails[2] = InputError("fake: no answer")
    with pytest.raises(
        InputError, match=r"interrupted download of fake:all; delete it"
    ):
        fetch("fake:other", out, progress=False)


def test_a_download_that_never_began_leaves_nothing(fake, out):
    fake.fails[0] = InputError("fake: no answer")
    with pytest.raises(InputError, match=r"^fake: no answer$"):
        fetch(SPEC, out, progress=False)
    assert not list(out.parent.iterdir())
    fetch("fake:other", out, progress=False)


def test_what_is_left_of_a_finished_download(fake, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fetch(SPEC, out, progress=False)
    with pytest.raises(InputError, match=r"parts remains from .*; delete it$"):
        fetch(SPEC, out, limit=4, progress=False)
    content = out.read_bytes()
    out.unlink()
    with pytest.raises(
        InputError, match=r"or to a file that no longer exists; delete it$"
    ):
        fetch(SPEC, out, progress=False)
    out.write_bytes(content)
    fetch(SPEC, out, progress=False)
    assert not out.with_name(f"{out.name}.parts").exists()
    assert fake.served == [0, 1, 2, 3]


def test_an_existing_file_is_kept(fake, out, whole):
    out.write_bytes(b"mine")
    with pytest.raises(
        InputError, match=r"gz exists; give another name or `--overwrite`"
    ):
        fetch(SPEC, out, progress=False)
    assert out.read_bytes() == b"mine"
    assert fake.opened == 0
    fetch(SPEC, out, overwrite=True, progress=False)
    assert out.read_bytes() == whole


def test_two_downloads_into_one_file(fake, out):
    parts = out.with_name(f"{out.name}.parts")
    with (
        only_one(parts, "busy"),
        pytest.raises(InputError, match=r"gz is being fetched by another process"),
    ):
        fetch(SPEC, out, progress=False)
    assert fake.opened == 0


def test_a_lock_whose_folder_has_gone_is_none(tmp_path, monkeypatch):
    parts = tmp_path / "a.parts"
    lock = importlib.import_module("crysdistill.locks").fcntl

    def removed(*args):
        shutil.rmtree(parts)

    monkeypatch.setattr(lock, "flock", removed)
    with pytest.raises(InputError, match="busy"), only_one(parts, "busy"):
        pass


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("a.json", {}, r"a.json: must end in `.jsonl.gz`, such as `corpus.jsonl.gz`"),
        ("a.jsonl.gz", {"limit": 0}, r"`limit` is 0 but must be at least 1"),
        ("none/a.jsonl.gz", {}, r"none: no such folder; create it first"),
    ],
)
def test_what_cannot_be_written(fake, tmp_path, name, options, text):
    with pytest.raises(InputError, match=text):
        fetch(SPEC, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(fake, out, whole):
    fake.fails[2] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(
        InputError, match=r"left .*: pages that arrived are kept in fake"
    ):
        fetch(SPEC, out, progress=False)
    fetch(SPEC, out, progress=False)
    assert out.read_bytes() == whole


def test_a_damaged_page_is_told(fake, out):
    fake.fails[2] = Killed()
    with pytest.raises(Killed):
        fetch(SPEC, out, progress=False)
    parts = out.with_name(f"{out.name}.parts")
    (parts / "00000001.page").write_bytes(b"\0\0\0")
    with pytest.raises(InputError, match=r"00000001.page: damaged; delete .*parts to"):
        fetch(SPEC, out, progress=False)


# ------------------------------------------------------------------------------- specs


def test_every_known_scheme_names_its_module():
    assert set(SERVICES) == {"optimade", "mp", "jarvis", "matbench", "hf"}
    assert all(m.startswith("crysdistill.sources.") for m in SERVICES.values())


def test_an_unknown_scheme_is_told():
    with pytest.raises(
        InputError, match=r"^optimad:mp: no such database or file.*`optimade`"
    ):
        open_service("optimad:mp")
    with pytest.raises(InputError, match=r"databases begin with `optimade:`, `mp:`"):
        open_service("xyz:1")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(SERVICES, "hf", "a_package_that_nobody_has")
    with pytest.raises(
        InputError,
        match=r"^hf:x: needs the package `a_package_that_nobody_has`, which is not "
        r"installed: `pip install 'crysdistill\[hf\]'`$",
    ):
        open_service("hf:x")


def test_what_is_a_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_spec("optimade:http://127.0.0.1:5000?filter=nelements=2")
    assert is_spec("zzz:1")
    for name in ("cifs/", "a/b:c", "C:\\data", "corpus.h5", Path("optimade:mp")):
        assert not is_spec(name)
    Path("mp:1").write_text("")  # a file has that name
    assert not is_spec("mp:1")


def test_the_command_line_leaves_specs_as_they_are():
    parser = VERBS["build"].parser("build")
    spec = "optimade:http://127.0.0.1:5000"
    args: Namespace = parser.parse([spec, "cifs//a", "-o", "s.h5"])
    assert args.sources == [spec, Path("cifs/a")]


# ------------------------------------------------------------------------------ sources


def test_a_snapshot_is_a_source_with_an_origin(fake, out):
    bad = {"id": "bad", "problem": "site 0 is disordered (Cu 0.5 + Au 0.5)"}
    fake.entries = [*ENTRIES[:2], bad]
    source = open_source(fetch(SPEC, out, progress=False))
    assert source.count == 3
    assert [origin.name for origin in source.origins] == ["Fake"]
    good, refused = [], []
    for record in source.records():
        try:
            good.append(parse(record).material_id)
        except BadStructure as error:
            refused.append((record.material_id, str(error)))
    assert good == ["x-0", "x-1"]
    assert refused == [("bad", f"line 3: {bad['problem']}")]
    origin_path(out).unlink()
    assert open_source(out).origins == ()


def test_labels_come_along_even_where_the_first_entry_is_none(fake, out):
    fake.entries = [
        {"id": "bad", "structure": None, "problem": "no lattice"},
        {"id": "a", "structure": ENTRIES[0], "gap": 1.5},
        {"id": "b", "structure": ENTRIES[1], "gap": None},
    ]
    source = open_source(fetch(SPEC, out, progress=False))
    assert source.properties == ("gap",)
    records = list(source.records())
    assert records[0].problem == "line 1: no lattice"
    assert [dict(parse(r).properties) for r in records[1:]] == [{"gap": 1.5}, {}]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"origin": {"nam": "x"}}', "{"])
def test_an_origin_that_says_nothing(fake, out, text):
    fetch(SPEC, out, progress=False)
    origin_path(out).write_text(text)
    with pytest.raises(InputError, match=r"fake.origin.json: names no origin"):
        open_source(out)


def test_an_origin_of_another_file(fake, out):
    fetch(SPEC, out, progress=False)
    size = out.stat().st_size
    out.write_bytes(out.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"has {size - 10} bytes .* says {size};"):
        open_source(out)


def test_only_a_build_asks_a_database(fake):
    with pytest.raises(
        InputError, match=r"download it first: `crysdistill fetch 'fake:all' -o FILE"
    ):
        open_sources([SPEC])
    assert fake.opened == 0


def test_a_build_downloads_first_and_only_once(fake, tmp_path, monkeypatch):
    fake.entries = [*ENTRIES, {"id": "bad", "problem": "no lattice"}]
    store = tmp_path / "store.h5"
    options = {"symmetry": None, "workers": 1, "progress": False}
    fake.fails[2] = InputError("fake: no answer")
    with pytest.raises(InputError, match=r"6 entries are kept"):
        build([SPEC], store, **options)
    with monkeypatch.context() as patch:
        patch.setattr(
            building, "merge_shards", lambda *a: (_ for _ in ()).throw(Killed)
        )
        with pytest.raises(Killed):
            build([SPEC], store, **options)
    report = build([SPEC], store, **options)
    assert fake.served == [0, 1, 2, 3]
    assert (report.built, report.read) == (11, 12)
    assert Store.open(store).material_ids == [f"x-{n}" for n in range(11)]
    rows = list(csv.reader(report.quarantine.open()))
    assert rows[1:] == [[SPEC, "bad", "line 12: no lattice"]]
    assert not store.with_name("store.h5.parts").exists()


def test_the_command_says_what_it_got(fake, out, capsys):
    assert main(["fetch", SPEC, "-o", str(out), "--limit", "5", "--no-progress"]) == 0
    said = capsys.readouterr().out
    assert said == f"{out}: 5 entries of Fake (CC-BY-NC-4.0)\n"
    before = out.read_bytes()
    assert main(["fetch", SPEC, "-o", str(out), "--limit", "5"]) == 0
    again = f"{out}: nothing to do; fetched before by the same query\n{said}"
    assert capsys.readouterr().out == again
    assert (fake.opened, out.read_bytes()) == (1, before)
    for other in ([SPEC], [SPEC, "--limit", "6"], [f"{SPEC}2", "--limit", "5"]):
        assert main(["fetch", *other, "-o", str(out)]) == 2
        assert "exists; give another name or `--overw" in capsys.readouterr().err
    out.write_bytes(before[:-1])
    assert main(["fetch", SPEC, "-o", str(out), "--limit", "5"]) == 2
    assert "exists; give another name or `--overwrite`" in capsys.readouterr().err
