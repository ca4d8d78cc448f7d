"""Several processes as one: exchanging losses and statistics between ranks.

In one process every function here is the identity. With several, each rank holds a part
of a batch; losses and statistics are those of the whole. A loss is then returned as the
rank's share of it: the shares of all ranks add up to what one process would return, and
so do their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.pipes import MOST, Pipes, connect

__all__ = [
    "alone",
    "ask_all",
    "gather_rows",
    "hang_up",
    "leave",
    "on_first_rank",
    "rank",
    "speak_on_cpu",
    "sum_over_ranks",
    "tell_all",
    "world_size",
]

Result = TypeVar("Result")


_alone = False
_on_cpu: dist.ProcessGroup | None = None
_pipes: Pipes | None = None


def speak_on_cpu(patience: timedelta) -> None:
    """Let ranks exchange tensors in CPU memory, even if they train on GPUs.

    NCCL supports only GPUs, and an exchange there would wait until the GPU has finished
    its work. All ranks call this once, after they have connected.

    Args:
        patience: how long they wait for each other.
    """
    global _on_cpu, _pipes
    _on_cpu = dist.new_group(backend="gloo", timeout=patience)
    _pipes = connect(rank(), ask_all, patience.total_seconds())


def hang_up() -> None:
    """Close the connections, so that other ranks notice that this one has gone."""
    global _pipes
    if _pipes is not None:
        _pipes.close()
    _pipes = None


def leave() -> None:
    """Leave the other ranks; all ranks call this."""
    global _on_cpu
    hang_up()
    _on_cpu = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _group(device: torch.device) -> dist.ProcessGroup | None:
    """Return the group for exchanging tensors on a device; None means the default."""
    return _on_cpu if device.type == "cpu" else None


def world_size() -> int:
    """Return the number of processes that train together."""
    together = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if together else 1


def rank() -> int:
    """Return the number of this process among them, from 0 on."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def alone() -> Iterator[None]:
    """Compute within this context as if there were no other rank."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def sum_over_ranks(amounts: Tensor) -> Tensor:
    """Add up amounts of all ranks, without gradients: counts, weights, statistics."""
    if world_size() == 1:
        return amounts
    if _pipes is not None and _is_small(amounts):
        return _sum_through_pipes(_pipes, amounts.detach())
    total = amounts.detach().clone()
    dist.all_reduce(total, group=_group(total.device))
    return total


def _is_small(amounts: Tensor) -> bool:
    """Return whether amounts can go through pipes."""
    return (
        amounts.device.type == "cpu"
        and amounts.dtype != torch.bfloat16  # which numpy does not know
        and amounts.numel() * amounts.element_size() <= MOST
    )


@torch.compiler.disable
def _sum_through_pipes(pipes: Pipes, amounts: Tensor) -> Tensor:
    return torch.from_numpy(pipes.sum(amounts.numpy()))


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, with gradients, and the start of our rows.

    Args:
        x: (B, ...), the rows of this rank; the other dimensions are the same on all
            ranks.

    Returns:
        All rows in the order of ranks, and the number of rows before our first.
    """
    if world_size() == 1:
        return x, 0
    return _GatherRows.apply(x)


class _GatherRows(torch.autograd.Function):
    """Concatenates rows of all ranks; a row's gradient is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, int]:
        counts = torch.zeros(world_size(), dtype=torch.int64)  # no wait for a GPU
        counts[rank()] = len(x)
        sizes = sum_over_ranks(counts).tolist()
        # Collectives need equal shapes, so shorter tensors are padded.
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        first = sum(sizes[: rank()])
        ctx.own = slice(first, first + len(x))
        rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(rows), first

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Tensor:
        return sum_over_ranks(gradient.contiguous())[ctx.own]


def tell_all(value: Result) -> Result:
    """Return the value of the first rank, on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_on_cpu)
    return box[0]


def ask_all(value: Result) -> list[Result]:
    """Return the values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    everyone = [value] * world_size()
    dist.all_gather_object(everyone, value, group=_on_cpu)
    return everyone


def on_first_rank(do: Callable[[], Result]) -> Result:
    """Call a function on the first rank only, and return its result on all ranks.

    Raises:
        InputError: on all ranks, if the first rank raised it.
        SystemExit: on the other ranks, if the first failed with another error.
    """
    if world_size() == 1:
        return do()
    result: Any = None
    error: InputError | None = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            with alone():
                result = do()
        except InputError as raised:
            error = raised
        except Exception as raised:  # the others must not wait for ever
            failure = raised
    result, error, failed = tell_all((result, error, failure is not None))
    if error is not None:
        raise error
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(1)  # the first rank reports the error
    return result
