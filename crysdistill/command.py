"""Running verbs: what stands around each one, from arguments to the exit code."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from crysdistill import __version__
from crysdistill.errors import InputError, did_you_mean
from crysdistill.processes import is_first, is_started_by_first

DONE, OUR_FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Parser(argparse.ArgumentParser):
    """A parser of one verb; its errors are one line and name what was meant."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        message = re.sub(r"^argument (.+?): ", r"`\1` ", message)
        raise InputError(f"{message}; see `{self.prog} --help`")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse arguments; options may stand among the others."""
        self._check_options(argv)
        args, left = self.parse_known_intermixed_args(argv)
        if left:
            raise InputError(f"`{left[0]}` is one too many; see `{self.prog} --help`")
        return args

    def _check_options(self, argv: Sequence[str]) -> None:
        """Name a mistyped option before argparse complains of what it then misses."""
        known = self._option_string_actions
        for token in argv:
            name = token.partition("=")[0]
            is_option = re.match(r"--?[A-Za-z]", token)
            attached = not token.startswith("--") and token[:2] in known  # -oSTORE
            if is_option and name not in known and not attached:
                hint = did_you_mean(name, known) or f"; see `{self.prog} --help`"
                raise InputError(f"unknown option `{name}`{hint}")


@dataclass(frozen=True)
class Verb:
    """One thing that the command can do.

    Args:
        summary: in the list of verbs, and at the top of its help.
        example: a command line.
        arguments: adds what it takes to its parser. An option that is not given is
            absent afterwards, so that defaults stand in one place: the library.
        run: does it.
        computes: whether it needs torch.
        resume: how to go on after Ctrl-C, if at all.
        check: finds what is wrong before torch is imported, which takes seconds.
    """

    summary: str
    example: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], None]
    computes: bool = True
    resume: str = ""
    check: Callable[[argparse.Namespace], None] | None = None

    def parser(self, name: str) -> Parser:
        """Return the parser of this verb."""
        parser = Parser(
            prog=f"crysdistill {name}",
            description=self.summary,
            epilog=f"example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.arguments(parser)
        return parser


def run(verbs: Mapping[str, Verb], argv: Sequence[str]) -> int:
    """Run one verb and return the exit code.

    Args:
        verbs: by name.
        argv: the command line, without the command itself.
    """
    verb = verbs.get(argv[0]) if argv else None
    if not is_first():  # of processes that train together, one speaks
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
    try:
        _dispatch(verbs, argv)
        sys.stdout.flush()
    except InputError as error:
        return _say(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt as stop:
        return _say_interrupted(verb, str(stop))
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        named = error.filename is not None and str(error.filename) in argv
        if named or isinstance(error, PermissionError) or error.errno in _FULL:
            where = f"{error.filename}: " if error.filename is not None else ""
            return _say(f"error: {where}{error.strerror}", BAD_INPUT)
        return _say_fault()
    except SystemExit as stop:
        # Lightning answers Ctrl-C with an exit of its own.
        if isinstance(stop.__context__, KeyboardInterrupt) and stop.code != DONE:
            return _say_interrupted(verb)
        return stop.code if isinstance(stop.code, int) else DONE
    except Exception:
        return _say_fault()
    return DONE


def _dispatch(verbs: Mapping[str, Verb], argv: Sequence[str]) -> None:
    """Find the verb and do it."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_overview(verbs))
    elif name in ("-V", "--version"):
        print(f"crysdistill {__version__}")
    elif name.startswith("-"):
        hint = did_you_mean(name, ("--help", "--version"))
        raise InputError(f"unknown option `{name}`{hint or '; begin with a verb'}")
    elif name not in verbs:
        hint = did_you_mean(name, verbs) or f"; choose one of {', '.join(verbs)}"
        raise InputError(f"unknown verb `{name}`{hint}")
    else:
        verb = verbs[name]
        args = verb.parser(name).parse(argv[1:])
        if verb.check:
            verb.check(args)
        _prepare(verb.computes)
        verb.run(args)


def _prepare(computes: bool) -> None:
    """Keep threads and denormal numbers from slowing everything down."""
    # Threads that wait for work must not keep a core busy: with two processes on the
    # same cores that costs a factor of ten. Read when torch is first imported.
    told = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if not any(name in os.environ for name in told):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if computes:
        import torch

        # Tails of Gaussians reach numbers that a CPU treats many times slower.
        torch.set_flush_denormal(True)


def _overview(verbs: Mapping[str, Verb]) -> str:
    """Return the help of the command as a whole."""
    width = max(map(len, verbs))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in verbs.items()]
    return "\n".join(
        [
            "usage: crysdistill VERB ...",
            "",
            "A folder of crystals goes in, a small-data property predictor comes out.",
            "",
            "verbs:",
            *lines,
            "",
            "`crysdistill VERB --help` explains a verb, with an example;",
            "`crysdistill --version` prints the version.",
            "Exit codes: 0 done, 2 bad input, 1 our fault, 130 interrupted.",
        ]
    )


def _say(text: str, code: int) -> int:
    # What is wrong with the input, all of them know; a fault may be one's own, and so
    # is what the first did not meet before it started the others.
    if is_first() or code == OUR_FAULT or is_started_by_first():
        print(text, file=sys.stderr)
    return code


def _say_interrupted(verb: Verb | None, kept: str = "") -> int:
    """Say what of the work is kept, where it is known, and how to go on."""
    start = "\n" if sys.stderr.isatty() else ""  # below the terminal's ^C
    said = ["interrupted", kept, verb.resume if verb else ""]
    return _say(start + "; ".join(filter(None, said)), INTERRUPTED)


def _say_fault() -> int:
    traceback.print_exc()
    return _say(
        f"This is a fault of crysdistill {__version__}, not of yours: please report it "
        "with the lines above.",
        OUR_FAULT,
    )
