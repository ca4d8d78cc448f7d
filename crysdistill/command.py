"""Running a verb: parsing its arguments, catching errors, returning an exit code."""

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
from crysdistill.terminal import print_anything

DONE, OUR_FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Parser(argparse.ArgumentParser):
    """The parser of one verb; its errors take one line and suggest a correction."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        message = re.sub(r"^argument (.+?): ", r"`\1` ", message)
        raise InputError(f"{message}; see `{self.prog} --help`")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse arguments; options may come before, between or after the others."""
        self._check_options(argv)
        args, left = self.parse_known_intermixed_args(argv)
        if left:
            raise InputError(
                f"unexpected argument `{left[0]}`; see `{self.prog} --help`"
            )
        return args

    def _check_options(self, argv: Sequence[str]) -> None:
        """Report a mistyped option, before argparse reports a missing argument."""
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
        summary: one sentence for the list of verbs and for the help of this verb.
        example: a command line.
        arguments: adds the verb's arguments to its parser. An option that the user
            omits is absent from the namespace, so that only the library has defaults.
        run: does the work.
        computes: whether the verb needs torch.
        resume: how to continue after Ctrl-C; empty if the verb cannot continue.
        check: finds mistakes before torch is imported, which takes seconds.
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
        verbs: all verbs by name.
        argv: the command line, without the command itself.
    """
    verb = verbs.get(argv[0]) if argv else None
    print_anything()
    if not is_first():  # only the first of the training processes prints
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
    try:
        _dispatch(verbs, argv)
        sys.stdout.flush()
    except InputError as error:
        return _say(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt as stop:
        return _say_interrupted(verb, str(stop))
    except BrokenPipeError:
        # The reader of our output has closed; Python would complain again at exit.
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
    """Keep waiting threads and denormal numbers from slowing down the work."""
    # Waiting threads must not keep a core busy: with two processes on the same cores
    # that costs a factor of ten. Torch reads the variable at its first import.
    told = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if not any(name in os.environ for name in told):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if computes:
        import torch

        # Tails of Gaussians become denormal numbers, which slow a CPU down many times.
        torch.set_flush_denormal(True)


def _overview(verbs: Mapping[str, Verb]) -> str:
    """Return the help of the whole command."""
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
    # All processes see wrong input, so the first reports it. A fault may occur in one
    # process alone, and so may an error after the first has started the others.
    if is_first() or code == OUR_FAULT or is_started_by_first():
        print(text, file=sys.stderr)
    return code


def _say_interrupted(verb: Verb | None, kept: str = "") -> int:
    """Say which work is kept, if that is known, and how to continue."""
    start = "\n" if sys.stderr.isatty() else ""  # below the terminal's ^C
    said = ["interrupted", kept, verb.resume if verb else ""]
    return _say(start + "; ".join(filter(None, said)), INTERRUPTED)


def _say_fault() -> int:
    traceback.print_exc()
    return _say(
        f"This is a bug in crysdistill {__version__}, not your mistake: please report "
        "it with the lines above.",
        OUR_FAULT,
    )
