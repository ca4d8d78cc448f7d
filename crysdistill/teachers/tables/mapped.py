"""Tables of embeddings that stay in their file: safetensors and HDF5.

All processes that open a table share one copy in the page cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.teachers.tables.layout import Atoms, Table, is_block, ranges

_ABOUT_ATOMS = {"ptr": (), "atomic_numbers": (), "frac_coords": (3,)}
"""The arrays beside the blocks, and the shape of one entry of each."""


class MappedTable(Table):
    """A table of arrays with offsets, as in a store.

    Args:
        path: the file.
        blocks: the embeddings by name.
        arrays: those of `ptr`, `atomic_numbers` and `frac_coords` that the file has.
        ids: R names.
        about: the file's metadata.

    Raises:
        InputError: an array is missing, or is not as long as the others.
    """

    def __init__(
        self,
        path: Path,
        blocks: Mapping[str, Tensor],
        arrays: Mapping[str, np.ndarray],
        ids: Sequence[str],
        about: Mapping[str, str],
    ) -> None:
        for name, x in blocks.items():
            if x.ndim != 2 or not x.is_floating_point():
                raise InputError(
                    f"{path}: `{name}` is {tuple(x.shape)} of {x.dtype} but must be a "
                    "matrix of floating-point numbers"
                )
        by_atom = [name for name in blocks if name != "crystals"]
        counts = self._ptr = None
        if by_atom:
            for name in ("ptr", "atomic_numbers"):
                if name not in arrays:
                    raise InputError(f"{path} has `{by_atom[0]}` but lacks `{name}`")
            self._ptr = _offsets(path, arrays["ptr"], len(ids))
            counts = np.diff(self._ptr)
            sizes = {name: len(blocks[name]) for name in by_atom}
            sizes |= {name: len(x) for name, x in arrays.items() if name != "ptr"}
            for name, size in sizes.items():
                if size != self._ptr[-1]:
                    raise InputError(
                        f"{path}: `{name}` has {size:,} atoms but `ptr` ends at "
                        f"{self._ptr[-1]:,}"
                    )
        if "crystals" in blocks and len(blocks["crystals"]) != len(ids):
            raise InputError(
                f"{path}: `crystals` has {len(blocks['crystals']):,} rows but there "
                f"are {len(ids):,} `material_ids`"
            )
        widths = {name: x.shape[1] for name, x in blocks.items()}
        super().__init__(path, ids, counts, widths, about)
        self._blocks = dict(blocks)
        self._arrays = dict(arrays)

    def atoms(self, rows: np.ndarray) -> Atoms:
        """Return the atoms of some crystals, by row of the table."""
        if self._ptr is None:
            raise InputError(f"{self.path} has no atoms")
        first = self._ptr[rows]
        places = ranges(first, self._ptr[rows + 1] - first)
        frac = self._arrays.get("frac_coords")
        return Atoms(
            self._arrays["atomic_numbers"][places],
            None if frac is None else frac[places].astype(np.float64),
        )

    def take(self, block: str, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return the whole block, and where the vectors of each crystal begin."""
        if block == "crystals" or self._ptr is None:
            return self._blocks[block], rows
        return self._blocks[block], self._ptr[rows]


def _offsets(path: Path, ptr: np.ndarray, rows: int) -> np.ndarray:
    """Return offsets that divide the atoms into `rows` crystals; refuse others."""
    if ptr.shape != (rows + 1,) or ptr[0] != 0 or (ptr[1:] < ptr[:-1]).any():
        raise InputError(
            f"{path}: `ptr` must be {rows + 1:,} rising numbers from 0 on, one more "
            "than there are `material_ids`"
        )
    return ptr.astype(np.int64)


def is_safetensors_table(path: Path) -> bool:
    """Return whether a file is a safetensors file with embeddings by `material_ids`."""
    try:
        with safe_open(path, framework="pt") as file:
            return "material_ids" in set(file.keys())
    except (OSError, SafetensorError):
        return False


def open_safetensors(path: Path) -> MappedTable:
    """Open a table in a safetensors file.

    Raises:
        InputError: the file is damaged, or no table.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            found = {n: file.get_tensor(n) for n in names if is_block(n)}
            arrays = {n: file.get_tensor(n).numpy() for n in _ABOUT_ATOMS if n in names}
            if "material_ids" not in names:
                raise _no_table(path)
            text = file.get_tensor("material_ids").numpy().tobytes()
            about = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}); write it again") from None
    _check_shapes(path, arrays)
    return MappedTable(path, found, arrays, _lines(path, text), about)


def open_hdf5(path: Path) -> MappedTable:
    """Open a table in an HDF5 file; chunked arrays are read into memory.

    Raises:
        InputError: the file is damaged, or no table.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") == "crysdistill-store":
                raise InputError(
                    f"{path} is a store, which holds no embeddings; write some with "
                    f"`crysdistill embed WEIGHTS {path} -o TABLE.h5 --level atoms`"
                )
            if "material_ids" not in file:
                raise _no_table(path)
            names = file["material_ids"]
            ids: Sequence[str]
            if h5py.check_string_dtype(names.dtype):
                ids = names.asstr()[:].tolist()
            else:
                ids = _lines(path, names[:].tobytes())
            found = {
                name: torch.from_numpy(_map(path, file[name]))
                for name in file
                if is_block(name)
            }
            arrays = {n: _map(path, file[n]) for n in _ABOUT_ATOMS if n in file}
            about = {k: v for k, v in file.attrs.items() if isinstance(v, str)}
    except OSError as error:
        raise InputError(f"{path} is no readable HDF5 file ({error})") from None
    _check_shapes(path, arrays)
    return MappedTable(path, found, arrays, ids, about)


def _map(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """Map a contiguous dataset; read one in chunks or in the other byte order."""
    offset = dataset.id.get_offset()
    if dataset.size == 0 or offset is None or not dataset.dtype.isnative:
        return dataset[:].astype(dataset.dtype.newbyteorder("="), copy=False)
    try:
        # "Copy on write" spares torch a warning of arrays that cannot be written.
        return np.memmap(path, dataset.dtype, "c", offset, dataset.shape)
    except ValueError:
        raise InputError(f"{path} is cut short; write it again") from None


def _check_shapes(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, x in arrays.items():
        if x.shape[1:] != _ABOUT_ATOMS[name]:
            entry = "numbers" if _ABOUT_ATOMS[name] == () else "rows of three numbers"
            raise InputError(f"{path}: `{name}` is {x.shape} but must hold {entry}")


def _lines(path: Path, text: bytes) -> list[str]:
    """Return the names, one a line."""
    try:
        return text.decode().split("\n") if text else []
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: `material_ids` must be the bytes of names in UTF-8, one a line"
        ) from None


def _no_table(path: Path) -> InputError:
    return InputError(
        f"{path} is no table of embeddings, which has `material_ids` and `atoms` or "
        "`crystals`, and no weights file either"
    )
