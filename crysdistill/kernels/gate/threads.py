"""Compiled work on as many threads as PyTorch has."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

_pools: dict[int, ThreadPoolExecutor] = {}

# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def share(work: Callable[..., None], tasks: np.ndarray, *args: Any) -> None:
    """Call `work(turn, turns, tasks, *args)` on `torch.get_num_threads()` threads.

    Plain threads, because `work` lets go of Python's lock: they sleep when there is
    nothing to do, any thread may call, and a fork does no harm. OpenMP's spin, and
    Numba's own pool aborts when two threads call it. The caller works as well, so that
    one thread needs no other.

    Args:
        work: compiled with `nogil=True`; does each `turns`-th task from `turn` on.
        tasks: (tasks, ...); no two of them write to the same place.
        args: passed on.
    """
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        work(0, 1, tasks, *args)
        return
    # Whether numbers below 1e-38 count as 0 is a setting of each thread.
    flush = bool(np.float32(1e-39) * np.float32(1.0) == 0)

    def take(turn: int) -> None:
        torch.set_flush_denormal(flush)
        work(turn, threads, tasks, *args)

    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, "crysdistill")
    others = [_pools[threads].submit(take, turn) for turn in range(1, threads)]
    work(0, threads, tasks, *args)
    for other in others:
        other.result()
