"""Hashes of a source: of its names and content, not of its place or time."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

_AT_ONCE = 1 << 22  # bytes

Files = Iterable[tuple[str, Path]]
"""Files, each with its name in the source, since a renamed file has another id."""


def contents_of(files: Files, *settings: Any) -> Callable[[], str]:
    """Return a function that reads and hashes files and settings when it is called."""
    files = list(files)

    def contents() -> str:
        digest = xxhash.xxh3_128(repr(settings).encode())
        for name, path in files:
            digest.update(repr((name, file_hash(path))).encode("utf-8", "replace"))
        return digest.hexdigest()

    return contents


def file_hash(path: Path) -> str:
    """Return a hash of a file's content, or a remark if the file cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            return "not a file"
        with path.open("rb") as file:
            while part := file.read(_AT_ONCE):
                digest.update(part)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()


def tree_hash(path: Path) -> str:
    """Return a hash of the content of a file, or of all files below a folder."""
    if not path.is_dir():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return contents_of((file.relative_to(path).as_posix(), file) for file in files)()


def not_a_file(path: Path) -> str:
    """Say why there is nothing to read at a path; "" if it is a file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"a link to nothing ({path.readlink()})" if path.is_symlink() else "gone"
    except OSError as error:  # links in a circle, folders that may not be entered
        return f"cannot be read ({error.strerror})"
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "not a file (a device or socket)"
