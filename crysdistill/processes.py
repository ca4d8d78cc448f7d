"""The processes of a command: which one this is, and which one answers Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


def is_first() -> bool:
    """Return whether this is the first of several processes, or the only one."""
    env = os.environ
    if "RANK" in env:
        return env["RANK"] == "0"
    if "LOCAL_RANK" in env:
        return env["LOCAL_RANK"] == env.get("NODE_RANK", "0") == "0"
    return env.get("SLURM_PROCID", "0") == "0"


def is_started_by_first() -> bool:
    """Return whether the first process of a run, or of this node, started this one."""
    env = os.environ
    return "RANK" not in env and env.get("LOCAL_RANK", "0") != "0"


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Make threads that start now, and the processes they start, ignore Ctrl-C.

    Ctrl-C reaches every process of a terminal, but only this one should answer. If a
    process ignored it only from its own first line on, an earlier Ctrl-C would end it
    with a traceback.
    """
    if signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        resource_tracker.ensure_running()  # lifts the block in the thread it starts in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_interrupt() -> None:
    """Answer Ctrl-C from now on, even if it came earlier in this process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
