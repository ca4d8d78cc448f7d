"""SLURM jobs as workers, by way of dask-jobqueue."""

from __future__ import annotations

import importlib
import subprocess
import tempfile
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from crysdistill.errors import InputError, did_you_mean, not_installed


def read_jobs(path: Path) -> dict[str, Any]:
    """Read the settings of SLURM jobs.

    Args:
        path: a YAML file: the number of `jobs`; `cores` and `memory` of each; any other
            argument of `dask_jobqueue.SLURMCluster`, such as `queue`, `account`,
            `walltime`, `interface`, `job_script_prologue`.

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
    # Open a public port only on request.
    options = {"dashboard": False, **given.pop("scheduler_options", {})}
    given["scheduler_options"] = options
    return load_extra("dask_jobqueue", "dask-jobqueue").SLURMCluster(**given)


def _job_keys() -> set[str]:
    core = load_extra("dask_jobqueue.core", "dask-jobqueue")
    slurm = load_extra("dask_jobqueue.slurm", "dask-jobqueue")
    kinds = (core.JobQueueCluster, core.Job, slurm.SLURMJob)
    found = {name for kind in kinds for name in signature(kind).parameters}
    return (found | {"jobs"}) - {"job_cls", "job_kwargs", "base_class_kwargs"}


def try_job(script: str, settings: str) -> None:
    """Ask SLURM whether it accepts such a job; Dask would silently retry for ever.

    Args:
        script: the script of the job.
        settings: the file with its settings.

    Raises:
        InputError: SLURM refuses the job; the text holds its reason.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        command = ["sbatch", "--test-only", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise InputError(f"{settings}: SLURM refuses this job ({said})")


def load_extra(module: str, package: str) -> Any:
    """Import a module of a package that is an extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise not_installed(package, "cluster") from None
