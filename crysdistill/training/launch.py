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
"""How long ranks wait for the first while it looks for overlaps, say."""


@contextmanager
def joined(settings: TrainerSettings) -> Iterator[TrainerSettings]:
    """Be one of the processes of a run while it lasts.

    Every process runs the same code from the start; here those that are not yet there
    are started, with the command line of this one, and they find each other. With one
    process nothing happens.

    Args:
        settings: `devices` and `num_nodes` say how many.

    Yields:
        The settings with both filled in.

    Raises:
        InputError: there are not so many devices, or other processes were started.
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
    # But for this one, which says why it ends the command when a process has died.
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
            ask_all("there")  # before any may leave, since it would be waited for
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
        # Of these all ranks know. After another error a farewell could wait for ever.
        leave()
        if is_started_by_first():
            # It tells. Lightning would kill it there for any other exit code of this
            # one, even if it was about to.
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
    """Refuse to begin with another number of processes than is asked for."""
    if dist.get_world_size() != processes:
        raise InputError(
            f"{dist.get_world_size()} processes take part, but `trainer.devices` and "
            f"`trainer.num_nodes` ask for {processes}; leave both out where `torchrun` "
            "or `srun` starts them"
        )


def _is_of_another(error: BaseException) -> bool:
    """Return whether an error says that another rank does not answer any more."""
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
    """Fill in how many devices and nodes there are, and refuse what there is not.

    Raises:
        InputError: the text says what there is.
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
    # Of what `auto` would find elsewhere, Apple's GPUs have no double precision.
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
    """Return what tells Lightning that it starts the processes itself, if it does.

    In a batch job of SLURM without `srun` it would take for granted that SLURM does.
    """
    return None if _started()[1] is not None else LightningEnvironment()


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _started() -> tuple[str, tuple[int, int] | None]:
    """Return who has started processes, and how many on a node and on how many."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        here = int(env["LOCAL_WORLD_SIZE"])
        return "torchrun", (here, int(env["WORLD_SIZE"]) // here)
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
        return "srun", (int(env["SLURM_STEP_NUM_TASKS"]) // nodes, nodes)
    return "", None


def check_same(what: str, value: str) -> None:
    """Refuse to begin where ranks differ in what must be the same.

    Args:
        what: its name, for the message.
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
