"""Opening a store's file: its description, and its arrays in memory."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from crysdistill.errors import InputError, did_you_mean
from crysdistill.store.layout import FORMAT, SCHEMA, STRUCTURES_READABLE


def open_hdf5(path: Path) -> h5py.File:
    """Open the file of a store.

    Raises:
        InputError: the file is missing or no HDF5. If it is a source of structures, the
            text holds the command that builds a store from it.
    """
    if not path.exists():
        near = (
            [p.name for p in path.parent.glob("*.h5")] if path.parent.exists() else []
        )
        raise InputError(f"{path}: no such store{did_you_mean(path.name, near)}")
    if path.suffix.lower() in (".safetensors", ".ckpt", ".yaml"):
        raise InputError(
            f"{path}: not a store; give the `.h5` that `build` has written"
        )
    stores = path.suffix.lower() in (".h5", ".hdf5") and path.is_file()
    if not stores and not (path.is_file() and h5py.is_hdf5(path)):
        raise InputError(
            f"{path}: not a store; build it first: `{build_command(path)}`"
        )
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = str(error) if h5py.is_hdf5(path) else "no HDF5 file: damaged or empty"
        raise InputError(
            f"{path}: not a readable store ({reason}); build it again"
        ) from None


def build_command(path: Path) -> str:
    """Return the command that builds a store from a source."""
    name = path.resolve().name
    while Path(name).suffix.lower() in _SUFFIXES:
        name = Path(name).stem
    out = shlex.quote(f"{name or 'store'}.h5")  # here: beside it may be read-only
    return f"crysdistill build {shlex.quote(str(path))} -o {out}"


_SUFFIXES = (".gz", ".jsonl", ".ndjson", ".json", ".zip", ".cif", ".db", ".xyz", ".csv",
             ".extxyz", ".vasp", ".traj")  # fmt: skip


def read_facts(path: Path, file: h5py.File, schemas: Sequence[int]) -> dict[str, Any]:
    """Read and check the description of a store."""
    if file.attrs.get("format") != FORMAT:
        raise InputError(f"{path}: an HDF5 file, but not a crysdistill store")
    schema = int(file.attrs["schema"])
    if schema not in schemas:
        advice = "install a newer crysdistill, or build it again from its sources"
        if schema in STRUCTURES_READABLE:
            advice = f"`crysdistill build {path} -o NEW.h5` writes it anew"
        raise InputError(
            f"{path}: a store of schema {schema}, but this version reads schema "
            f"{SCHEMA}; {advice}"
        )
    text = file.attrs["facts"]
    check = file.attrs.get("checksum")
    if check is not None and check != xxhash.xxh3_128_hexdigest(text.encode()):
        raise InputError(
            f"{path}: its description is corrupted (its checksum differs); build the "
            "store again or restore it from a copy"
        )
    return json.loads(text)


def datasets(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield the arrays of a store and their names."""
    for group in sorted(file):
        for name in sorted(file[group]):
            yield f"{group}/{name}", file[group][name]


def mapped(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """Map a contiguous dataset; "copy on write" avoids torch's read-only warning."""
    # torch hardly supports uint16, so the same bits are read as int16.
    dtype = np.dtype("<i2") if dataset.dtype == np.uint16 else dataset.dtype
    offset = dataset.id.get_offset()
    if dataset.size == 0 or offset is None:
        return np.empty(dataset.shape, dtype)
    try:
        return np.memmap(path, dtype, "c", offset, dataset.shape)
    except ValueError:
        raise InputError(
            f"{path}: cut short (`{dataset.name}` is incomplete); build it again"
        ) from None
