"""Runs on a disk without room, for real: a small one, and a limit to a file's size."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crysdistill.training.train import train
from tests.toy_runs import SHORT, command, results, same, training_config
from tests.toy_stores import labelled, write_store

ROOM = "make room, and the same command with `resume=true` goes on there"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    return write_store(path, labelled(40))


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=240
    )


def small_disk() -> bool:
    """Whether this system lets anyone mount a small disk that only they see."""
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


ON_A_SMALL_DISK = r"""
disk=$1 result=$2 filler=$3; shift 3
mount -t tmpfs -o size=1500k none "$disk"
head -c "$filler" /dev/zero > "$disk/neighbour"
"$@" > /dev/null
echo "code $?"
find "$disk" -name \*.partial
ls "$disk/run/checkpoints" | tail -n 1
mount -o remount,size=100m "$disk"
"$@" resume=true > /dev/null
echo "code $?"
cp -r "$disk/run" "$result"
"""


@pytest.mark.slow
@pytest.mark.skipif(not small_disk(), reason="needs user namespaces")
@pytest.mark.parametrize("filled_by", ["checkpoints", "a neighbour"])
def test_a_disk_that_fills_up(dataset, tmp_path, filled_by):
    """With more room, the run goes on to the bits of one that had it from the start."""
    disk = tmp_path / "disk"
    disk.mkdir()
    config = training_config(dataset, disk / "run")
    config.trainer = replace(SHORT, checkpoint_every=1)
    filler = 1_150_000  # two checkpoints fit in beside it
    if filled_by == "checkpoints":
        config.trainer.keep_checkpoints, filler = 1000, 300_000
    done = run("unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh",
               disk, tmp_path / "result", filler, *command(config))  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, newest, second = done.stdout.split("\n")[:3]
    assert first == "code 2", done.stderr
    step = int(re.fullmatch(r"step-(\d+)\.ckpt", newest)[1])
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    where, what = said.split(": No space left on device; ")
    assert what == f"the checkpoint of step {step} is kept; {ROOM}"
    folder = f"error: {disk}/run/checkpoints"
    # After an epoch the checkpoint of its last step is written once more.
    assert where in [f"{folder}/step-{step + n:08d}.ckpt" for n in (0, 1)]
    assert second == "code 0", done.stderr
    whole = replace(config, out=tmp_path / "whole")
    train(whole)
    left_alike(tmp_path / "result", whole.out)


@pytest.mark.slow
def test_a_limit_to_the_size_of_files(dataset, tmp_path):
    config = training_config(dataset, tmp_path / "run")
    done = run("sh", "-c", 'ulimit -f 100; exec "$@"', "sh", *command(config))
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
