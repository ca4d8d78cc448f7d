"""The store: many crystals, their graphs and labels in one memory-mapped HDF5 file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, assemble
from crysdistill.store.checks import STRUCTURES, structures_hash
from crysdistill.store.fingerprints import unpack
from crysdistill.store.gather import count, gather_atoms, gather_edges
from crysdistill.store.layout import MADE_UP, SCHEMA, STRUCTURES_READABLE
from crysdistill.store.names import Names
from crysdistill.store.origins import Origin, joint_licence
from crysdistill.store.reading import datasets, mapped, open_hdf5, read_facts
from crysdistill.store.unpacking import unpack_edges
from crysdistill.structures.crystal import Crystal

_FOR_THE_HOST = ("structures/material_id", "fingerprints/")
"""Arrays that batches do not use."""


class Store:
    """Reads a store. Opening maps the file; data are loaded when they are needed.

    All processes that open a store share one copy in the page cache. A batch is one
    vectorised gather. `to` moves the arrays to a device, which then makes the batches.

    Args:
        path: the file, for messages.
        arrays: the datasets by name.
        facts: the description in the file: graph settings, sources, hashes, ...
        host: the datasets as mapped from the file, if `arrays` are on a device.
    """

    def __init__(
        self,
        path: Path,
        arrays: dict[str, Tensor],
        facts: dict[str, Any],
        host: dict[str, Tensor] | None = None,
    ) -> None:
        self.path = path
        self.facts = facts
        self.graph = GraphSettings(**facts["graph"])
        self.hash: str = facts["hash"]
        self.property_names: tuple[str, ...] = tuple(facts["properties"])
        self._arrays = arrays
        self._host = arrays if host is None else host

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Store:
        """Open a store: map its arrays, and compare them with their checksums.

        The comparison reads the file once, at the speed of memory if it is in the page
        cache.

        Args:
            path: the file.
            verify: whether to compare checksums; not needed if another process has just
                done so.

        Raises:
            InputError: the file is missing, is not a store, is cut short, is corrupted
                (the text names the part), or has another schema.
        """
        store = cls._open(Path(path), (SCHEMA,))
        if verify:
            store.verify()
        return store

    @classmethod
    def open_structures(cls, path: str | Path) -> Store:
        """Open a store of this schema or an older one, for `crystals` only.

        Raises:
            InputError: as in `open`.
        """
        store = cls._open(Path(path), STRUCTURES_READABLE)
        store.verify()
        return store

    @classmethod
    def _open(cls, path: Path, schemas: Sequence[int]) -> Store:
        with open_hdf5(path) as file:
            facts = read_facts(path, file, schemas)
            arrays = {}
            for name, dataset in datasets(file):
                arrays[name] = torch.from_numpy(mapped(path, dataset))
        return cls(path, arrays, facts)

    def __len__(self) -> int:
        return len(self._arrays["structures/cells"])

    @property
    def nbytes(self) -> int:
        """The size in bytes of the arrays that batches use."""
        return sum(
            array.nbytes
            for name, array in self._arrays.items()
            if not name.startswith(_FOR_THE_HOST)
        )

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, crystals={len(self)}, graph={self.graph})"

    # --------------------------------------------------------------- whole columns

    @cached_property
    def made_up(self) -> np.ndarray:
        """(B,) bool, whether the program made up the id, since the source has none."""
        if MADE_UP not in self._host:
            return np.zeros(len(self), bool)
        return self._numpy(MADE_UP).astype(bool)

    @property
    def atom_offsets(self) -> np.ndarray:
        """First atom of each crystal, and the number of atoms; (B + 1,) int64."""
        return self._numpy("structures/atom_offsets")

    @property
    def edge_offsets(self) -> np.ndarray:
        """First edge of each crystal, and the number of edges; (B + 1,) int64."""
        return self._numpy("graphs/edge_offsets")

    @property
    def atomic_numbers(self) -> np.ndarray:
        """Atomic numbers of all atoms, uint8."""
        return self._numpy("structures/atomic_numbers")

    @property
    def frac_coords(self) -> np.ndarray:
        """Fractional coordinates of all atoms, (N, 3) float32."""
        return self._numpy("structures/frac_coords")

    @property
    def cells(self) -> np.ndarray:
        """(B, 3, 3) float32, Å, rows are lattice vectors."""
        return self._numpy("structures/cells")

    @property
    def space_groups(self) -> np.ndarray:
        """(B, tolerances) uint8, 1-230 or 0; `facts["symmetry"]` lists tolerances."""
        return self._numpy("symmetry/space_groups")

    @cached_property
    def material_ids(self) -> Names:
        """The names of all crystals, in order."""
        return Names(
            self._numpy("structures/material_ids"),
            self._numpy("structures/material_id_offsets"),
        )

    @property
    def origins(self) -> list[Origin]:
        """The origins of its crystals that its sources named."""
        return [Origin(**origin) for origin in self.facts.get("origins", ())]

    @property
    def licence(self) -> str:
        """The SPDX expression that binds anything made from this store."""
        return joint_licence(origin.licence for origin in self.origins)

    @cached_property
    def structures_hash(self) -> str:
        """A hash of the crystals, without their graphs and labels."""
        if "structures_hash" in self.facts:
            return self.facts["structures_hash"]
        # Stores of schema 1 have not noted it.
        return structures_hash(
            {n: hashlib.sha256(self._numpy(n)).hexdigest() for n in STRUCTURES}
        )

    def property(self, name: str) -> np.ndarray:
        """Return one property of all crystals, (B,) float64, NaN if not known.

        Raises:
            InputError: the store has no such property.
        """
        return self._numpy("properties/values")[self._property_row(name)]

    def _property_row(self, name: str) -> int:
        if name not in self.property_names:
            has = ", ".join(self.property_names) or "none"
            raise InputError(
                f"{self.path}: no property `{name}`; it has: {has}"
                f"{did_you_mean(name, self.property_names)}"
            )
        return self.property_names.index(name)

    def _numpy(self, name: str) -> np.ndarray:
        return self._host[name].numpy()

    # ------------------------------------------------------------ crystals, batches

    def crystal(self, row: int) -> Crystal:
        """Return one crystal with its known properties."""
        atoms = slice(*self.atom_offsets[row : row + 2])
        values = self._numpy("properties/values")[:, row]
        return Crystal(
            material_id=self.material_ids[row],
            atomic_numbers=np.array(self.atomic_numbers[atoms]),
            frac_coords=self._numpy("structures/frac_coords")[atoms].astype(np.float64),
            cell=self.cells[row].astype(np.float64),
            properties={
                name: float(value)
                for name, value in zip(self.property_names, values, strict=True)
                if not np.isnan(value)
            },
        )

    def crystals(self, rows: Sequence[int] | None = None) -> Iterator[Crystal]:
        """Yield all crystals, or those of `rows`."""
        return (
            self.crystal(row) for row in (range(len(self)) if rows is None else rows)
        )

    def batch(
        self, rows: Sequence[int] | np.ndarray | Tensor, targets: Sequence[str] = ()
    ) -> CrystalBatch:
        """Gather the crystals of `rows` into one batch, in that order.

        Args:
            rows: the rows of the crystals. If the store is on a device, give rows on
                the host: reading them from a device would make the host wait.
            targets: the properties whose values become `targets` (B, T).

        Raises:
            IndexError: there is no such row.
        """
        on_host = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
        numbers = on_host.numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"a row is not in 0 to {len(self) - 1}")
        device = self._arrays["structures/cells"].device
        pinned = on_host.pin_memory() if device.type == "cuda" else on_host
        chosen = pinned.to(device, non_blocking=True)
        columns = [self._property_row(name) for name in targets]
        about = {
            "space_groups": self._take("symmetry/space_groups", chosen)[:, 0].long(),
            "targets": self._values(columns, chosen),
            "rows": chosen,
        }
        if device.type == "cpu" and self.graph.mode != "cgcnn":
            return self._gather(numbers, about)
        return self._gather_by_torch(numbers, chosen, about)

    def _values(self, columns: Sequence[int], chosen: Tensor) -> Tensor:
        """Return properties (B, T) float32, column by column to avoid a wait."""
        values = self._arrays["properties/values"]
        found = [values[column].index_select(0, chosen).float() for column in columns]
        empty = torch.empty(len(chosen), 0, device=chosen.device)
        return torch.stack(found, dim=1) if found else empty

    def _gather(self, rows: np.ndarray, about: dict[str, Any]) -> CrystalBatch:
        """Make a batch in memory, by compiled loops."""
        atoms, edges = count(rows, self.atom_offsets, self.edge_offsets)
        numbers = np.empty(atoms, np.int64)
        frac = np.empty((atoms, 3), np.float32)
        batch = np.empty(atoms, np.int64)
        ptr = np.empty(len(rows) + 1, np.int64)
        neighbor_ptr = np.empty(atoms + 1, np.int64)
        gather_atoms(
            rows,
            self.atom_offsets,
            self.atomic_numbers,
            self._numpy("structures/frac_coords"),
            self._numpy("graphs/neighbor_counts"),
            numbers,
            frac,
            batch,
            ptr,
            neighbor_ptr,
        )
        edge_index = np.empty((2, edges), np.int64)
        shift = np.empty((edges, 3), np.int8)
        gather_edges(
            rows,
            self.edge_offsets,
            self._numpy("graphs/edge_codes"),
            self._numpy("graphs/shift_low"),
            self._numpy("graphs/shift_bits"),
            ptr,
            neighbor_ptr,
            edge_index,
            shift,
        )
        return CrystalBatch(
            atomic_numbers=torch.from_numpy(numbers),
            frac_coords=torch.from_numpy(frac),
            cell=self._take("structures/cells", torch.from_numpy(rows)),
            edge_index=torch.from_numpy(edge_index),
            edge_shift=torch.from_numpy(shift),
            batch=torch.from_numpy(batch),
            ptr=torch.from_numpy(ptr),
            neighbor_ptr=torch.from_numpy(neighbor_ptr),
            padding_distance=self.graph.cutoff + 1.0,
            num_nodes=atoms,
            **about,
        )

    def _gather_by_torch(
        self, rows: np.ndarray, chosen: Tensor, about: dict[str, Any]
    ) -> CrystalBatch:
        """Make a batch on any device, and with the padding of mode `cgcnn`.

        Sizes are counted on the host, which knows all offsets. A read from the device
        would wait until the device has done all its work.
        """
        n_atoms, n_edges = count(rows, self.atom_offsets, self.edge_offsets)
        atom_rows, atoms = self._ranges("structures/atom_offsets", chosen, n_atoms)
        edge_rows, edges = self._ranges("graphs/edge_offsets", chosen, n_edges)
        neighbor, shift = unpack_edges(
            self._take("graphs/edge_codes", edge_rows),
            self._take("graphs/shift_low", chosen),
            self._take("graphs/shift_bits", chosen).to(torch.int32),
            edges,
        )
        return assemble(
            self._take("structures/atomic_numbers", atom_rows),
            self._take("structures/frac_coords", atom_rows),
            self._take("structures/cells", chosen),
            atoms,
            neighbor,
            shift,
            self._take("graphs/neighbor_counts", atom_rows).to(torch.int64),
            self.graph,
            **about,
        )

    def _take(self, name: str, rows: Tensor) -> Tensor:
        """Gather rows of an array; `index_select` is faster than an index."""
        return self._arrays[name].index_select(0, rows)

    def _ranges(
        self, offsets: str, chosen: Tensor, total: int
    ) -> tuple[Tensor, Tensor]:
        """Return the rows of all entries of some crystals, and the number of each."""
        start = self._take(offsets, chosen)
        counts = self._take(offsets, chosen + 1) - start  # (B,)
        before = torch.cumsum(counts, 0) - counts
        rows = torch.repeat_interleave(start - before, counts, output_size=total)
        return rows.add_(torch.arange(total, device=start.device)), counts

    def to(self, device: str | torch.device) -> Store:
        """Return this store with its arrays on another device, for batches there."""
        arrays = {
            name: array if name.startswith(_FOR_THE_HOST) else array.to(device)
            for name, array in self._host.items()
        }
        return Store(self.path, arrays, self.facts, self._host)

    # ------------------------------------------------------------------- integrity

    def verify(self) -> None:
        """Compare every array with its checksum in the file.

        Raises:
            InputError: an array has changed; the text names it.
        """
        # Stores of schema 1 have only the slower hashes.
        fast = "checksums" in self.facts
        expected = self.facts["checksums" if fast else "hashes"]
        if missing := expected.keys() ^ self._arrays.keys():
            raise InputError(
                f"{self.path}: `{min(missing)}` is missing or does not belong there; "
                "build the store again or restore it from a copy"
            )
        for name, array in self._arrays.items():
            data = array.cpu().numpy().data if array.numel() else b""
            found = (xxhash.xxh3_128 if fast else hashlib.sha256)(data).hexdigest()
            if found != expected[name]:
                raise InputError(
                    f"{self.path}: `{name}` is corrupted (its checksum differs); "
                    "build the store again or restore it from a copy"
                )

    def fingerprints(self, rows: np.ndarray) -> np.ndarray:
        """Return the fingerprints (`fingerprints.py`) of some crystals.

        Args:
            rows: crystals with the same number of species, S.

        Returns:
            (rows, S, F) float32.
        """
        first, end = self._numpy("fingerprints/offsets")[np.stack([rows, rows + 1])]
        species = first[:, None] + np.arange(end[0] - first[0] if len(rows) else 0)
        return unpack(self._numpy("fingerprints/values").view(np.uint16)[species])
