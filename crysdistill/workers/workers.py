"""Workers apply a function to a stream of items: one process, many, or a cluster.

The build and the overlap search only call `Workers.map`, so that the result cannot
depend on where the work is done.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from crysdistill.errors import InputError
from crysdistill.processes import interrupts_held
from crysdistill.workers.cluster import check_cluster, connect

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that numerical libraries read once, when they are loaded."""

_AHEAD = 4  # jobs per worker that are handed out at a time, to keep memory flat

_T = TypeVar("_T")
_R = TypeVar("_R")


class Workers(Protocol):
    """Applies a function to many items."""

    def map(
        self, function: Callable[[_T], _R], items: Iterable[_T], chunk: int = 1
    ) -> Iterator[_R]:
        """Yield the results in the order of `items`.

        Args:
            function: a function that can be pickled.
            items: may be a stream; only a small part of it is in memory at a time.
            chunk: the number of items in one job; a job should take 0.1 s or more.
        """


@contextmanager
def engine(
    workers: int | None = None,
    cluster: str | None = None,
    *,
    folder: Path | None = None,
    opened: Sequence[Path] = (),
    kept: str = "",
    devices: Sequence[str] = (),
) -> Iterator[Workers]:
    """Start workers, and end them afterwards.

    Args:
        workers: processes on this machine; all cores if None. With 1, this process does
            the work.
        cluster: `local:N` (Dask with N workers on this machine), the address of a
            running scheduler such as `tcp://host:8786`, its scheduler file
            (`scheduler.json`), or `slurm:FILE.yaml` (see `slurm.read_jobs`).
        folder: the folder that the function writes to; cluster workers must see it.
        opened: files and folders that the function reads; they must see these, too.
        kept: the part of the work that is kept, for the message about dead workers.
        devices: CUDA devices as `CUDA_VISIBLE_DEVICES` names them. Each process on this
            machine sees one of them, in turn; without any, all see what this one does.

    Raises:
        InputError: the cluster cannot be reached, lacks a package or does not see the
            same files, or workers died.
    """
    check_engine(workers, cluster)
    if cluster is not None:
        with connect(cluster, folder, opened, kept) as backend:
            yield _Queue(backend)
    elif (count := workers or os.cpu_count() or 1) == 1:
        yield _Here()
    else:
        with _processes(count, kept, devices) as backend:
            yield _Queue(backend)


def check_engine(workers: int | None, cluster: str | None) -> None:
    """Refuse, before any work, arguments with which `engine` could not start.

    Raises:
        InputError: the number is below 1, both arguments are given, there is no such
            cluster, or a package is missing.
        SystemExit: this is a worker process that runs the script which started it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(
            'put what this script does under `if __name__ == "__main__":`, since each '
            "worker process reads the script anew"
        )
    if workers is not None and workers < 1:
        raise InputError(f"`workers` is {workers} but must be at least 1")
    if cluster is not None:
        if workers is not None:
            raise InputError(
                "give `workers` or `cluster`, not both: a cluster has its own number"
            )
        check_cluster(cluster)


def spread(function: Callable[..., _R], arguments: Sequence[Any]) -> _R:
    """Call a function with the arguments in one item of a stream."""
    return function(*arguments)


class _Here:
    """This process, one item after the other."""

    def map(
        self, function: Callable[[_T], _R], items: Iterable[_T], chunk: int = 1
    ) -> Iterator[_R]:
        return map(function, items)


class _Backend(Protocol):
    """Does single jobs."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Hand out a job."""

    def result(self, job: Any) -> Any:
        """Wait for its result."""

    def width(self) -> int:
        """The number of jobs that run at once now; a cluster grows and shrinks."""


class _Queue:
    """Jobs in order; only a bounded number is handed out at a time."""

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend

    def map(
        self, function: Callable[[_T], _R], items: Iterable[_T], chunk: int = 1
    ) -> Iterator[_R]:
        items = iter(items)
        running: deque[Any] = deque()
        while part := list(islice(items, chunk)):
            running.append(self._backend.submit(_each, function, part))
            while len(running) >= _AHEAD * max(self._backend.width(), 1):
                yield from self._backend.result(running.popleft())
        while running:
            yield from self._backend.result(running.popleft())


def _each(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    return [function(item) for item in items]


class _Pool:
    """Processes on this machine."""

    def __init__(self, executor: ProcessPoolExecutor, count: int) -> None:
        self._executor = executor
        self._count = count

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with interrupts_held():  # this starts processes, while there are too few
            return self._executor.submit(function, *arguments)

    def result(self, job: Any) -> Any:
        return job.result()

    def width(self) -> int:
        return self._count


@contextmanager
def _processes(
    count: int, kept: str, devices: Sequence[str] = ()
) -> Iterator[_Backend]:
    """Start fresh processes; forks would share locks and threads of libraries."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    turn = context.Value("i", 0)
    with (
        _one_thread(),
        ProcessPoolExecutor(
            count, context, initializer=_start_worker, initargs=(tuple(devices), turn)
        ) as executor,
    ):
        try:
            yield _Pool(executor, count)
        except BrokenProcessPool:
            raise InputError(
                f"a worker process died (out of memory?); {kept}run the same command "
                "again, with fewer `--workers` if it repeats"
            ) from None
        except BaseException:
            # A user who interrupts does not want to wait for jobs to end.
            executor.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that start now compute with one thread each.

    They inherit the setting, because it would be late to set it in the process: the
    user's script may have loaded the numerical libraries before our first line.
    """
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start_worker(devices: Sequence[str], turn: Any) -> None:
    """Leave Ctrl-C to the parent, and end with it; take the next device in turn."""
    if devices:
        with turn.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[turn.value % len(devices)]
            turn.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End this process after its parent was killed, which no queue reports."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
