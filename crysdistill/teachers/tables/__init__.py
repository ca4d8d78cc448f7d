"""Tables of embeddings as files; `crysdistill.teachers.table` describes them."""

from __future__ import annotations

from pathlib import Path

from crysdistill.teachers.tables.layout import Table
from crysdistill.teachers.tables.mapped import open_hdf5, open_safetensors
from crysdistill.teachers.tables.parquet import ParquetTable


def open_table(path: Path) -> Table:
    """Open a table; its first bytes tell which kind of file it is.

    Raises:
        InputError: the file is no table, or a part of it is missing.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] == b"PAR1":
        return ParquetTable(path)
    if start == b"\x89HDF\r\n\x1a\n":
        return open_hdf5(path)
    return open_safetensors(path)
