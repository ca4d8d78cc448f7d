"""Processes forked from a server that has imported all that a run needs.

A fresh Python process takes seconds to import. The server has only one thread, so a
fork of it is as clean as a fresh process and starts in a moment. Only tests of the
start itself, or of what Lightning starts, need a fresh process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm_start"])


class _Open:
    """A file descriptor to send to another process."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., int], tuple[Any]]:
        return _received, (reduction.DupFd(self.file.fileno()),)


def _received(sent: Any) -> int:
    return sent.detach()


def _become(
    script: str | None,
    words: Sequence[str],
    out: int,
    errors: int,
    environment: Mapping[str, str],
    folder: str,
    prepare: Callable[[], None] | None,
) -> None:
    """Let this process be `python -m crysdistill WORDS`, or `python SCRIPT WORDS`."""
    os.setsid()  # as in a terminal of its own: signals reach all its processes
    os.dup2(out, 1)
    os.dup2(errors, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if prepare is not None:
        prepare()
    sys.argv[1:] = words
    if script is None:
        runpy.run_module("crysdistill", run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = script
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


class Command:
    """`crysdistill WORDS` in a forked process that leads a session of its own.

    Args:
        words: the verb and its arguments.
        script: a Python file that runs in place of `crysdistill`, in its own folder.
        prepare: called in the process before the command; it must be a function that
            can be pickled.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        *words: object,
        script: Path | None = None,
        prepare: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        self._said = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self._process = CONTEXT.Process(
            target=_become,
            args=(
                str(script) if script else None,
                list(map(str, words)),
                *map(_Open, self._said),
                {**os.environ, **environment},
                str(script.parent if script else Path.cwd()),
                prepare,
            ),
        )
        self._process.start()
        assert self._process.pid
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Wait for the end; return the exit code and the output.

        Raises:
            TimeoutError: the process still runs after so many seconds.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError
        for file in self._said:
            file.seek(0)
        out, errors = (file.read() for file in self._said)
        return subprocess.CompletedProcess(
            self._process.name, self._process.exitcode, out, errors
        )

    def signal(self, number: int) -> None:
        """Send a signal to the process and to those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            # Before its first line, the process does not lead a session.
            group = os.getpgid(self.pid)
            if group == self.pid:
                os.killpg(group, number)
            else:
                os.kill(self.pid, number)

    def kill(self) -> subprocess.CompletedProcess[str]:
        """Kill only this process, as the system does when memory is short."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `crysdistill WORDS` in a forked process; see `Command`."""
    return Command(*words, **options).wait()
