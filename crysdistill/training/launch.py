"""Several processes for one run: started here, by torchrun, or by srun."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import DDPStrategy

from crysdistill.errors import InputError
from crysdistill.pipes import ProcessLostError
from crysdistill.processes import (
    interrupts_held,
    is_started_by_first,
    let_interrupt,
)
from crysdistill.ranks import ask_all, hang_up, leave, rank, speak_on_cpu
from crysdistill.training.settings import TrainerSettings

_LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"

WAIT = timedelta(hours=2)
"""How long ranks wait for the first one, for example while it looks for overlaps."""


@contextmanager
def joined(settings: TrainerSettings) -> Iterator[TrainerSettings]:
    """Join the processes of a run for its duration.

    Every process runs the same code from the start. Missing processes are started here,
    with the command line of this one, and all connect to each other. With one process
    nothing happens.

    Args:
        settings: `devices` and `num_nodes` give the number of processes.

    Yields:
        The settings with both filled in.

    Raises:
        InputError: there are fewer devices, or the started processes do not match.
    """
    settings = resolve(settings)
    devices, nodes = settings.devices or 1, settings.num_nodes or 1
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if devices * nodes == 1:
        yield settings
        return
    told = "OMP_NUM_THREADS" in os.environ
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Except this logger, which reports why the command ends when a process has died.
    logging.getLogger(_LAUNCHER).setLevel(logging.INFO)
    fabric = Fabric(
        accelerator=settings.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=WAIT),
        plugins=environment(),
    )
    try:
        with interrupts_held():
            fabric.launch()
            speak_on_cpu(WAIT)
            ask_all("there")  # all must be connected before any process may leave
        let_interrupt()
        _check_number(devices * nodes)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        elif not told and _started()[1] is None:
            torch.set_num_threads(max(1, _cores() // devices))
        if rank() > 0:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as long as it runs
        yield settings
        dist.barrier()
    except (InputError, KeyboardInterrupt):
        # All ranks see these errors. After others, a joint exit could wait forever.
        leave()
        if is_started_by_first():
            # The first process reports the error. For any other exit code of this one,
            # Lightning would kill it before that.
            raise SystemExit(0) from None
        raise
    except BaseException as error:
        hang_up()
        if not _is_of_another(error):
            raise
        raise InputError(
            "another process of this run died (was there enough memory?); the same "
            "command with `resume=true` goes on from the last checkpoint"
        ) from None
    leave()


def _check_number(processes: int) -> None:
    """Refuse to start if the number of processes differs from the settings."""
    if dist.get_world_size() != processes:
        raise InputError(
            f"{dist.get_world_size()} processes take part, but `trainer.devices` and "
            f"`trainer.num_nodes` ask for {processes}; leave both out where `torchrun` "
            "or `srun` starts them"
        )


def _is_of_another(error: BaseException) -> bool:
    """Return whether an error means that another rank no longer answers."""
    broken = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out",
    )
    if isinstance(error, ProcessLostError | dist.DistBackendError):
        return True
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return gloo and any(words in str(error) for words in broken)


def resolve(settings: TrainerSettings) -> TrainerSettings:
    """Fill in the numbers of devices and nodes; refuse more than there are.

    Raises:
        InputError: there are fewer; the text says how many.
    """
    gpus = torch.cuda.device_count()
    if settings.accelerator == "gpu" and not gpus:
        raise InputError(
            "`trainer.accelerator` is `gpu` but there is no GPU here that PyTorch "
            "can use; set it to `cpu`"
        )
    who, started = _started()
    devices, nodes = settings.devices, settings.num_nodes
    if started is not None:
        for name, given, there in (
            ("devices", devices, started[0]),
            ("num_nodes", nodes, started[1]),
        ):
            if given is not None and given != there:
                raise InputError(
                    f"`trainer.{name}` is {given} but {who} started {there}; set it to "
                    f"{there}, or leave it out"
                )
        devices, nodes = started
    devices, nodes = devices or 1, nodes or 1
    # `auto` takes only NVIDIA GPUs or the CPU: Apple's GPUs have no double precision.
    accelerator = settings.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "gpu" and devices > gpus:
        if who == "srun":
            raise InputError(
                f"srun started {devices} processes on a node but this one sees {gpus} "
                f"GPU{'s' * (gpus != 1)}; let each see all of its node "
                "(`--gpus-per-node` instead of `--gpus-per-task`)"
            )
        raise InputError(
            f"`trainer.devices` is {devices} but there "
            f"{'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'} here; set it to {gpus}"
        )
    if nodes > 1 and started is None and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"`trainer.num_nodes` is {nodes} but only this machine takes part; start "
            "the command with `torchrun` or `srun` on each"
        )
    return replace(settings, accelerator=accelerator, devices=devices, num_nodes=nodes)


def environment() -> LightningEnvironment | None:
    """Return the environment in which Lightning starts processes itself, if it does.

    Without it, Lightning assumes in a SLURM batch job without `srun` that SLURM starts
    them.
    """
    return None if _started()[1] is not None else LightningEnvironment()


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _started() -> tuple[str, tuple[int, int] | None]:
    """Return the launcher, the processes on each node, and the number of nodes."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        here = int(env["LOCAL_WORLD_SIZE"])
        return "torchrun", (here, int(env["WORLD_SIZE"]) // here)
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
        return "srun", (int(env["SLURM_STEP_NUM_TASKS"]) // nodes, nodes)
    return "", None


def check_same(what: str, value: str) -> None:
    """Refuse to start if a value differs between ranks.

    Args:
        what: the name of the value, for the message.
        value: a hash or another short text.

    Raises:
        InputError: on all ranks, if one has another value than the first.
    """
    everyone = ask_all((socket.gethostname(), value))
    first_host, first = everyone[0]
    for number, (host, other) in enumerate(everyone):
        if other != first:
            raise InputError(
                f"rank {number} on {host} has another {what} ({other[:12]}) than rank "
                f"0 on {first_host} ({first[:12]}); give all the same file"
            )
