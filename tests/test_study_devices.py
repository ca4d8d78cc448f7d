"""Cells of a study on several GPUs: each process sees one of them."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crysdistill.studies import study as module
from crysdistill.studies.study import StudyConfig, study
from crysdistill.workers import engine
from tests.toy_stores import labelled, write_store
from tests.toy_studies import BASE


def meet(place: tuple[Path, int]) -> str | None:
    """Wait until all processes run, and return the device that this one sees."""
    folder, count = place
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 100
    while len(list(folder.iterdir())) < count and time.monotonic() < until:
        time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_processes_take_devices_in_turn(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with engine(3, devices=["4", "GPU-5"]) as work:
        found = list(work.map(meet, [(tmp_path, 3)] * 3))
    assert sorted(found) == ["4", "4", "GPU-5"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """The arguments that start a study's workers; this process does the work."""
    found: list[dict] = []

    @contextmanager
    def here(workers, cluster, **more):
        found.append({"workers": workers, "devices": more["devices"]})
        with engine(1) as work:
            yield work

    monkeypatch.setattr(module, "engine", here)
    return found


@pytest.fixture
def config(tmp_path) -> StudyConfig:
    return StudyConfig(
        base={"dataset": write_store(tmp_path / "d.h5", labelled(40)), **BASE},
        out=tmp_path / "study",
        axes={"arm": ["mean", "median"], "labels": [10], "seed": [0]},
        controls=False,
    )


def gpus(monkeypatch, count: int, seen: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)


@pytest.mark.parametrize(
    ("count", "seen", "workers", "right"),
    [
        (3, None, None, (3, ["0", "1", "2"])),
        (3, None, 5, (5, ["0", "1", "2"])),
        (2, "6, 7", None, (2, ["6", "7"])),
        (1, "6,-1,7", None, (1, ["6"])),
        (1, None, None, (1, ["0"])),
        (0, None, None, (None, [])),
        (0, None, 2, (2, [])),
    ],
)
def test_a_worker_for_each_device(
    config, started, monkeypatch, count, seen, workers, right
):
    gpus(monkeypatch, count, seen)
    study(replace(config, workers=workers), progress=False)
    assert started == [{"workers": right[0], "devices": right[1]}]
