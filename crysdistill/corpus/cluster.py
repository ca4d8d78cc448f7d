"""Workers on other machines: Dask, as a local cluster, a scheduler or SLURM jobs.

Dask is imported where it is used: it is an extra, `crysdistill[cluster]`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import yaml

from crysdistill import __version__
from crysdistill.errors import InputError, did_you_mean

ANSWER_WITHIN = 10.0
"""Seconds that a scheduler has to answer."""

DEATHS = 3
"""Workers that a job may end, in a cluster started here, before it is given up; a
running scheduler has its own number (`distributed.scheduler.allowed-failures`)."""

FORMS = "`local:N`, `tcp://HOST:PORT`, a scheduler file (`scheduler.json`), `slurm:FILE"
"""What `cluster` may be."""

_SAME = ("numpy", "spglib", "moyopy", "gemmi", "pymatgen-core")
"""Packages whose release decides about results."""

_PATIENCE = 30.0  # seconds without a worker before it is said
_LOOK = 2.0  # seconds between looks at the number of workers
_APPEARS_WITHIN = 5.0  # seconds in which a shared disk shows a new file
_SETTLES_WITHIN = 90.0  # seconds after which it has forgotten that there was none


@dataclass(frozen=True)
class _Ground:
    """What a worker must have in common with this machine.

    Args:
        token: a file to be found, or None where no files are used.
        text: what it holds.
        opened: other paths that must be there.
        versions: releases by package.
    """

    token: str | None
    text: str
    opened: tuple[str, ...]
    versions: Mapping[str, str]


def check_cluster(cluster: str) -> None:
    """Refuse a cluster that does not exist, as far as this machine can tell.

    Raises:
        InputError: of no known form, a file is missing or unusable, or a package is.
    """
    kind, _, rest = cluster.partition(":")
    if kind == "local":
        if not rest.isdecimal() or int(rest) < 1:
            raise InputError(
                f"`cluster` is `{cluster}` but must say how many workers: `local:2`"
            )
    elif kind == "slurm":
        read_jobs(Path(rest))
        _load("dask_jobqueue", "dask-jobqueue")
        if shutil.which("sbatch") is None:
            raise InputError(
                "`sbatch` is not here; run this where SLURM takes jobs, or start "
                "`dask scheduler` there and give its address"
            )
    elif cluster.endswith(".json"):
        _read_address(Path(cluster))
    elif not re.match(r"[a-z]+://[^/\s]+:\d+/?$", cluster):
        raise InputError(f"`cluster` is `{cluster}` but must be {FORMS}.yaml`")
    _load("distributed", "dask")


@contextmanager
def connect(
    cluster: str, folder: Path | None, opened: Sequence[Path], kept: str
) -> Iterator[Backend]:
    """Start or find a cluster, and let go of it; see `engine` for the arguments."""
    check_cluster(cluster)
    distributed = _load("distributed", "dask")
    settings = {
        "distributed.comm.timeouts.connect": ANSWER_WITHIN,
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        "distributed.admin.large-graph-warning-threshold": "1GB",
    }
    with ExitStack() as stack:
        stack.enter_context(_load("dask", "dask").config.set(settings))
        stack.enter_context(_quiet())
        started = _start(cluster, distributed, stack)
        where = started or cluster
        if cluster.endswith(".json"):
            where = _read_address(Path(cluster))
        client = _client(cluster, where, distributed, stack)
        ground = stack.enter_context(_common_ground(folder, opened))
        yield Backend(cluster, client, ground, kept)


class Backend:
    """Does single jobs on a cluster."""

    def __init__(self, cluster: str, client: Any, ground: _Ground, kept: str) -> None:
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
        with self._explained():
            return self._client.submit(work, job, self._ground, pure=False)

    def result(self, job: Any) -> Any:
        """Wait for the result of a job, however long the cluster is without workers."""
        with self._explained():
            while True:
                try:
                    return job.result(timeout=_PATIENCE)
                except TimeoutError:
                    if job.done():
                        raise
                    self._say_idle()

    def width(self) -> int:
        """Return how many jobs run at once, now."""
        if time.monotonic() - self._looked > _LOOK:
            with self._explained():
                self._width = sum(self._client.nthreads().values())
            self._looked = time.monotonic()
        return self._width

    def _say_idle(self) -> None:
        """Say once what is missing where nobody works."""
        if not self._said and not self._client.nthreads():
            self._said = True
            print(f"{self._cluster} has no workers (yet); waiting", file=sys.stderr)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what goes wrong between machines into one line."""
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


def work(job: bytes, ground: _Ground) -> Any:
    """Do a job; this runs on a worker.

    Raises:
        InputError: this machine does not see the same files, or has other releases.
    """
    if ground not in _trusted:
        _check(ground)
        _trusted.append(ground)
        del _trusted[:-10]
    function, arguments = pickle.loads(job)
    return function(*arguments)


_trusted: list[_Ground] = []  # on a worker: what has been checked


def await_files(paths: Sequence[Path]) -> None:
    """Wait until this machine sees the files that others have written.

    Raises:
        InputError: it does not within a minute and a half.
    """
    end = time.monotonic() + _SETTLES_WITHIN
    for path in paths:
        while not path.exists():
            if time.monotonic() > end:
                raise InputError(
                    f"{path} was written by a worker but is not seen here: are both "
                    "machines looking at the same disk?"
                )
            list(path.parent.iterdir())  # makes a network file system look again
            time.sleep(0.2)


def read_jobs(path: Path) -> dict[str, Any]:
    """Read how SLURM jobs are to be started.

    Args:
        path: YAML: `jobs`, how many; `cores` and `memory` of each; any other argument
            of `dask_jobqueue.SLURMCluster`, such as `queue`, `account`, `walltime`,
            `interface`, `job_script_prologue`.

    Raises:
        InputError: it cannot be read, or a key is unknown or missing.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path}: not valid YAML ({text})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: must hold `jobs`, `cores` and `memory`")
    for key in ("jobs", "cores", "memory"):
        if key not in found:
            raise InputError(f"{path}: `{key}` is missing")
    for key in ("jobs", "cores"):
        if type(found[key]) is not int or found[key] < 1:
            raise InputError(f"{path}: `{key}` is {found[key]!r} but must be 1 or more")
    known = _job_keys()
    for key in found:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise InputError(f"{path}: unknown key `{key}`{hint}")
    # One process for each core: Python computes with one thread at a time.
    return {"processes": found["cores"], **found}


def slurm_cluster(path: Path) -> Any:
    """Return the `SLURMCluster` of a settings file, without jobs yet."""
    given = read_jobs(path)
    given.pop("jobs")
    # A port for all to see is opened on request only.
    options = {"dashboard": False, **given.pop("scheduler_options", {})}
    given["scheduler_options"] = options
    return _load("dask_jobqueue", "dask-jobqueue").SLURMCluster(**given)


def _job_keys() -> set[str]:
    core = _load("dask_jobqueue.core", "dask-jobqueue")
    slurm = _load("dask_jobqueue.slurm", "dask-jobqueue")
    kinds = (core.JobQueueCluster, core.Job, slurm.SLURMJob)
    found = {name for kind in kinds for name in signature(kind).parameters}
    return (found | {"jobs"}) - {"job_cls", "job_kwargs", "base_class_kwargs"}


def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(
            f"`{package}` is not installed; `pip install crysdistill[cluster]`"
        ) from None


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
    """Start a cluster where one is to be started."""
    kind, _, rest = cluster.partition(":")
    if kind == "local":
        with _interrupts_held():
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
        _try_job(found.job_script(), rest)
        found.scale(jobs=read_jobs(Path(rest))["jobs"])
        return found
    return None


def _try_job(script: str, settings: str) -> None:
    """Ask SLURM whether it takes such a job; Dask would try in silence, for ever."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        command = ["sbatch", "--test-only", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise InputError(f"{settings}: SLURM takes no such job ({said})")


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let threads that start now, and all processes that they start, ignore Ctrl-C.

    It reaches every process of a terminal; only this one has something to say to it.
    """
    resource_tracker.ensure_running()  # would lift the block in the thread it starts in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


@contextmanager
def _common_ground(folder: Path | None, opened: Sequence[Path]) -> Iterator[_Ground]:
    """Write the file by which workers recognise the folder."""
    text = uuid.uuid4().hex
    token = None if folder is None else folder.absolute() / f"cluster-{text}"
    versions = _versions()
    paths = tuple(str(path.absolute()) for path in opened)
    try:
        if token is not None:
            token.write_text(text)
        yield _Ground(str(token) if token else None, text, paths, versions)
    finally:
        if token is not None:
            token.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"crysdistill": __version__}
    for name in _SAME:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _check(ground: _Ground) -> None:
    """See whether a worker, this process, sees what the machine of the user sees."""
    here = socket.gethostname()
    for name, version in _versions().items():
        if ground.versions.get(name) != version:
            raise InputError(
                f"the worker on {here} has {name} {version}, not "
                f"{ground.versions.get(name)}: install the same on all machines"
            )
    if ground.token is None:
        return
    token = Path(ground.token)
    if not _appears(token, ground.text):
        raise _unseen(here, str(token.parent))
    for path in ground.opened:
        if not Path(path).exists():
            raise _unseen(here, path)


def _appears(path: Path, text: str) -> bool:
    """Wait for a file: what one machine has written, another sees a moment later."""
    end = time.monotonic() + _APPEARS_WITHIN
    while True:
        with suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _unseen(host: str, path: str) -> InputError:
    return InputError(
        f"the worker on {host} does not see {path}: put it on a disk that all machines "
        "share, under the same name"
    )


def _foreign(error: Exception) -> bool:
    """Tell whether the other side could not load what was sent."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] == "crysdistill"
    return "deserialization of the task graph" in str(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask from telling in many lines what is said in one."""
    loggers = [logging.getLogger(n) for n in ("distributed", "dask_jobqueue")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
