"""Errors that a user can cause and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave cannot be used; the text names it and the mend."""


class BadStructure(InputError):  # noqa: N818 - says what the error is about
    """One structure cannot be used; its entry goes to the quarantine table.

    Args:
        reason: the fault and its mend, without the material's name.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the closest known name, else "" ."""
    spelled = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), spelled, n=1, cutoff=0.6)
    return f"; did you mean `{spelled[close[0]]}`?" if close else ""


def not_installed(package: str, extra: str) -> InputError:
    """Return the error for an optional package that is missing.

    Args:
        package: its name.
        extra: the extra of crysdistill that installs it.
    """
    return InputError(
        f"`{package}` is not installed; `pip install crysdistill[{extra}]`"
    )


def first_line(error: BaseException) -> str:
    """Return the message of a library's error, cut to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
