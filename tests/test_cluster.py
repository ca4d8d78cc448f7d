"""Engines on clusters: Dask and SLURM give the result of one process."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from crysdistill.cli import main
from crysdistill.corpus import build as building
from crysdistill.corpus import shards
from crysdistill.corpus.build import build
from crysdistill.errors import InputError
from crysdistill.overlap import CrystalList, find_overlap
from crysdistill.workers import await_files, engine
from crysdistill.workers import cluster as clusters
from crysdistill.workers import ground as grounds
from crysdistill.workers.slurm import slurm_cluster
from tests import engine_jobs as jobs
from tests.engine_jobs import WITH_DASK
from tests.processes import running, wait_until
from tests.test_build import leftovers, quick
from tests.toy_stores import labelled, simple_cif, write_lines

# --------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("local:0", "`cluster` is `local:0` but must say how many workers: `local:2`"),
        ("local:", "must say how many workers"),
        ("dask", "`cluster` is `dask` but must be `local:N`, `tcp://HOST:PORT`, a sch"),
        ("tcp://host", "must be `local:N`, `tcp://HOST:PORT`"),
        ("no.json", "no.json: No such file or directory; start `dask scheduler --sch"),
        ("bad.json", "bad.json: no scheduler file; start `dask scheduler"),
        ("slurm:no.yaml", "no.yaml: No such file or directory"),
        ("slurm:bad.json", "bad.json: must hold `jobs`, `cores` and `memory`"),
    ],
)
def test_clusters_that_do_not_exist(tmp_path, monkeypatch, cluster, message):
    pytest.importorskip("dask_jobqueue", reason=WITH_DASK)
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("[]")
    source = write_lines(tmp_path / "in" / "s.jsonl", labelled(2))
    with pytest.raises(InputError) as error:
        build([source], "s.h5", cluster=cluster)
    assert message in str(error.value)
    assert leftovers(tmp_path) == []  # reported before any work starts


def test_without_dask(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    source = write_lines(tmp_path / "s.jsonl", labelled(2))
    for verb in (
        ["build", str(source), "-o", str(tmp_path / "s.h5")],
        ["overlap", str(source), str(source), "-o", str(tmp_path / "pairs.csv")],
    ):
        if verb[0] == "overlap":
            store = quick(source, tmp_path / "t.h5").store
            verb[1:3] = [str(store), str(store)]
        assert main([*verb, "--cluster", "local:2"]) == 2
        assert capsys.readouterr().err == (
            "error: `dask` is not installed; `pip install crysdistill[cluster]`\n"
        )
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    settings = tmp_path / "jobs.yaml"
    settings.write_text("jobs: 2\ncores: 2\nmemory: 2GB\n")
    with pytest.raises(InputError, match="`dask-jobqueue` is not installed"):
        clusters.check_cluster(f"slurm:{settings}")


def test_a_scheduler_that_does_not_answer(monkeypatch):
    pytest.importorskip("distributed", reason=WITH_DASK)
    monkeypatch.setattr(clusters, "ANSWER_WITHIN", 1.0)
    start = time.monotonic()
    message = "tcp://127.0.0.1:9: no Dask scheduler answers within 1 s; is `dask sched"
    with (
        pytest.raises(InputError, match=message),
        engine(cluster="tcp://127.0.0.1:9") as pool,
    ):
        list(pool.map(jobs.square, [1]))
    assert time.monotonic() - start < 8


def ground(folder: Path, **changes):
    token = folder / "token"
    token.write_text("text")
    known = {
        "token": str(token),
        "text": "text",
        "opened": (str(folder),),
        "versions": grounds._versions(),
    }
    return grounds.Ground(**{**known, **changes})


def test_a_worker_that_sees_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(grounds, "_APPEARS_WITHIN", 0.1)
    grounds._check(ground(tmp_path))
    grounds._check(ground(tmp_path, token=None))
    for changes, place in (
        ({"token": str(tmp_path / "other" / "token")}, tmp_path / "other"),
        ({"text": "a folder of the same name"}, tmp_path),
        ({"opened": (str(tmp_path / "cifs"),)}, tmp_path / "cifs"),
    ):
        with pytest.raises(InputError) as error:
            grounds._check(ground(tmp_path, **changes))
        assert f"does not see {place}: put it on a disk that all" in str(error.value)


def test_a_worker_with_another_release(tmp_path):
    versions = {**grounds._versions(), "spglib": "1.0"}
    message = r"has spglib [\d.]+, not 1\.0: install the same on all machines"
    with pytest.raises(InputError, match=message):
        grounds._check(ground(tmp_path, versions=versions))


def test_files_that_come_late(tmp_path, monkeypatch):
    """A network disk may show a new file only after a while."""
    path = tmp_path / "000000.npz"
    looks = []

    class Late(type(path)):
        def exists(self, **_) -> bool:
            looks.append(1)
            return len(looks) > 2

    await_files([Late(path)])
    monkeypatch.setattr(grounds, "_SETTLES_WITHIN", 0.1)
    with pytest.raises(InputError, match="was written by a worker but is not seen"):
        await_files([path])


# ------------------------------------------------------------------------------ Dask


@pytest.mark.slow
def test_dask_gives_the_same_bytes_also_when_workers_are_killed(tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason=WITH_DASK)
    source = write_lines(tmp_path / "s.jsonl", [*labelled(30), *labelled(1)])
    monkeypatch.setattr(building, "SHARD_SIZE", 4)
    expected = quick(source, tmp_path / "one.h5", symmetry="spglib")
    for name, make in (("dask", shards.make_shard), ("killed", jobs.make_or_die_once)):
        monkeypatch.setattr(building, "make_shard", make)
        report = quick(
            source,
            tmp_path / f"{name}.h5",
            symmetry="spglib",
            workers=None,
            cluster="local:2",
        )
        assert (report.read, report.built) == (expected.read, expected.built)
        for suffix in ("", ".quarantine.csv"):
            one, other = (tmp_path / f"{n}.h5{suffix}" for n in ("one", name))
            assert one.read_bytes() == other.read_bytes()
    assert len([*tmp_path.glob("died-*")]) == 2
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_job_that_kills_every_worker(tmp_path, monkeypatch, capfd):
    pytest.importorskip("distributed", reason=WITH_DASK)
    source = write_lines(tmp_path / "s.jsonl", labelled(30))
    monkeypatch.setattr(building, "SHARD_SIZE", 4)
    monkeypatch.setattr(building, "make_shard", jobs.make_or_die)
    out = tmp_path / "out.h5"
    line = f"build {source} -o {out} --max-neighbors 6 --no-symmetry --no-progress"
    assert main([*line.split(), "--cluster", "local:2"]) == 2
    assert capfd.readouterr().err == (
        "error: one job ended 3 workers of local:2, one after the other (out of "
        "memory?); finished shards are kept, give workers more memory and run the same "
        "command again\n"
    )
    names = {path.name for path in (tmp_path / "out.h5.parts").glob("*.npz")}
    assert {"000000.npz", "000001.npz", "000002.npz"} <= names
    assert "000003.npz" not in names
    monkeypatch.setattr(building, "make_shard", shards.make_shard)
    assert main([*line.split(), "--cluster", "local:1"]) == 0
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_worker_of_a_cluster_that_does_not_see_the_files(tmp_path):
    pytest.importorskip("distributed", reason=WITH_DASK)
    absent = tmp_path / "cifs"
    with (
        pytest.raises(InputError, match=r"does not see .*cifs: put it on a disk"),
        engine(cluster="local:1", folder=tmp_path, opened=[absent]) as pool,
    ):
        list(pool.map(jobs.square, [1]))
    assert leftovers(tmp_path) == []
    assert not [*tmp_path.glob("cluster-*")]


@pytest.mark.slow
def test_a_worker_without_crysdistill():
    pytest.importorskip("distributed", reason=WITH_DASK)

    def forget() -> None:  # a local function is pickled as code
        import sys

        sys.modules["crysdistill"] = None

    def square_there() -> None:
        with engine(cluster="local:1") as pool:
            pool._backend._client.run(forget)
            list(pool.map(jobs.square, [1]))

    with pytest.raises(InputError, match="local:1 cannot load crysdistill; start its"):
        square_there()


@pytest.mark.slow
def test_the_overlap_is_the_same(tmp_path):
    pytest.importorskip("distributed", reason=WITH_DASK)
    corpus, dataset = CrystalList(labelled(40)), CrystalList(labelled(20, first=30))
    here = find_overlap(corpus, dataset, workers=1)
    there = find_overlap(corpus, dataset, cluster="local:2")
    assert here.counts["id"]["pairs"] == 10
    pd.testing.assert_frame_equal(here.pairs, there.pairs)
    assert here.hash == there.hash


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start Dask programs, and end them after the test."""
    processes = []

    def start(*words: str, cwd: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", "dask", *words]
        with (cwd / "log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=log, stderr=log
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(20)


@pytest.mark.slow
def test_a_running_scheduler_on_a_shared_disk(tmp_path, monkeypatch, started, capfd):
    """Relative paths work for workers that run in another folder."""
    pytest.importorskip("distributed", reason=WITH_DASK)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    file = Path("scheduler.json")
    local = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    scheduler = started(
        "scheduler", *local, "--scheduler-file", str(file.absolute()), cwd=elsewhere
    )
    assert wait_until(file.exists)
    started(
        "worker", "--scheduler-file", str(file.absolute()), "--nworkers", "2",
        "--nthreads", "1", "--no-dashboard", cwd=elsewhere,
    )  # fmt: skip
    Path("cifs").mkdir()
    for number, crystal in enumerate(labelled(12)):
        text = simple_cif("c", crystal) if number else "data_cut short"
        (Path("cifs") / f"{number:02d}.cif").write_text(text)
    monkeypatch.setattr(building, "SHARD_SIZE", 3)
    address = json.loads(file.read_text())["address"]
    line = "build cifs --max-neighbors 6 --no-symmetry --no-progress -o"
    for name, more in (
        ("here", ("--workers", "1")),
        ("file", ("--cluster", str(file))),
        ("address", ("--cluster", address)),
    ):
        assert main([*line.split(), f"{name}.h5", *more]) == 0
        for suffix in (".h5", ".h5.quarantine.csv"):
            one, other = Path(f"here{suffix}"), Path(f"{name}{suffix}")
            assert one.read_bytes() == other.read_bytes()
    assert "00" in Path("here.h5.quarantine.csv").read_text()
    capfd.readouterr()
    make = partial(jobs.make_or_end, scheduler=scheduler.pid)
    monkeypatch.setattr(building, "make_shard", make)
    assert main([*line.split(), "gone.h5", "--cluster", address]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: the scheduler {address} is gone; finished shards")
    assert said.count("\n") == 1


# ----------------------------------------------------------------------------- SLURM

JOBS = """
jobs: 2
cores: 2
memory: 2GB
queue: short
walltime: "00:10:00"
job_script_prologue: ["module load python"]
"""


def test_what_slurm_is_asked_for(tmp_path):
    pytest.importorskip("dask_jobqueue", reason=WITH_DASK)
    settings = tmp_path / "jobs.yaml"
    settings.write_text(JOBS)
    with slurm_cluster(settings) as cluster:
        script = cluster.job_script()
    for line in (
        "#SBATCH -p short",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH -t 00:10:00",
    ):
        assert line in script.splitlines()
    assert "module load python" in script
    assert "--nthreads 1 " in script
    assert "--nworkers 2 " in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: 2\ncores: 2\n", "`memory` is missing"),
        ("jobs: 0\ncores: 2\nmemory: 2GB\n", "`jobs` is 0 but must be 1 or more"),
        ("jobs: 1\ncores: two\nmemory: 2GB\n", "`cores` is 'two' but must be 1 or"),
        (JOBS + "wall_time: 1\n", "unknown key `wall_time`; did you mean `walltime`?"),
        ("jobs: [", "not valid YAML"),
    ],
)
def test_bad_settings_of_jobs(tmp_path, text, message):
    pytest.importorskip("dask_jobqueue", reason=WITH_DASK)
    settings = tmp_path / "jobs.yaml"
    settings.write_text(text)
    with pytest.raises(InputError) as error:
        clusters.check_cluster(f"slurm:{settings}")
    assert str(error.value).startswith(f"{settings}: ")
    assert message in str(error.value)


SBATCH = """#!/bin/bash
if [ "$1" = --test-only ]; then
    ! grep 'error: invalid partition' < "$2" >&2
    exit
fi
cp "$1" {folder}/job.$$.sh
setsid bash {folder}/job.$$.sh > {folder}/job.$$.log 2>&1 < /dev/null &
echo $! > {folder}/job.$$.pid
echo "Submitted batch job $$"
"""
SCANCEL = """#!/bin/bash
kill -- -$(cat {folder}/job.$1.pid)
"""


@pytest.mark.slow
def test_jobs_of_a_stand_in_for_slurm(tmp_path, monkeypatch):
    """`sbatch` is a script that runs its job; all else is as on a cluster."""
    pytest.importorskip("dask_jobqueue", reason=WITH_DASK)
    source = write_lines(tmp_path / "s.jsonl", labelled(20))
    settings = tmp_path / "jobs.yaml"
    settings.write_text("jobs: 2\ncores: 1\nmemory: 1GB\ninterface: lo\n")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="`sbatch` is not here; run this where SLURM"):
        quick(source, tmp_path / "s.h5", workers=None, cluster=f"slurm:{settings}")
    monkeypatch.undo()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        script = tmp_path / name
        script.write_text(text.format(folder=tmp_path))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    refused = tmp_path / "refused.yaml"
    bad = 'job_script_prologue: ["error: invalid partition"]\n'
    refused.write_text(settings.read_text() + bad)
    with pytest.raises(InputError) as error:
        quick(source, tmp_path / "r.h5", workers=None, cluster=f"slurm:{refused}")
    said = f"{refused}: SLURM refuses this job (error: invalid partition)"
    assert str(error.value) == said
    assert not [*tmp_path.glob("job.*")]
    monkeypatch.setattr(building, "SHARD_SIZE", 4)
    quick(source, tmp_path / "one.h5")
    quick(source, tmp_path / "s.h5", workers=None, cluster=f"slurm:{settings}")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "s.h5").read_bytes()
    pids = [int(path.read_text()) for path in tmp_path.glob("job.*.pid")]
    assert len(pids) == 2
    assert wait_until(lambda: not any(map(running, pids))), "jobs outlive the build"
