"""Runs a function in several processes that train together, as torchrun would."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

from tests.forks import CONTEXT


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _member(
    rank: int, ranks: int, port: int, answer: Any, do: Callable, args: tuple
) -> None:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    if ranks > 1:
        os.environ.update({key: str(value) for key, value in environment.items()})
    try:
        result = do(*args)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        result = error
    # Pickle here: a queue would pass handles of tensors, which end with this process.
    answer.put(pickle.dumps((rank, result)))


def together(ranks: int, do: Callable, *args: Any) -> list[Any]:
    """Return what `do(*args)` returns, or raises, in each process."""
    answer, port = CONTEXT.Queue(), _free_port()
    members = [
        CONTEXT.Process(target=_member, args=(rank, ranks, port, answer, do, args))
        for rank in range(ranks)
    ]
    for member in members:
        member.start()
    found: dict[int, Any] = {}
    while len(found) < ranks:
        try:
            found |= [pickle.loads(answer.get(timeout=1))]
        except queue.Empty:
            codes = [member.exitcode for member in members]
            assert not any(codes), f"processes ended with {codes}"
    for member in members:
        member.join(30)
    return [found[rank] for rank in range(ranks)]


def joined_call(do: Callable, *args: Any) -> Any:
    """Call a function as one of the ranks; pass this to `together`."""
    from crysdistill.training.launch import joined
    from crysdistill.training.settings import TrainerSettings

    with joined(TrainerSettings(accelerator="cpu", threads=1)):
        return do(*args)
