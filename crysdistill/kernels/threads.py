"""Compiled work on as many threads as PyTorch has."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

_pools: dict[int, ThreadPoolExecutor] = {}

# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_pools.clear)


def share(work: Callable[..., None], tasks: Sequence[tuple], *args: Any) -> None:
    """Call `work(*task, *args)` for each task on `torch.get_num_threads()` threads.

    These are plain threads, because `work` releases Python's lock. They sleep when
    there is nothing to do, any thread may call, and a fork does no harm. OpenMP's
    threads spin, and Numba's own pool aborts when two threads call it. The caller works
    as well, so that one thread needs no other.

    Args:
        work: compiled with `nogil=True`.
        tasks: its first arguments; no two tasks write to the same place.
        args: its other arguments.
    """
    threads = max(1, min(torch.get_num_threads(), len(tasks)))
    # Each thread has its own setting whether numbers below 1e-38 count as 0.
    flush = bool(np.float32(1e-39) * np.float32(1.0) == 0)

    def take(turn: int) -> None:
        if turn:
            torch.set_flush_denormal(flush)
        for task in tasks[turn::threads]:
            work(*task, *args)

    if threads > 1 and threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, "crysdistill")
    others = [_pools[threads].submit(take, turn) for turn in range(1, threads)]
    take(0)
    for other in others:
        other.result()
