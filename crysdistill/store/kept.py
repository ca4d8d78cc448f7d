"""Arrays computed from a store, kept beside it for the next run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from crysdistill.files import write_whole
from crysdistill.ranks import on_first_rank
from crysdistill.store.store import Store

__all__ = ["kept"]

Arrays = dict[str, np.ndarray]


def kept(
    store: Store, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> Arrays:
    """Return arrays that depend on a store and a key, computed once.

    They lie in the folder `NAME.h5.kept` beside the store. You may remove it at any
    time. If several runs compute the same arrays at once, each writes its own file, and
    the last one stays. If the folder is not writable, every run computes them. Every
    rank calls this function; the first rank computes, and all get the same arrays.

    Args:
        store: the store; a store of other content has other arrays.
        key: everything else that they depend on: their kind, settings, rows, a version.
            Plain values and arrays.
        compute: returns the arrays by name.
    """
    return on_first_rank(lambda: _read_or_compute(store, key, compute))


def _read_or_compute(
    store: Store, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> Arrays:
    text = json.dumps([store.hash, key], sort_keys=True, default=_plain)
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = store.path.with_name(f"{store.path.name}.kept")
    path = folder / f"{digest[:32]}.safetensors"
    # If the file cannot be read for any reason, compute and write it again.
    with suppress(OSError, SafetensorError):
        return load_file(path)
    arrays = {name: np.ascontiguousarray(a) for name, a in compute().items()}
    with suppress(OSError):  # a read-only folder, a full disk
        folder.mkdir(exist_ok=True)
        write_whole(path, save(arrays, metadata={"key": text}), own=True)
    return arrays


def _plain(value: Any) -> Any:
    """Return a JSON value in place of one that JSON does not know."""
    if isinstance(value, np.generic):
        return value.item()
    array = np.ascontiguousarray(value)
    facts = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(facts + array.tobytes()).hexdigest()
