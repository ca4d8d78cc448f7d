"""Engines: one process or many give the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from crysdistill.cli import main
from crysdistill.corpus import build as building
from crysdistill.corpus import shards
from crysdistill.corpus.build import build
from crysdistill.errors import InputError
from crysdistill.overlap import CrystalList, find_overlap
from crysdistill.workers import engine
from crysdistill.workers.workers import THREADS
from tests import engine_jobs as jobs
from tests.engine_jobs import WITH_DASK
from tests.processes import children, needs_proc, running, wait_until
from tests.test_build import leftovers
from tests.toy_stores import labelled, write_lines


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_results_come_in_order(workers, chunk):
    with engine(workers) as pool:
        found = list(pool.map(jobs.square, iter(range(20)), chunk))
        assert found == [n * n for n in range(20)]
        assert list(pool.map(jobs.square, [], chunk)) == []


def test_a_stream_is_not_read_far_ahead():
    """Memory stays flat, since the engine reads only a little ahead."""
    read = 0

    def stream() -> Iterator[int]:
        nonlocal read
        for number in range(200):
            read += 1
            yield number

    with engine(2) as pool:
        for done, _ in enumerate(pool.map(jobs.square, stream(), 2), start=1):
            assert read - done <= 2 * 4 * 2


def test_processes_compute_with_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with engine(2) as pool:
        assert list(pool.map(jobs.threads, [0])) == [["1"] * len(THREADS)]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_a_process_that_died(tmp_path, monkeypatch, capsys):
    message = "a worker process died .out of memory.*all is kept, run the same command"
    with pytest.raises(InputError, match=message), engine(2, kept="all is kept, ") as p:
        list(p.map(jobs.die, [0]))
    source = write_lines(tmp_path / "s.jsonl", labelled(40))
    monkeypatch.setattr(building, "SHARD_SIZE", 4)
    monkeypatch.setattr(building, "make_shard", jobs.make_or_die_late)
    out = tmp_path / "out.h5"
    line = f"build {source} -o {out} --max-neighbors 6 --no-symmetry --no-progress"
    assert main([*line.split(), "--workers", "2"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "finished shards are kept" in said
    names = {path.name for path in (tmp_path / "out.h5.parts").glob("*.npz")}
    assert {f"00000{n}.npz" for n in range(4)} <= names
    monkeypatch.setattr(building, "make_shard", shards.make_shard)
    assert main([*line.split(), "--workers", "1"]) == 0
    assert leftovers(tmp_path) == []


def test_an_error_of_the_function_comes_as_it_is():
    with pytest.raises(InputError, match=r"^3 is bad; give another$"), engine(2) as p:
        list(p.map(jobs.refuse, [3]))


SLEEPERS = """
import sys, time
from crysdistill.workers import engine
if __name__ == "__main__":
    with engine({arguments}) as pool:
        for _ in pool.map(time.sleep, [0.01] * 4 + [60] * 4):
            print("on", flush=True)
"""


@needs_proc
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    "arguments",
    ["2", pytest.param("cluster='local:2'", marks=pytest.mark.slow)],
)
def test_workers_end_with_their_parent(tmp_path, arguments, ending):
    """The parent is killed, or a terminal interrupts all processes."""
    if "cluster" in arguments:
        pytest.importorskip("distributed", reason=WITH_DASK)
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS.format(arguments=arguments))
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, script],
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
        )
    assert process.stdout
    process.stdout.readline()
    below = children(process.pid)
    assert len(below) >= 2
    if ending == signal.SIGINT:
        os.killpg(process.pid, ending)
    else:
        process.kill()
    process.wait(30)
    process.stdout.close()
    assert wait_until(lambda: not any(map(running, below))), "workers outlive it"
    assert errors.read_text().count("Traceback") == (ending == signal.SIGINT)


def test_a_script_that_its_workers_would_run_again(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", labelled(600))
    script = tmp_path / "script.py"
    script.write_text(
        "from crysdistill.corpus.build import build\n"
        f"build([{str(source)!r}], {str(tmp_path / 's.h5')!r}, workers=2)\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=100
    )
    first, *_, last = filter(None, done.stderr.splitlines())
    assert first.startswith('put what this script does under `if __name__ == "__main__')
    assert "a worker process died" in last
    assert done.stderr.count("Traceback") == 1


SLOW_TO_START = """
import os, time
from crysdistill.workers import engine
if __name__ == "__main__":
    with engine(2) as pool:
        list(pool.map(time.sleep, [60] * 8))
else:
    os.write(1, b"starting\\n")  # whole, unlike a print beside that of another
    time.sleep(60)
"""


@needs_proc
def test_workers_that_still_start_leave_an_interrupt_to_their_parent(tmp_path):
    script = tmp_path / "slow_to_start.py"
    script.write_text(SLOW_TO_START)
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["starting\n"] * 2
    below = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert wait_until(lambda: not any(map(running, below))), "workers outlive it"
    assert errors.count("Traceback") == 1


def test_bad_numbers_of_workers(tmp_path):
    crystals = CrystalList(labelled(2))
    for workers, cluster, message in (
        (0, None, "`workers` is 0 but must be at least 1"),
        (2, "local:2", "give `workers` or `cluster`, not both"),
    ):
        with pytest.raises(InputError, match=message):
            build(["x"], tmp_path / "s.h5", workers=workers, cluster=cluster)
        with pytest.raises(InputError, match=message):
            find_overlap(crystals, crystals, workers=workers, cluster=cluster)
