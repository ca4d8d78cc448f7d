"""Runs on a disk that is really full: a small disk, and a limit of file sizes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from crysdistill.cli import main
from crysdistill.training.train import train
from tests.forks import run
from tests.toy_runs import SHORT, command, results, same, training_config
from tests.toy_stores import labelled, write_store

ROOM = "make room, and the same command with `resume=true` goes on there"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    return write_store(path, labelled(40))


def small_disk() -> bool:
    """Whether users of this system can mount a small private disk."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode == 0  # fmt: skip


def left_alike(run: Path, whole: Path) -> None:
    assert same(run / "weights.safetensors", whole / "weights.safetensors")
    for name in ("metrics.csv", "predictions.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert results(run) == results(whole)


def mount(disk: Path, *options: str) -> None:
    words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(disk)]
    subprocess.run(words, check=True)


def on_a_small_disk(disk: Path, result: Path, filler: int, words: list[str]) -> None:
    """Mount a disk that only this process sees, and run a command on it twice.

    It prints both exit codes and the newest checkpoint, and copies the second run.
    """
    user, group = os.getuid(), os.getgid()
    new_mounts, new_users = 0x20000, 0x10000000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts | new_users):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount(disk, "size=1500k")
    (disk / "neighbour").write_bytes(bytes(filler))
    told = []
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        told.append(f"code {main(words)}")
        told += map(str, disk.rglob("*.partial"))
        told.append(max(p.name for p in (disk / "run" / "checkpoints").iterdir()))
        mount(disk, "remount", "size=100m")
        told.append(f"code {main([*words, 'resume=true'])}")
    print(*told, sep="\n", flush=True)
    shutil.copytree(disk / "run", result)
    raise SystemExit(0)


@pytest.mark.slow
@pytest.mark.skipif(not small_disk(), reason="needs user namespaces")
@pytest.mark.parametrize("filled_by", ["checkpoints", "a neighbour"])
def test_a_disk_that_fills_up(dataset, tmp_path, filled_by):
    """With more space, the run ends with the same bits as an undisturbed run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    config = training_config(dataset, disk / "run")
    config.trainer = replace(SHORT, checkpoint_every=1)
    filler = 1_150_000  # leaves space for two checkpoints
    if filled_by == "checkpoints":
        config.trainer.keep_checkpoints, filler = 1000, 300_000
    twice = partial(on_a_small_disk, disk, tmp_path / "result", filler, command(config))
    done = run(prepare=twice)
    assert done.returncode == 0, done.stderr
    first, newest, second = done.stdout.split("\n")[:3]
    assert first == "code 2", done.stderr
    step = int(re.fullmatch(r"step-(\d+)\.ckpt", newest)[1])
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    where, what = said.split(": No space left on device; ")
    assert what == f"the checkpoint of step {step} is kept; {ROOM}"
    folder = f"error: {disk}/run/checkpoints"
    # After an epoch, the run writes the checkpoint of its last step again.
    assert where in [f"{folder}/step-{step + n:08d}.ckpt" for n in (0, 1)]
    assert second == "code 0", done.stderr
    whole = replace(config, out=tmp_path / "whole")
    train(whole)
    left_alike(tmp_path / "result", whole.out)


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (51_200, 51_200))


@pytest.mark.slow
def test_a_limit_to_the_size_of_files(dataset, tmp_path):
    config = training_config(dataset, tmp_path / "run")
    done = run(*command(config), prepare=small_files)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {config.out}/checkpoints/step-00000003.ckpt: File too large; no "
        f"checkpoint is kept yet; {ROOM}"
    )
    assert not list((config.out / "checkpoints").iterdir())
    whole = replace(config, out=tmp_path / "whole")
    train(whole)
    train(replace(config, resume=True))
    left_alike(config.out, whole.out)
