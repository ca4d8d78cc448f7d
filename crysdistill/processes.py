"""Where a command has several processes: which this is, and who answers Ctrl-C."""

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
    """Return whether the first process of a run, here or on this node, started this."""
    env = os.environ
    return "RANK" not in env and env.get("LOCAL_RANK", "0") != "0"


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let threads that start now, and all processes that they start, ignore Ctrl-C.

    It reaches every process of a terminal; only this one has something to say to it.
    A process that ignored it by its own first line would end with a traceback before.
    """
    if signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        resource_tracker.ensure_running()  # lifts the block in the thread it starts in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_interrupt() -> None:
    """Answer Ctrl-C from now on, also one that came since this process began."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
