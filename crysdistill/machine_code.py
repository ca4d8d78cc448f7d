"""Functions that become machine code, kept for the next process where there is room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def machine_code(function: Callable, **options: Any) -> Any:
    """Compile a function when it is first called, and let go of Python's lock in it.

    What was compiled is kept beside the source or in the user's cache folder. Where
    neither can be written, as in a container with another user, each process compiles
    anew.

    Args:
        function: of arrays and numbers.
        options: of `numba.njit`.
    """
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # Numba found no folder
        return njit(nogil=True, **options)(function)
