"""Files that are written whole or not at all, even in a crash or on a full disk.

And the check, before any work, that a result can be written there.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crysdistill.errors import InputError

PARTIAL = ".partial"
"""The ending of a file that is being written."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit that leaves no room."""


def writable(path: str | Path, inputs: Iterable[object] = ()) -> Path:
    """Return the path of a result, if it can be written there.

    Args:
        path: of the file to write.
        inputs: what the result is made from. Files among them are not overwritten, nor
            is any file in a folder among them.

    Raises:
        InputError: there is no such folder, `path` is a folder, or it is an input.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; create it first")
    if path.is_dir():
        raise InputError(f"{path}: a folder; give the name of a file in it")
    if path.exists() and any(_holds(given, path) for given in inputs):
        raise InputError(
            f"{path} is read here, and would be overwritten; give the result another "
            "name"
        )
    return path


def _holds(given: object, path: Path) -> bool:
    """Return whether something given is this file, or a folder that holds it."""
    if not isinstance(given, str | Path):
        return False
    try:
        place = Path(given).resolve(strict=True)
    except OSError:  # nothing is there, or the text is too long for a name
        return False
    file = path.resolve()
    return file == place or place in file.parents


@contextmanager
def whole(path: Path, own: bool = False) -> Iterator[Path]:
    """Yield a temporary path; after success, the file written there moves to `path`.

    Even a power cut leaves the old file or the new one. The partial file lies in the
    same folder, since a rename is one step only within a file system. It must be on the
    disk before the rename. Otherwise a crash may leave the new name without content.

    Args:
        path: the final path; an existing file is replaced.
        own: whether others may be writing the same file; the last one stays.

    Raises:
        OSError: it cannot be written; an earlier file is unchanged.
    """
    name = f"{path.name}.{secrets.token_hex(8)}" if own else path.name
    partial = path.with_name(name + PARTIAL)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # The error of a write does not name the file.
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)
        raise


def write_whole(path: Path, content: bytes | memoryview, own: bool = False) -> Path:
    """Write a file of this content and return its path; see `whole`."""
    with whole(path, own) as partial:
        partial.write_bytes(content)
    return path


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, if the system can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks
            raise
    finally:
        os.close(number)


def remove_partials(folder: Path) -> None:
    """Remove the partial files of killed writers."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink()


def check_space(path: Path, size: int) -> None:
    """Raise a clear error for a full disk, which would crash the process in HDF5.

    Args:
        path: a file that does not exist yet.
        size: the size that it will have, in bytes.

    Raises:
        OSError: there is no room for the file.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)
