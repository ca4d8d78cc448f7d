"""Writes a table of embeddings part by part, so it need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from crysdistill.errors import InputError
from crysdistill.files import check_space, whole

_GROUP = 4096  # crystals in a Parquet row group


@dataclass(frozen=True)
class Contents:
    """What a table will hold.

    Args:
        ids: R names.
        ptr: (R + 1,) int64, the first atom of each crystal, and the number of atoms.
        widths: the width of each block: `crystals`, or `atoms`, `layer0`, ...
        about: the file's metadata, as text by name.
    """

    ids: Sequence[str]
    ptr: np.ndarray
    widths: Mapping[str, int]
    about: Mapping[str, str]

    @property
    def by_atom(self) -> bool:
        """Whether the table has vectors of atoms."""
        return any(name != "crystals" for name in self.widths)

    def shapes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Return the type and shape of each array that is written in parts."""
        atoms = int(self.ptr[-1])
        found: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        for name, width in self.widths.items():
            rows = len(self.ids) if name == "crystals" else atoms
            found[name] = (np.dtype("<f4"), (rows, width))
        if self.by_atom:
            found["frac_coords"] = (np.dtype("<f4"), (atoms, 3))
            found["atomic_numbers"] = (np.dtype("u1"), (atoms,))
        return found

    def fixed(self) -> dict[str, np.ndarray]:
        """Return the arrays that are known from the start."""
        wrong = next((name for name in self.ids if "\n" in name), None)
        if wrong is not None:
            raise InputError(f"{wrong!r} has a line break, which no table can hold")
        text = "\n".join(self.ids).encode()
        found = {"material_ids": np.frombuffer(text, np.uint8)}
        return {"ptr": self.ptr, **found} if self.by_atom else found


Part = Mapping[str, np.ndarray]
"""The arrays of the next crystals, by the names of `Contents.shapes`."""


def check_ending(path: Path, level: str) -> None:
    """Refuse a file that cannot hold a table of that level.

    Raises:
        InputError: it cannot; the text names the endings that can.
    """
    endings = (".csv", ".safetensors", ".h5", ".hdf5", ".parquet", "")
    if path.suffix not in endings:
        raise InputError(
            f"{path}: cannot write a table with the ending {path.suffix}; give one of "
            f"{', '.join(endings[:-1])}"
        )
    if path.suffix == ".csv" and level != "crystals":
        raise InputError(
            f"{path}: a CSV has a row for each crystal; give `{level}` a name that "
            "ends in .safetensors, .h5 or .parquet"
        )


def write_table(path: Path, contents: Contents, parts: Iterable[Part]) -> None:
    """Write a table in the format of its file ending; Parquet if it has none.

    The file appears complete or not at all.

    Args:
        path: the file; an existing one is replaced.
        contents: what all parts together hold.
        parts: the crystals in order, some in each part.

    Raises:
        InputError: a name cannot be written.
    """
    write = _WRITERS.get(path.suffix, _write_parquet)
    with whole(path) as partial:
        write(partial, contents, parts)


def _write_safetensors(path: Path, contents: Contents, parts: Iterable[Part]) -> None:
    """Write the header first, since all shapes are known, then each array in place.

    The layout is eight bytes with the length of the JSON header, the header, and the
    arrays at its offsets. The widest numbers come first, so all are aligned.
    """
    fixed, kinds = contents.fixed(), contents.shapes()
    kinds |= {name: (x.dtype, x.shape) for name, x in fixed.items()}
    header: dict[str, Any] = {"__metadata__": dict(contents.about)}
    end = 0
    for name, (dtype, shape) in sorted(kinds.items(), key=lambda k: -k[1][0].itemsize):
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        header[name] = {
            "dtype": {"<i8": "I64", "<f4": "F32", "|u1": "U8"}[dtype.str],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    places = {n: 8 + len(text) + header[n]["data_offsets"][0] for n in kinds}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for part in chain((fixed,), parts):
            for name, x in part.items():
                data = np.ascontiguousarray(x, kinds[name][0])
                file.seek(places[name])
                file.write(data.data if data.size else b"")
                places[name] += data.nbytes


def _write_hdf5(path: Path, contents: Contents, parts: Iterable[Part]) -> None:
    """Write contiguous arrays, so that readers can map them."""
    shapes = contents.shapes().values()
    rows = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes)
    ids = sum(x.nbytes for x in contents.fixed().values())
    about = sum(map(len, contents.about.values()))
    check_space(path, rows + ids + about + (1 << 16))
    # Older files hold no attribute above 64 kB.
    with h5py.File(path, "w", libver=("v108", "latest")) as file:
        for key, value in contents.about.items():
            file.attrs[key] = value
        for name, x in contents.fixed().items():
            file.create_dataset(name, data=x)
        places = dict.fromkeys(contents.shapes(), 0)
        for name, (dtype, shape) in contents.shapes().items():
            file.create_dataset(name, shape, dtype)
        for part in parts:
            for name, x in part.items():
                file[name][places[name] : places[name] + len(x)] = x
                places[name] += len(x)


def _write_parquet(path: Path, contents: Contents, parts: Iterable[Part]) -> None:
    """Write a row for each crystal, some thousands in a row group."""
    fields = [pa.field("material_id", pa.string())]
    if contents.by_atom:
        fields.append(pa.field("atomic_numbers", pa.list_(pa.uint8())))
        fields.append(pa.field("frac_coords", pa.list_(pa.float32())))
    for name, width in contents.widths.items():
        if name == "crystals":
            fields += [pa.field(f"e{k}", pa.float32()) for k in range(width)]
        else:
            fields.append(pa.field(name, pa.list_(pa.float32())))
    schema = pa.schema(fields, metadata=dict(contents.about))
    with pq.ParquetWriter(path, schema) as writer:
        for first, end, group in _groups(contents, parts):
            columns: dict[str, Any] = {"material_id": contents.ids[first:end]}
            ptr = contents.ptr[first : end + 1] - contents.ptr[first]
            for name, x in group.items():
                if name == "crystals":
                    columns |= {f"e{k}": x[:, k] for k in range(x.shape[1])}
                    continue
                each = int(np.prod(x.shape[1:]))  # numbers of an atom
                lists = pa.LargeListArray.from_arrays(ptr * each, x.reshape(-1))
                columns[name] = lists.cast(schema.field(name).type)
            writer.write_table(pa.table(columns, schema=schema))


def _write_csv(path: Path, contents: Contents, parts: Iterable[Part]) -> None:
    """Write `material_id` and the columns `e0`, `e1`, ..."""
    names = [f"e{k}" for k in range(contents.widths["crystals"])]
    pd.DataFrame(columns=["material_id", *names]).to_csv(path, index=False)
    for first, end, group in _groups(contents, parts):
        table = pd.DataFrame(group["crystals"], columns=names)
        table.insert(0, "material_id", contents.ids[first:end])
        table.to_csv(path, index=False, header=False, mode="a")


def _groups(
    contents: Contents, parts: Iterable[Part]
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Join parts; yield the first crystal of each group, its end, and its arrays."""
    first = crystals = atoms = 0
    held: list[Part] = []
    for part in parts:
        held.append(part)
        if contents.by_atom:
            atoms += len(part["atomic_numbers"])
            crystals = int(np.searchsorted(contents.ptr, atoms))
        else:
            crystals += len(part["crystals"])
        if crystals - first >= _GROUP:
            yield first, crystals, _join(held)
            first, held = crystals, []
    if held:
        yield first, crystals, _join(held)


def _join(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


_WRITERS: dict[str, Callable[[Path, Contents, Iterable[Part]], None]] = {
    ".safetensors": _write_safetensors,
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
}
"""The function that writes a table, by its file ending."""
