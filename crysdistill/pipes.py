"""Small sums of the processes of one machine, through pipes between them.

Batch norms add up a few hundred numbers a dozen times in each step. Gloo hands each
sum to threads of its own, in every process; here the one that needs it reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Client, Connection, Listener
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

MOST = 7168
"""Bytes that may go at a time. All processes send before they read, so that they must
fit into a pipe that nobody reads: macOS has 8 KiB."""

MANY = 64
"""Processes up to which each has a pipe to each other one."""


class ProcessLostError(RuntimeError):
    """Another process of a run does not answer any more."""


class Pipes:
    """A pipe to each other process.

    Args:
        own: the number of this process.
        ends: our end of the pipe to each other one, by its number.
        patience: seconds to wait for another.
    """

    def __init__(self, own: int, ends: dict[int, Connection], patience: float) -> None:
        self._own = own
        self._ends = ends
        self._patience = patience

    def sum(self, amounts: np.ndarray) -> np.ndarray:
        """Add up arrays of all processes, which all have the same shape and type.

        They are added in the order of processes, so that all have the same bits.

        Raises:
            ProcessLostError: another process ended, or does not answer.
        """
        own = np.asarray(amounts, order="C")
        message = own.tobytes()
        parts = {self._own: own}
        try:
            for end in self._ends.values():
                end.send_bytes(message)
            for number, end in self._ends.items():
                if not end.poll(self._patience):
                    raise TimeoutError
                parts[number] = np.frombuffer(end.recv_bytes(), own.dtype)
        except (EOFError, OSError) as error:
            raise ProcessLostError("another process of this run ended") from error
        total = parts[0].reshape(own.shape).copy()
        with np.errstate(all="ignore"):  # a loss that is no number is told elsewhere
            for number in range(1, len(parts)):
                total += parts[number].reshape(own.shape)
        return total

    def close(self) -> None:
        """Close our ends."""
        for end in self._ends.values():
            end.close()


def connect(
    own: int, ask_all: Callable[[Any], list[Any]], patience: float
) -> Pipes | None:
    """Connect all processes with each other.

    Args:
        own: the number of this process.
        ask_all: returns the value that each process gives it, in their order.
        patience: see `Pipes`.

    Returns:
        None on all of them if they are many, or not on the same machine.
    """
    ends: dict[int, Connection] = {}
    with (
        TemporaryDirectory(prefix="crysdistill-", ignore_cleanup_errors=True) as folder,
        _listen(folder) or nullcontext() as listener,
    ):
        addresses = ask_all(listener and listener.address)
        near = None not in addresses and len(addresses) <= MANY
        if near:
            try:
                for number in range(own):
                    ends[number] = Client(addresses[number])
                    ends[number].send_bytes(bytes([own]))
            except OSError:  # it is on another machine
                near = False
        near = all(ask_all(near))
        if near and listener:
            for _ in range(own + 1, len(addresses)):
                end = listener.accept()
                ends[end.recv_bytes()[0]] = end
    pipes = Pipes(own, ends, patience)
    if not near:
        pipes.close()
    return pipes if near else None


def _listen(folder: str) -> Listener | None:
    """Listen to others; None if the folder's name is too long for a socket."""
    try:
        # Room for all to wait: they are let in once it is known that all have come.
        return Listener(f"{folder}/socket", backlog=MANY)
    except OSError:
        return None
