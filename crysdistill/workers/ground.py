"""Checks that workers on other machines share files and versions with the user's.

Workers load this module, so it imports little.
"""

from __future__ import annotations

import importlib.metadata
import pickle
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crysdistill import __version__
from crysdistill.errors import InputError

_SAME = ("numpy", "spglib", "moyopy", "gemmi", "pymatgen-core")
"""Packages whose version may change results."""

_APPEARS_WITHIN = 5.0  # seconds in which a shared disk shows a new file
_SETTLES_WITHIN = 90.0  # seconds after which its cache forgets that a file was missing


@dataclass(frozen=True)
class Ground:
    """The files and versions that a worker must share with this machine.

    Args:
        token: a file that the worker must find, or None if no files are used.
        text: the content of that file.
        opened: other paths that must exist.
        versions: versions by package.
    """

    token: str | None
    text: str
    opened: tuple[str, ...]
    versions: Mapping[str, str]


@contextmanager
def common_ground(folder: Path | None, opened: Sequence[Path]) -> Iterator[Ground]:
    """Write the file by which workers recognise the folder."""
    text = uuid.uuid4().hex
    token = None if folder is None else folder.absolute() / f"cluster-{text}"
    versions = _versions()
    paths = tuple(str(path.absolute()) for path in opened)
    try:
        if token is not None:
            token.write_text(text)
        yield Ground(str(token) if token else None, text, paths, versions)
    finally:
        if token is not None:
            token.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"crysdistill": __version__}
    for name in _SAME:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _check(ground: Ground) -> None:
    """Check that this process, a worker, sees the files of the user's machine."""
    here = socket.gethostname()
    for name, version in _versions().items():
        if ground.versions.get(name) != version:
            raise InputError(
                f"the worker on {here} has {name} {version}, not "
                f"{ground.versions.get(name)}: install the same on all machines"
            )
    if ground.token is None:
        return
    token = Path(ground.token)
    if not _appears(token, ground.text):
        raise _unseen(here, str(token.parent))
    for path in ground.opened:
        if not Path(path).exists():
            raise _unseen(here, path)


def _appears(path: Path, text: str) -> bool:
    """Wait for a file, since another machine sees it a moment after it is written."""
    end = time.monotonic() + _APPEARS_WITHIN
    while True:
        with suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _unseen(host: str, path: str) -> InputError:
    return InputError(
        f"the worker on {host} does not see {path}: put it on a disk that all machines "
        "share, under the same name"
    )


def work(job: bytes, ground: Ground) -> Any:
    """Do a job; this runs on a worker.

    Raises:
        InputError: this machine does not see the same files, or has other versions.
    """
    if ground not in _trusted:
        _check(ground)
        _trusted.append(ground)
        del _trusted[:-10]
    function, arguments = pickle.loads(job)
    return function(*arguments)


_trusted: list[Ground] = []  # on a worker, those already checked


def await_files(paths: Sequence[Path]) -> None:
    """Wait until this machine sees the files that others have written.

    Raises:
        InputError: a file does not appear within a minute and a half.
    """
    end = time.monotonic() + _SETTLES_WITHIN
    for path in paths:
        while not path.exists():
            if time.monotonic() > end:
                raise InputError(
                    f"{path} was written by a worker but is not seen here: are both "
                    "machines looking at the same disk?"
                )
            list(path.parent.iterdir())  # makes a network file system look again
            time.sleep(0.2)
