"""Jobs for the workers in tests of engines; they load this file, so it loads little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from crysdistill.errors import InputError
from crysdistill.workers.workers import THREADS

WITH_DASK = "the extra `cluster` is not installed"


def square(number: int) -> int:
    return number * number


def threads(_: int) -> list[str | None]:
    return [os.environ.get(name) for name in THREADS]


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number: int) -> None:
    raise InputError(f"{number} is bad; give another")


# These replace `make_shard`:


def make(path: Path, *rest) -> tuple[int, int]:
    from crysdistill.corpus.shards import make_shard

    return make_shard(path, *rest)


def make_or_die_late(path: Path, *rest) -> tuple[int, int]:
    """End the worker at one shard, once the shards before it are done."""
    if path.stem == "000005":
        before = [path.with_stem(f"{number:06d}") for number in range(5)]
        while not all(other.exists() for other in before):
            time.sleep(0.01)
        die(0)
    return make(path, *rest)


def make_or_die_once(path: Path, *rest) -> tuple[int, int]:
    """End two workers in the middle of their work."""
    once = path.parent.parent / f"died-{path.stem}"
    if path.stem in ("000003", "000004") and not once.exists():
        once.touch()
        die(0)
    return make(path, *rest)


def make_or_die(path: Path, *rest) -> tuple[int, int]:
    """End every worker that tries one shard."""
    if path.stem == "000003":
        die(0)
    return make(path, *rest)


def make_or_end(path: Path, *rest, scheduler: int) -> tuple[int, int]:
    """End the scheduler at one shard."""
    if path.stem == "000002":
        os.kill(scheduler, signal.SIGKILL)
        time.sleep(1)
    return make(path, *rest)
