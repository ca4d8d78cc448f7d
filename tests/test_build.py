"""Building: nothing is lost or half done, and the bytes are always the same."""

from __future__ import annotations

import csv
import errno
import gzip
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crysdistill import files
from crysdistill.cli import main
from crysdistill.corpus import build as building
from crysdistill.corpus import merge, shards
from crysdistill.corpus.build import build
from crysdistill.corpus.filters import Filters
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.store.store import Store
from tests.conftest import random_crystal
from tests.forks import Command, run
from tests.processes import children, running, wait_until
from tests.toy_stores import labelled, simple_cif, write_lines

SMALL = GraphSettings(cutoff=5.0, max_neighbors=6)


def quarantine(store: Path) -> list[dict[str, str]]:
    path = store.with_name(store.name + ".quarantine.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def quick(source: Path, out: Path, **options):
    options = {"symmetry": None, "workers": 1, "graph": SMALL, **options}
    return build([source], out, progress=False, **options)


def leftovers(folder: Path) -> list[str]:
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.name.endswith((".parts", ".partial")) or p.name.startswith(".")
    )


# ------------------------------------------------------------------- every fault


def cif(name: str, **changes: str) -> str:
    """A CIF with some lines replaced."""
    text = simple_cif(name, random_crystal(5, atoms=3))
    for old, new in changes.items():
        lines = text.splitlines()
        found = [n for n, line in enumerate(lines) if line.startswith(old)]
        assert found, old
        lines[found[0]] = new
        text = "\n".join(lines) + "\n"
    return text


@pytest.fixture
def faulty(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with one entry for each fault, and the expected reasons."""
    folder = tmp_path / "cifs"
    folder.mkdir()
    good = simple_cif("good", random_crystal(5, atoms=3))
    last = good.splitlines()[-1]
    symbol = last.split()[1]
    lonely = (
        "data_x\n_cell_length_a 9\n_cell_length_b 9\n_cell_length_c 9\n"
        "_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma 90\n"
        "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n"
        "_atom_site_fract_y\n_atom_site_fract_z\nAr1 Ar 0 0 0\n"
    )
    files = {
        "good-1": good,
        "good-2": simple_cif("good", random_crystal(6, atoms=4)),
        "truncated": good[: good.index("_atom_site_fract_y") + 8],
        "empty": "",
        "partial": good.replace(last, last[:-1] + "0.5"),
        "dummy": good.replace(f"2 {symbol} ", "2 Xx ").replace(f"{symbol}2", "Xx2"),
        "nan": good.replace(last.split()[2], "nan"),
        "zerocell": cif("z", _cell_length_b="_cell_length_b 0.0"),
        "doubled": good + last.replace(f"{symbol}2", f"{symbol}3") + "\n",
        "lonely": lonely,
        "unlabelled": good,
        "words": good,
        "blank": good,
        "twice": good,
    }
    for name, text in files.items():
        (folder / f"{name}.cif").write_text(text)
    rows = [f"{name},1.5" for name in files if name not in ("unlabelled", "twice")]
    rows[rows.index("words,1.5")] = "words,three"
    rows[rows.index("blank,1.5")] = "blank,"
    rows += ["twice,1.0", "twice,2.0", "absent,1.0"]
    (folder / "id_prop.csv").write_text("\n".join(rows) + "\n")
    said = {
        "truncated": "cut short",
        "empty": "empty file",
        "partial": "occupancy 0.5",
        "dummy": "`Xx",
        "nan": "not a number",
        "zerocell": "impossible",
        "doubled": "two atoms on one point",
        "lonely": "no neighbour within 5.0 Å of atom 0; increase `cutoff`",
        "unlabelled": "no row in id_prop.csv",
        "words": "`target` is `three` in id_prop.csv",
        "blank": "no label in id_prop.csv",
        "twice": "a second row in id_prop.csv",
        "absent": "there is no such structure",
    }
    return folder, said


def test_every_fault_is_listed_with_its_own_reason(faulty, tmp_path):
    folder, said = faulty
    out = tmp_path / "store.h5"
    report = quick(folder, out)
    assert Store.open(out).material_ids == ["good-1", "good-2", "twice"]
    assert report.built == 3
    listed = quarantine(out)
    assert report.read == report.built + len(listed) == 16
    assert [row["source"] for row in listed] == [str(folder)] * len(listed)
    reasons = {row["material_id"]: row["reason"] for row in listed}
    assert set(reasons) == set(said)
    for name, text in said.items():
        assert text in reasons[name], name
        assert "\n" not in reasons[name]
    assert len(set(reasons.values())) == len(reasons)
    assert [(r.material_id, r.reason) for r in report.rejections] == [
        (row["material_id"], row["reason"]) for row in listed
    ]


def test_the_command_exits_with_zero_and_counts(faulty, tmp_path, capsys):
    folder, said = faulty
    out = tmp_path / "store.h5"
    line = f"build {folder} -o {out} --cutoff 5 --no-symmetry --workers 1 --no-progress"
    assert main(line.split()) == 0
    shown = capsys.readouterr().out
    assert "3 of 16 crystals" in shown
    assert f"{out}.quarantine.csv: {len(said)} refused" in shown


def test_duplicate_ids_across_sources(tmp_path):
    first = write_lines(tmp_path / "a" / "s.jsonl", labelled(3))
    second = write_lines(tmp_path / "b" / "s.jsonl", labelled(4, first=1))
    out = tmp_path / "store.h5"
    report = build(
        [first, second], out, symmetry=None, workers=1, graph=SMALL, progress=False
    )
    assert Store.open(out).material_ids == [f"random-{n}" for n in range(5)]
    assert (report.read, report.built) == (7, 5)
    assert [row["material_id"] for row in quarantine(out)] == ["random-1", "random-2"]
    assert {row["source"] for row in quarantine(out)} == {str(second)}
    assert all("duplicate id" in row["reason"] for row in quarantine(out))


def test_a_duplicate_id_is_counted_though_the_first_was_refused(tmp_path):
    """A refused structure does not use up its name."""
    big = random_crystal(1, atoms=6)
    small = random_crystal(1, atoms=2)
    source = write_lines(tmp_path / "s.jsonl", [big, small])
    out = tmp_path / "store.h5"
    report = quick(source, out, filters=Filters(max_atoms=4))
    assert (report.read, report.built) == (2, 1)
    assert len(Store.open(out).crystal(0).atomic_numbers) == 2
    assert "filtered: 6 atoms, more than `max_atoms` 4" in quarantine(out)[0]["reason"]


def test_a_name_that_is_no_text_stops_nothing_else(tmp_path):
    folder = tmp_path / "cifs"
    folder.mkdir()
    (folder / "good.cif").write_text(cif("good"))
    try:
        (folder / os.fsdecode(b"bad\xff.cif")).write_text(cif("bad"))
    except OSError:
        pytest.skip("this file system takes no such name")
    out = tmp_path / "store.h5"
    report = quick(folder, out)
    assert (report.read, report.built) == (2, 1)
    assert "not valid UTF-8" in quarantine(out)[0]["reason"]


def test_nothing_but_faults_leaves_no_store(tmp_path):
    folder = tmp_path / "cifs"
    folder.mkdir()
    (folder / "empty.cif").write_text("")
    out = tmp_path / "store.h5"
    report = quick(folder, out)
    assert (report.read, report.built, out.exists()) == (1, 0, False)
    assert leftovers(tmp_path) == []
    (folder / "empty.cif").write_text(cif("empty"))  # repaired; run the same command
    assert quick(folder, out).built == 1


def test_keep_unlabelled(faulty, tmp_path):
    folder, _ = faulty
    out = tmp_path / "store.h5"
    quick(folder, out, keep_unlabelled=True)
    store = Store.open(out)
    known = dict(zip(store.material_ids, store.property("target"), strict=True))
    assert known["good-1"] == 1.5
    assert known["twice"] == 1.0
    assert np.isnan(known["unlabelled"])
    assert np.isnan(known["blank"])
    assert "words" not in known  # an invalid label is not a missing one


# --------------------------------------------------------------------- same bytes


@pytest.mark.slow
def test_one_worker_and_two_give_the_same_bytes(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "s.jsonl", labelled(30))
    monkeypatch.setattr(building, "SHARD_SIZE", 7)
    for workers in (1, 2):
        quick(source, tmp_path / f"{workers}.h5", workers=workers, symmetry="fast")
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()
    assert leftovers(tmp_path) == []


def test_the_size_of_shards_leaves_no_trace(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "s.jsonl", labelled(20))
    for size in (3, 256):
        monkeypatch.setattr(building, "SHARD_SIZE", size)
        quick(source, tmp_path / f"{size}.h5")
    assert (tmp_path / "3.h5").read_bytes() == (tmp_path / "256.h5").read_bytes()


class PowerCutError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("when", ["shard", "merge", "replace", "quarantine", "clear"])
def test_stopped_and_run_again(tmp_path, monkeypatch, when):
    """A build may stop at any step; the same command goes on."""
    source = write_lines(tmp_path / "in" / "s.jsonl", [*labelled(20), *labelled(1)])
    monkeypatch.setattr(building, "SHARD_SIZE", 4)
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    quick(source, tmp_path / "once" / "s.h5")
    out = tmp_path / "twice" / "s.h5"
    calls = 0

    def stop(real: Callable, at: int, after: bool = False) -> Callable:
        def stopping(*args, **options):
            nonlocal calls
            calls += 1
            if calls == at and not after:
                raise PowerCutError
            result = real(*args, **options)
            if calls == at:
                raise PowerCutError
            return result

        return stopping

    with monkeypatch.context() as patch:
        if when == "shard":
            patch.setattr(building, "make_shard", stop(shards.make_shard, 3))
        elif when == "merge":
            patch.setattr(merge, "_kept", stop(merge._kept, 2))
        elif when == "replace":
            patch.setattr(merge, "_hashes", stop(merge._hashes, 1))
        elif when == "quarantine":
            patch.setattr(
                building, "merge_shards", stop(merge.merge_shards, 1, after=True)
            )
        else:
            patch.setattr(building.shutil, "rmtree", stop(lambda path: None, 1))
        with pytest.raises(PowerCutError):
            quick(source, out)
    assert calls
    assert (tmp_path / "twice" / "s.h5.parts").is_dir()
    report = quick(source, out)
    assert (report.read, report.built) == (22, 20)
    for name in ("s.h5", "s.h5.quarantine.csv"):
        once, twice = tmp_path / "once" / name, tmp_path / "twice" / name
        assert once.read_bytes() == twice.read_bytes()
    assert leftovers(tmp_path / "twice") == []


def test_finished_shards_are_not_made_again(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "s.jsonl", labelled(20))
    monkeypatch.setattr(building, "SHARD_SIZE", 4)
    out = tmp_path / "out.h5"
    made = []

    def count(path, *rest):
        if len(made) == 3:
            raise PowerCutError
        made.append(path.name)
        return shards.make_shard(path, *rest)

    monkeypatch.setattr(building, "make_shard", count)
    with pytest.raises(PowerCutError):
        quick(source, out)
    made.clear()
    quick(source, out)
    assert made == ["000003.npz", "000004.npz"]


OPTIONS = ["--no-symmetry", "--no-progress", "--max-neighbors", "6", "--workers"]


def go_on(source: Path, out: Path) -> None:
    """Do the same as the command, in this process."""
    assert main(["build", str(source), "-o", str(out), *OPTIONS, "1"]) == 0


def some_structures(folder: Path) -> Path:
    """Write 240 real crystals, or generated ones if the data is absent."""
    data = os.environ.get("CRYSDISTILL_DATA", Path(__file__).parents[2] / "shared/data")
    real = Path(data) / "mp_corpus" / "structures.jsonl.gz"
    if not real.exists():
        return write_lines(folder / "s.jsonl", labelled(240))
    folder.mkdir()
    with gzip.open(real) as lines, (folder / "s.jsonl").open("wb") as file:
        file.writelines(islice(lines, 240))
    return folder / "s.jsonl"


def small_shards() -> None:
    """Give a build of few crystals as many shards as a large build."""
    building.SHARD_SIZE = 12


def kill(process: Command) -> bool:
    """Kill a build, check that its workers end, and return if it was running."""
    below = children(process.pid) if process.poll() is None else []
    done = process.kill()
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    # On a busy machine they may still be importing.
    wait_until(lambda: not any(map(running, below)), 60)
    left = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below if running(pid)]
    assert not left, "workers outlive the build"
    return done.returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_killed_at_20_random_moments_and_run_again(tmp_path):
    """The same command always ends with the bytes of an undisturbed run.

    The first five builds have workers, which take a while to start. The others have
    none: they write the same files, and spend more of their time on work.
    """
    source = some_structures(tmp_path / "in")
    options = ["--no-progress", "--max-neighbors", "6", "--workers"]
    once, out = tmp_path / "once" / "s.h5", tmp_path / "killed" / "s.h5"
    once.parent.mkdir()

    def start(store: Path, workers: int) -> Command:
        words = ["build", source, "-o", store, *options, workers]
        return Command(*words, prepare=small_shards)

    assert run("--version").returncode == 0  # starts the server of the forks
    long = {}
    for workers in (2, 1):
        once.unlink(missing_ok=True)
        begun = time.monotonic()
        assert start(once, workers).wait().returncode == 0
        long[workers] = time.monotonic() - begun
    rng = random.Random(0)
    kills = finished = begun_shards = 0
    while kills < 20 or not finished:
        out.parent.mkdir(exist_ok=True)
        workers = 2 if kills < 5 else 1
        process = start(out, workers)
        if kills < 20:
            limit = time.monotonic() + rng.uniform(0, long[workers])
            while process.poll() is None and time.monotonic() < limit:
                time.sleep(0.005)
        else:
            process.wait()
        killed = kill(process)
        kills += killed
        begun_shards += any(out.parent.glob("*.parts/*.npz"))
        # The kill may come after all work is done.
        if killed and not (out.exists() and leftovers(out.parent) == []):
            continue
        for name in ("s.h5", "s.h5.quarantine.csv"):
            assert (out.parent / name).read_bytes() == (once.parent / name).read_bytes()
        assert leftovers(out.parent) == []
        shutil.rmtree(out.parent)
        finished += 1
    assert begun_shards > 5  # not all died before their first shard


# --------------------------------------------------------------------- refusals


def interrupted(source: Path, out: Path, monkeypatch) -> None:
    """Leave the files of a build that stopped before its last step."""

    def stop(*args):
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(building, "merge_shards", stop)
        with pytest.raises(PowerCutError):
            quick(source, out)


def test_other_settings_do_not_go_on(tmp_path, monkeypatch):
    """The message names what differs."""
    source = write_lines(tmp_path / "s.jsonl", labelled(5))
    out = tmp_path / "out.h5"
    interrupted(source, out, monkeypatch)
    start = "out.h5.parts holds an interrupted build of something else: "
    end = "; give the same again, or delete it to start anew"

    def refused(said: str, **options: Any) -> None:
        with pytest.raises(InputError, match=re.escape(start + said + end)):
            quick(source, out, **options)

    refused("`cutoff` was 5.0 and is 6.0", graph=GraphSettings(6.0, 6))
    refused("`max_atoms` was not given and is 3", filters=Filters(max_atoms=3))
    refused("`labels` was true and is false", labels=False)
    refused("`licence` was not given and is MIT", licence="MIT")
    write_lines(source, labelled(6))
    refused("s.jsonl has changed")


def test_the_same_content_goes_on_wherever_it_lies(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in" / "s.jsonl", labelled(5))
    out = tmp_path / "out.h5"
    interrupted(source, out, monkeypatch)
    moved = source.parent.rename(tmp_path / "moved") / "s.jsonl"
    os.utime(moved, (1, 1))
    assert quick(moved, out).built == 5
    assert quick(moved, out).done_before


def test_a_second_build_into_the_same_file(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", labelled(5))
    out = tmp_path / "out.h5"
    parts = tmp_path / "out.h5.parts"
    with (
        building.only_one(parts, "busy"),
        pytest.raises(InputError, match=r"out\.h5 is being built by another process"),
    ):
        quick(source, out)
    assert quick(source, out).built == 5


def test_an_existing_store(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", labelled(5))
    out = tmp_path / "out.h5"
    quick(source, out)
    before = out.read_bytes()
    with pytest.raises(
        InputError,
        match=r"out\.h5 exists and is built from something else: `max_atoms` was not "
        r"given and is 2; give another name or `--overwrite`",
    ):
        quick(source, out, filters=Filters(max_atoms=2))
    again = quick(source, out)
    assert (again.done_before, again.read, again.built) == (True, 5, 5)
    assert out.read_bytes() == before
    assert leftovers(tmp_path) == []
    assert quick(source, out, filters=Filters(max_atoms=2), overwrite=True).built < 5
    assert len(Store.open(out)) < 5


def test_bad_arguments(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", labelled(2))
    with pytest.raises(InputError, match="nowhere: no such folder; create it first"):
        quick(source, tmp_path / "nowhere" / "out.h5")
    with pytest.raises(InputError, match="`workers` is 0 but must be at least 1"):
        quick(source, tmp_path / "out.h5", workers=0)
    with pytest.raises(InputError, match="no source"):
        build([], tmp_path / "out.h5")
    with pytest.raises(
        InputError, match=r"t\.jsonl: no such file.*did you mean `s\.js"
    ):
        quick(tmp_path / "t.jsonl", tmp_path / "out.h5")
    assert leftovers(tmp_path) == []


# --------------------------------------------------------------------- disk full


def test_a_full_disk_keeps_finished_shards(tmp_path, monkeypatch, capsys):
    source = write_lines(tmp_path / "s.jsonl", labelled(20))
    monkeypatch.setattr(building, "SHARD_SIZE", 4)
    out = tmp_path / "out.h5"
    parts = tmp_path / "out.h5.parts"

    def full(descriptor):
        if len(list(parts.glob("*.npz"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = f"build {source} -o {out} --cutoff 5 --no-symmetry --workers 1 --no-progress"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert main(line.split()) == 2
    assert capsys.readouterr().err == (
        f"error: No space left on device in {tmp_path}: finished shards are kept in "
        "out.h5.parts; make room and run the same command again\n"
    )
    assert not out.exists()
    assert sorted(p.name for p in parts.glob("*.npz")) == ["000000.npz", "000001.npz"]
    for path in parts.glob("*.npz"):
        assert len(shards.read_shard(path)["atoms"]) == 4
    assert main(line.split()) == 0
    assert len(Store.open(out)) == 20
    assert leftovers(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 600 kB, and how to enlarge it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> bool:
        line = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
        return subprocess.run(line, capture_output=True, check=False).returncode == 0

    if not mount("size=600k"):
        pytest.skip("mounting a small disk needs root")
    yield disk, lambda: mount("remount", "size=64m")
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_disk_that_is_really_full(tmp_path, small_disk, capsys, monkeypatch):
    monkeypatch.setattr(building, "SHARD_SIZE", 64)
    source = write_lines(tmp_path / "in" / "s.jsonl", labelled(1500))
    disk, enlarge = small_disk
    out = disk / "s.h5"
    line = f"build {source} -o {out} --cutoff 5 --no-symmetry --workers 1 --no-progress"
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: No space left on device in {disk}: finished")
    kept = sorted((disk / "s.h5.parts").glob("*.npz"))
    assert len(kept) > 3
    for path in kept:
        shard = shards.read_shard(path)
        assert len(shard["atoms"]) + len(shards.read_list(shard["rejections"])) == 64
    assert enlarge()
    assert main(line.split()) == 0
    elsewhere = tmp_path / "s.h5"
    assert main(line.replace(str(out), str(elsewhere)).split()) == 0
    assert out.read_bytes() == elsewhere.read_bytes()
    assert leftovers(disk) == []


def small_files(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 300_000])
def test_a_real_limit_of_file_sizes(tmp_path, limit):
    """The small limit stops a shard, the larger one the store."""
    source = write_lines(tmp_path / "s.jsonl", labelled(900))
    out = tmp_path / "out.h5"
    done = run(
        *("build", source, "-o", out, *OPTIONS, "1"),
        prepare=partial(small_files, limit),
    )
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert done.returncode == 2
    assert not out.exists()
    assert len([*(tmp_path / "out.h5.parts").glob("*.npz")]) == (limit > 2_000) * 4
    go_on(source, out)
    Store.open(out).verify()
    assert len(Store.open(out)) == 900
    assert leftovers(tmp_path) == []
