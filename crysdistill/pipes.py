"""Small sums over the processes of one machine, through pipes between them.

Batch norms add up a few hundred numbers a dozen times in each step. Gloo hands each sum
to its own threads in every process. Here the thread that needs the sum reads it itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Client, Connection, Listener
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

MOST = 7168
"""The most bytes to send at a time. All processes send before they read, so the bytes
must fit into a pipe without a reader: macOS has 8 KiB."""

MANY = 64
"""Up to this many processes, each has a pipe to every other."""


class ProcessLostError(RuntimeError):
    """Another process of a run no longer answers."""


class Pipes:
    """A pipe to each other process.

    Args:
        own: the number of this process.
        ends: our end of the pipe to every other process, by its number.
        patience: seconds to wait for another process.
    """

    def __init__(self, own: int, ends: dict[int, Connection], patience: float) -> None:
        self._own = own
        self._ends = ends
        self._patience = patience

    def sum(self, amounts: np.ndarray) -> np.ndarray:
        """Add up arrays of all processes, which all have the same shape and type.

        They are added in the order of processes, so that all get the same bits.

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
        with np.errstate(all="ignore"):  # a loss that is NaN is reported elsewhere
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
        ask_all: returns the values of all processes, in their order.
        patience: see `Pipes`.

    Returns:
        None on all processes if there are too many, or they are on several machines.
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
        # All must be able to wait: we accept them only when all have come.
        return Listener(f"{folder}/socket", backlog=MANY)
    except OSError:
        return None
