"""The errors that a user can cause and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave cannot be used; the text names it and the mend."""


class BadStructure(InputError):  # noqa: N818 - says what the error is about
    """One structure cannot be used; its entry goes to the quarantine table.

    Args:
        reason: what is wrong and how to mend it, without the material's name.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the closest known name, else "" ."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""
