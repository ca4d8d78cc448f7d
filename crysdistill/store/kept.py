"""What was computed from a store, kept beside it for the next run."""

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

    They lie in the folder `NAME.h5.kept` beside the store, which may be removed at any
    time. Runs that compute the same at once each write a file of their own, and the
    last one stays. Where nothing can be written, they are computed by every run.
    Every rank calls this, the first one computes, and all have the same.

    Args:
        store: what they are computed from; another content has other arrays.
        key: whatever else they depend on: what they are, settings, rows, a version.
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
    # What cannot be read, whatever the reason, is computed and written anew.
    with suppress(OSError, SafetensorError):
        return load_file(path)
    arrays = {name: np.ascontiguousarray(a) for name, a in compute().items()}
    with suppress(OSError):  # a folder that is read-only, a disk that is full
        folder.mkdir(exist_ok=True)
        write_whole(path, save(arrays, metadata={"key": text}), own=True)
    return arrays


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON does not know."""
    if isinstance(value, np.generic):
        return value.item()
    array = np.ascontiguousarray(value)
    facts = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(facts + array.tobytes()).hexdigest()
