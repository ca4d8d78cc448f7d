"""Measures the machine's limits: matrix products and copies in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from crysdistill.ranks import sum_over_ranks

PATIENCE = 0.15
"""Seconds that each measurement may take, approximately."""

_SMALLEST, _LARGEST = 64 * 2**20, 256 * 2**20  # bytes of an array to copy on a CPU
_ON_GPU = 2**30
_SIDES = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Ceilings:
    """The highest rates of a device, of all ranks together.

    Args:
        gflops: 10^9 floating-point operations, in products of square matrices.
        gbytes: 10^9 bytes read and written, in copies much larger than the caches.
        dtype: the precision of the matrices.
        threads: the threads of each process on a CPU.
    """

    gflops: float
    gbytes: float
    dtype: str
    threads: int


def measure_ceilings(
    device: torch.device, precision: str, ranks: int = 1
) -> Ceilings | None:
    """Measure a device in about half a second, only once in a process.

    With several ranks, all must call this at the same moment, since they share the
    machine.

    Args:
        device: where the run computed.
        precision: of the run, as Lightning names it.
        ranks: how many ranks measure together.

    Returns:
        The limits; None if there is too little memory to measure.
    """
    dtype = torch.float32
    if precision.startswith("bf16"):
        dtype = torch.bfloat16
    elif precision.startswith("16"):
        dtype = torch.float16
    found = _measure(device, dtype, torch.get_num_threads(), ranks)
    gflops, gbytes = found
    if ranks > 1:
        gflops, gbytes = sum_over_ranks(torch.tensor(found, device=device)).tolist()
    if not gflops or not gbytes:
        return None
    name = str(dtype).removeprefix("torch.")
    return Ceilings(gflops, gbytes, name, torch.get_num_threads())


@lru_cache
def _measure(
    device: torch.device, dtype: torch.dtype, threads: int, ranks: int
) -> tuple[float, float]:
    try:
        return _gflops(device, dtype), _gbytes(device, ranks)
    except (RuntimeError, MemoryError):  # torch raises these when memory runs out
        return 0.0, 0.0


@torch.no_grad()
def _gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply larger and larger matrices, for about `PATIENCE` seconds."""
    best, end = 0.0, time.perf_counter() + PATIENCE
    for side in _SIDES:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        multiply = partial(torch.mm, a, b, out=out)
        _seconds(multiply, device)  # warm-up
        taken = min(_seconds(multiply, device) for _ in range(2))
        best = max(best, 2.0 * side**3 / taken / 1e9)
        if time.perf_counter() + 3 * 8 * taken > end:
            break
    return best


@torch.no_grad()
def _gbytes(device: torch.device, ranks: int) -> float:
    """Copy an array larger than the caches; each byte is read and written once."""
    if device.type == "cpu":
        size = min(max(8 * _cache_bytes(), _SMALLEST), _LARGEST)
        size = max(size // ranks, _SMALLEST // 2)
    else:
        size = _ON_GPU
        if device.type == "cuda":
            size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.zeros(size // 4, device=device)
    target = torch.zeros_like(source)
    end = time.perf_counter() + PATIENCE
    best = float("inf")
    for _ in range(5):
        best = min(best, _seconds(lambda: target.copy_(source), device))
        if time.perf_counter() > end:
            break
    return 2.0 * source.nbytes / best / 1e9


def _seconds(do: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes, until the device has finished it."""
    _wait_for(device)
    begun = time.perf_counter()
    do()
    _wait_for(device)
    return max(time.perf_counter() - begun, 1e-9)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_bytes() -> int:
    """Return the size of the largest cache of the first core, at least 32 MiB."""
    sizes = [2**25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:])
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes)
