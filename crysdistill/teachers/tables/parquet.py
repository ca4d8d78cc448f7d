"""Tables of embeddings in Parquet: a row for each crystal, with lists of numbers.

The requested rows are read into memory, because Parquet pages are compressed and random
access to them is slow. Tables larger than memory need one of the other formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.teachers.tables.layout import Atoms, Table, is_block, ranges

_ROWS = 2048  # read at a time


class ParquetTable(Table):
    """A Parquet file with `material_id` and lists of numbers, or `e0`, `e1`, ...

    Args:
        path: the file.

    Raises:
        InputError: the file cannot be read, or a column is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} is no readable Parquet file ({error})") from None
        schema = self._file.schema_arrow
        self._names = schema.names
        if "material_id" not in self._names:
            raise InputError(f"{path} has no column `material_id`")
        column = self._file.read(["material_id"])["material_id"]
        ids = column.cast(pa.string()).to_pylist()
        plain = [name for name in self._names if re.fullmatch(r"e\d+", name)]
        self._plain = sorted(plain, key=lambda name: int(name[1:]))
        found = [name for name in self._names if is_block(name)]
        counts, widths = None, {}
        if by_atom := [name for name in found if name != "crystals"]:
            if "atomic_numbers" not in self._names:
                raise InputError(
                    f"{path} has `{by_atom[0]}` but lacks `atomic_numbers`"
                )
            counts = self._lengths("atomic_numbers")
            widths = {name: self._width(name, counts) for name in by_atom}
        if "crystals" in found:
            widths["crystals"] = self._width("crystals", None)
        elif self._plain:
            widths["crystals"] = len(self._plain)
        about = schema.metadata or {}
        text = {key.decode(): value.decode() for key, value in about.items()}
        super().__init__(path, ids, counts, widths, text)

    def atoms(self, rows: np.ndarray) -> Atoms:
        """Return the atoms of some crystals, by row of the table."""
        if self.counts is None:
            raise InputError(f"{self.path} has no atoms")
        numbers, first = self._lists("atomic_numbers", 1, self.counts, rows)
        places = ranges(first, self.counts[rows])
        frac = None
        if "frac_coords" in self._names:
            frac = self._lists("frac_coords", 3, self.counts, rows)[0][places]
        return Atoms(numbers[places, 0], None if frac is None else frac.astype(float))

    def take(self, block: str, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return the vectors of only these crystals, in memory."""
        if block == "crystals" and "crystals" not in self._names:
            return torch.from_numpy(self._plain_columns(rows)), np.arange(len(rows))
        counts = None if block == "crystals" else self.counts
        values, first = self._lists(block, self.widths[block], counts, rows)
        return torch.from_numpy(values), first

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        return self._file.iter_batches(_ROWS, columns=columns, use_threads=False)

    def _columns(self, name: str, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Yield parts of a column, and the row where each begins.

        Row groups without a wanted row are skipped.
        """
        start = 0
        for group in range(self._file.num_row_groups):
            end = start + self._file.metadata.row_group(group).num_rows
            if wanted[start:end].any():
                place = start
                for batch in self._file.iter_batches(
                    _ROWS, [group], [name], use_threads=False
                ):
                    yield place, batch.column(0)
                    place += len(batch)
            start = end

    def _lengths(self, name: str) -> np.ndarray:
        """Return how many values each row of a list column has."""
        parts = [_lengths(batch.column(0)) for batch in self._batches([name])]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _width(self, name: str, counts: np.ndarray | None) -> int:
        """Return the width of a block, from its first list."""
        for batch in self._batches([name]):
            first = int(_lengths(batch.column(0))[0])
            width = first // int(1 if counts is None else counts[0] or 1)
            if not width:
                raise InputError(
                    f"{self._path}: `{name}` has {first} numbers in its first row"
                )
            return width
        return 0

    def _plain_columns(self, rows: np.ndarray) -> np.ndarray:
        """Return the columns `e0`, `e1`, ... of some rows, (rows, F)."""
        values = np.empty((len(self.ids), len(self._plain)), np.float32)
        start = 0
        for batch in self._batches(self._plain):
            end = start + len(batch)
            for name in self._plain:
                column = batch.column(name).to_numpy(zero_copy_only=False)
                values[start:end, self._plain.index(name)] = column
            start = end
        return values[rows]

    def _lists(
        self, name: str, width: int, counts: np.ndarray | None, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read a list column of some rows, in the order of the table.

        Args:
            name: the column.
            width: the numbers of one vector.
            counts: (R,) vectors of each row; None means one each.
            rows: the rows to read.

        Returns:
            (all, width); and (rows,) where the vectors of each row begin.

        Raises:
            InputError: a list has another length.
        """
        wanted = np.zeros(len(self.ids), dtype=bool)
        wanted[rows] = True
        lengths = np.zeros(len(self.ids), np.int64)
        parts = []
        for start, column in self._columns(name, wanted):
            end = start + len(column)
            sizes, inside = _lengths(column), wanted[start:end]
            lengths[start:end] = np.where(inside, sizes, 0)
            values = column.flatten().to_numpy(zero_copy_only=False)
            parts.append(values[np.repeat(inside, sizes)])
        flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        vectors = np.ones(len(self.ids), np.int64) if counts is None else counts
        wrong = np.flatnonzero(wanted & (lengths != vectors * width))
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"{self._path}: `{name}` of {self.ids[row]} has {lengths[row]:,} "
                f"numbers but must have {vectors[row]:,} x {width}"
            )
        first = (np.cumsum(lengths) - lengths) // width
        return flat.reshape(-1, width), first[rows]


def _lengths(column: Any) -> np.ndarray:
    """Return the length of each list; a missing list has length 0."""
    return (
        column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(int)
    )
