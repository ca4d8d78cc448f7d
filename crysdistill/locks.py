"""Files that are made in parts: by one process at a time, and while there is room."""

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
    """Hold the lock of a folder of parts, which is made if it is not there.

    Args:
        parts: where the parts of the file lie.
        refusal: what to say if another process holds it.

    Raises:
        InputError: another process holds it.
    """
    parts.mkdir(exist_ok=True)
    with locked(parts / "lock", refusal):
        yield


@contextmanager
def locked(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the lock that a file stands for.

    The system lets go of it when the process dies, however it dies. On a disk without
    locks nobody is refused.

    Args:
        lock: the file, which is made.
        refusal: what to say if another process holds it.

    Raises:
        InputError: another process holds it.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError:
            pass  # a disk without locks: there is nothing to ask
        # One that has just finished removes the file, or the folder that it is in.
        here = os.fstat(file.fileno())
        if not (lock.exists() and os.path.samestat(here, lock.stat())):
            raise InputError(refusal)
        yield


@contextmanager
def room_for(parts: Path, kept: str) -> Iterator[None]:
    """Say what to do about a full disk.

    Args:
        parts: where the parts of the file lie.
        kept: what they are.

    Raises:
        InputError: the disk is full, or a quota used up.
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
