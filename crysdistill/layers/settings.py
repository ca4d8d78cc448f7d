"""Checks of settings that layers and encoders share, with one wording."""

from __future__ import annotations

from collections.abc import Iterable

from crysdistill.errors import InputError, did_you_mean


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        InputError: the name is unknown; the text lists the known names.
    """
    known = list(known)
    if value not in known:
        raise InputError(
            f"`{name}` is {value!r} but must be one of {', '.join(known)}"
            f"{did_you_mean(str(value), known)}"
        )


def at_least(least: int, **values: int) -> None:
    """Refuse numbers below `least`.

    Raises:
        InputError: the text names the first of them.
    """
    for name, value in values.items():
        if value < least:
            raise InputError(f"`{name}` is {value} but must be at least {least}")


def positive(**values: float) -> None:
    """Refuse numbers that are zero, negative or NaN.

    Raises:
        InputError: the text names the first of them.
    """
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"`{name}` is {value} but must be positive")
