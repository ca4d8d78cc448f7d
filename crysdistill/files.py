"""Files that are there whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

PARTIAL = ".partial"
"""The ending of a file that is being written."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit that leaves no room."""


def write_whole(path: Path, content: bytes | memoryview) -> Path:
    """Write a file so that even a power cut leaves the old one or the new one.

    The partial file lies in the same folder, since only within a file system is a
    rename one step. It must be on the disk before the rename is: otherwise a crash may
    leave the new name with nothing behind it.

    Args:
        path: a file that is there is replaced.
        content: all of it.

    Returns:
        The path.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write does not say of which file
        raise
    return path


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks
            raise
    finally:
        os.close(number)


def remove_partials(folder: Path) -> None:
    """Remove what writers left that were killed."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink()
