"""Workers on other machines: Dask, as a local cluster, a scheduler or SLURM jobs.

Dask is imported only when it is used, since it is an extra, `crysdistill[cluster]`.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from crysdistill.errors import InputError
from crysdistill.processes import interrupts_held
from crysdistill.workers.ground import Ground, common_ground, work
from crysdistill.workers.slurm import (
    load_extra,
    read_jobs,
    slurm_cluster,
    try_job,
)

ANSWER_WITHIN = 10.0
"""Seconds to wait for the answer of a scheduler."""

DEATHS = 3
"""The number of workers that a job may end before it is given up, in a cluster started
here. A running scheduler has its own (`distributed.scheduler.allowed-failures`)."""

FORMS = "`local:N`, `tcp://HOST:PORT`, a scheduler file (`scheduler.json`), `slurm:FILE"
"""The forms of `cluster`."""

_PATIENCE = 30.0  # seconds without a worker before the user is told
_LOOK = 2.0  # seconds between looks at the number of workers


def check_cluster(cluster: str) -> None:
    """Refuse a cluster that does not exist, as far as this machine can tell.

    Raises:
        InputError: its form is unknown, a file is missing or unusable, or a package is
            missing.
    """
    kind, _, rest = cluster.partition(":")
    if kind == "local":
        if not rest.isdecimal() or int(rest) < 1:
            raise InputError(
                f"`cluster` is `{cluster}` but must say how many workers: `local:2`"
            )
    elif kind == "slurm":
        read_jobs(Path(rest))
        load_extra("dask_jobqueue", "dask-jobqueue")
        if shutil.which("sbatch") is None:
            raise InputError(
                "`sbatch` is not here; run this where SLURM takes jobs, or start "
                "`dask scheduler` there and give its address"
            )
    elif cluster.endswith(".json"):
        _read_address(Path(cluster))
    elif not re.match(r"[a-z]+://[^/\s]+:\d+/?$", cluster):
        raise InputError(f"`cluster` is `{cluster}` but must be {FORMS}.yaml`")
    load_extra("distributed", "dask")


@contextmanager
def connect(
    cluster: str, folder: Path | None, opened: Sequence[Path], kept: str
) -> Iterator[Backend]:
    """Start or find a cluster, and release it; see `engine` for the arguments."""
    check_cluster(cluster)
    distributed = load_extra("distributed", "dask")
    settings = {
        "distributed.comm.timeouts.connect": ANSWER_WITHIN,
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        "distributed.admin.large-graph-warning-threshold": "1GB",
    }
    with ExitStack() as stack:
        stack.enter_context(load_extra("dask", "dask").config.set(settings))
        stack.enter_context(_quiet())
        started = _start(cluster, distributed, stack)
        where = started or cluster
        if cluster.endswith(".json"):
            where = _read_address(Path(cluster))
        client = _client(cluster, where, distributed, stack)
        ground = stack.enter_context(common_ground(folder, opened))
        yield Backend(cluster, client, ground, kept)


class Backend:
    """Does single jobs on a cluster.

    Args:
        cluster: the cluster as the user named it.
        client: the client of its scheduler.
        ground: the files and versions that its workers must share with this machine.
        kept: the part of the work that is kept if it stops, for messages.
    """

    def __init__(self, cluster: str, client: Any, ground: Ground, kept: str) -> None:
        self._cluster = cluster
        self._client = client
        self._ground = ground
        self._kept = kept
        self._width = 0
        self._looked = -_LOOK
        self._said = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Hand out a job."""
        # As bytes: the scheduler then neither unpacks them nor searches them for keys.
        job = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        whole = pickle.dumps((work, job, self._ground), pickle.HIGHEST_PROTOCOL)
        with self._explained():
            return self._client.submit(_unpacker(), whole, pure=False)

    def result(self, job: Any) -> Any:
        """Wait for the result of a job, even if the cluster has no workers for long."""
        with self._explained():
            while True:
                try:
                    return job.result(timeout=_PATIENCE)
                except TimeoutError:
                    if job.done():
                        raise
                    self._say_idle()

    def width(self) -> int:
        """Return the number of jobs that run at once now."""
        if time.monotonic() - self._looked > _LOOK:
            with self._explained():
                self._width = sum(self._client.nthreads().values())
            self._looked = time.monotonic()
        return self._width

    def _say_idle(self) -> None:
        """Tell the user once if the cluster has no workers."""
        if not self._said and not self._client.nthreads():
            self._said = True
            print(f"{self._cluster} has no workers (yet); waiting", file=sys.stderr)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors between machines into one line."""
        from concurrent.futures import CancelledError

        from distributed import KilledWorker
        from distributed.comm import CommClosedError

        try:
            yield
        except KilledWorker as error:
            raise InputError(
                f"one job ended {error.allowed_failures + 1} workers of "
                f"{self._cluster}, one after the other (out of memory?); {self._kept}"
                "give workers more memory and run the same command again"
            ) from None
        except (CancelledError, CommClosedError):
            raise InputError(
                f"the scheduler {self._cluster} is gone; {self._kept}start it and run "
                "the same command again"
            ) from None
        except (ModuleNotFoundError, RuntimeError) as error:
            if not _foreign(error):
                raise
            raise InputError(
                f"{self._cluster} cannot load crysdistill; start its scheduler and "
                "workers in an environment like this one"
            ) from None


def _unpacker() -> Callable[[bytes], Any]:
    """Return a function that a worker can load without this package.

    A local function is sent as code. If a worker could not import a function, there
    would be no error: Dask would wait for ever.
    """

    def unpack(whole: bytes) -> Any:
        import pickle

        function, *arguments = pickle.loads(whole)
        return function(*arguments)

    return unpack


def _read_address(path: Path) -> str:
    """Return the address in a scheduler file."""
    start = f"start `dask scheduler --scheduler-file {path}`"
    try:
        return str(json.loads(path.read_text("utf-8"))["address"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {start}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no scheduler file; {start}") from None


def _start(cluster: str, distributed: Any, stack: ExitStack) -> Any:
    """Start a cluster, if `cluster` asks for a new one."""
    kind, _, rest = cluster.partition(":")
    if kind == "local":
        with interrupts_held():
            found = distributed.LocalCluster(
                n_workers=int(rest),
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
            )
        return stack.enter_context(found)
    if kind == "slurm":
        found = stack.enter_context(slurm_cluster(Path(rest)))
        try_job(found.job_script(), rest)
        found.scale(jobs=read_jobs(Path(rest))["jobs"])
        return found
    return None


def _client(cluster: str, where: Any, distributed: Any, stack: ExitStack) -> Any:
    """Connect to a scheduler."""
    try:
        client = distributed.Client(where, timeout=ANSWER_WITHIN, set_as_default=False)
    except (OSError, ValueError, TimeoutError):
        raise InputError(
            f"{cluster}: no Dask scheduler answers within {ANSWER_WITHIN:.0f} s; is "
            "`dask scheduler` running there?"
        ) from None
    return stack.enter_context(client)


def _foreign(error: Exception) -> bool:
    """Return whether the other side could not load a job."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] == "crysdistill"
    return "deserialization of the task graph" in str(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask from logging many lines about errors that we report in one."""
    loggers = [logging.getLogger(n) for n in ("distributed", "dask_jobqueue")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
