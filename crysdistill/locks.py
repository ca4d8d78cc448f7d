"""Locks and full disks, for files that are made in parts."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crysdistill.errors import InputError


@contextmanager
def only_one(parts: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a folder of parts; a missing folder is made.

    Args:
        parts: the folder with the parts of the file.
        refusal: the message if another process holds the lock.

    Raises:
        InputError: another process holds it.
    """
    parts.mkdir(exist_ok=True)
    with locked(parts / "lock", refusal):
        yield


@contextmanager
def locked(lock: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on a file.

    The system releases it when the process dies, however it dies. On a disk without
    locks, no process is refused.

    Args:
        lock: the file, which is made.
        refusal: the message if another process holds the lock.

    Raises:
        InputError: another process holds it.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError:
            pass  # a disk without locks
        # A process that has just finished removes the file or its folder.
        here = os.fstat(file.fileno())
        if not (lock.exists() and os.path.samestat(here, lock.stat())):
            raise InputError(refusal)
        yield


@contextmanager
def room_for(parts: Path, kept: str) -> Iterator[None]:
    """Turn the error of a full disk into a message with its mend.

    Args:
        parts: the folder with the parts of the file.
        kept: the name of the parts, for the message.

    Raises:
        InputError: the disk is full, or a quota is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{error.strerror} in {parts.parent}: {kept} are kept in {parts.name}; "
            "make room and run the same command again"
        ) from None
