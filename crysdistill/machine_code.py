"""Compiling functions to machine code, which is kept for the next process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

import numba
import numpy as np
from numba.extending import is_jitted

_NUMBA: Any = numba.config  # its attributes are made when it is imported


def machine_code(function: Callable, **options: Any) -> Any:
    """Compile a function on its first call; it runs without Python's lock.

    The machine code is kept in `$NUMBA_CACHE_DIR`, in the user's cache folder, or
    beside the source. Its name changes with the code of the function. If no folder is
    writable, as in a container with another user, each process compiles again.

    Args:
        function: a function of arrays and numbers.
        options: options of `numba.njit`.
    """
    before = _NUMBA.CACHE_DIR
    _NUMBA.CACHE_DIR = _folder(function)  # read while a function is decorated
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # Numba found no folder
        return numba.njit(nogil=True, **options)(function)
    finally:
        _NUMBA.CACHE_DIR = before


def _folder(function: Callable) -> str:
    """Return the first writable folder for machine code, or ''."""
    name = hashlib.sha256("\n".join(_says(function, set())).encode()).hexdigest()[:16]
    places = [Path(function.__code__.co_filename).parent / "__pycache__"]
    with suppress(RuntimeError):  # nobody's home
        places.insert(
            0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        )
    if _NUMBA.CACHE_DIR:
        places.insert(0, Path(_NUMBA.CACHE_DIR))
    for folder in (place / "crysdistill" / name for place in places):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return str(folder)
    return ""


def _says(function: Callable, seen: set[Callable]) -> Iterator[str]:
    """Yield the code of a function and of the compiled functions that it calls.

    Numba notices a change in the file of a function, but not in other files from which
    the function takes functions, numbers or named tuples.
    """
    if function in seen:
        return
    seen.add(function)
    yield f"{function.__module__}.{function.__qualname__}"
    yield from _says_code(function.__code__)
    for name in (*function.__code__.co_names, *function.__annotations__.values()):
        value: Any = function.__globals__.get(name)
        if is_jitted(value):
            yield f"{name} {value.targetoptions}"
            yield from _says(value.py_func, seen)
        elif isinstance(value, (bool, int, float, str, tuple, np.generic)):
            yield f"{name} {value!r}"
        elif hasattr(value, "_fields"):
            yield f"{name} {value._fields}"


def _says_code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _says_code(value)
        else:
            yield repr(value)
