"""What a search must know of single crystals, worked out once and by all cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from crysdistill.overlap.matching import Test, primitive, space_groups, unhanded
from crysdistill.store.fingerprints import fingerprint, formulas
from crysdistill.structures.crystal import Crystal
from crysdistill.workers import Workers

CHUNK = 64
"""Crystals, or pairs of them, per job: a tenth of a second."""

_R = TypeVar("_R")

Formula = tuple[tuple[int, ...], tuple[int, ...]]


class Collection(Protocol):
    """Many crystals by row; a `Store` is one, a `CrystalList` another."""

    @property
    def material_ids(self) -> Sequence[str]:
        """The names of all B crystals."""

    @property
    def atom_offsets(self) -> np.ndarray:
        """(B + 1,) first atom of each crystal."""

    @property
    def atomic_numbers(self) -> np.ndarray:
        """(N,) uint8, those of all crystals."""

    @property
    def cells(self) -> np.ndarray:
        """(B, 3, 3) in Å, rows are lattice vectors."""

    @property
    def space_groups(self) -> np.ndarray:
        """(B, 2) at both tolerances of `SYMPREC`; 0, not known, is found if needed."""

    @property
    def structures_hash(self) -> str:
        """A SHA-256 of names, species, cells and coordinates."""

    def __len__(self) -> int: ...

    def crystal(self, row: int) -> Crystal:
        """Return one crystal."""

    def fingerprints(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the fingerprints of rows of S species, (rows, S, F); None if unknown.

        Those of a store are rounded by 6e-5 at most, a hundredth of what matters.
        """


class Facts:
    """A collection of crystals and what was found out about them.

    Args:
        crystals: the collection.
        numbers: numbers of reduced formulas, shared with the collection that this one
            is compared with; new formulas are entered.
    """

    def __init__(self, crystals: Collection, numbers: dict[Formula, int]) -> None:
        self.crystals = crystals
        self.formula = np.empty(len(crystals), np.int64)
        """(B,) number of the reduced formula."""
        self.rows_of: dict[tuple[int, ...], list[int]] = {}
        """Rows by anonymised formula."""
        keys = formulas(crystals.atom_offsets, crystals.atomic_numbers)
        for row, key in enumerate(keys):
            self.formula[row] = numbers.setdefault(key, len(numbers))
            self.rows_of.setdefault(key[1], []).append(row)
        volumes = np.abs(np.linalg.det(np.asarray(crystals.cells, np.float64)))
        self.volume = volumes / np.diff(crystals.atom_offsets)
        """(B,) Å³ per atom."""
        self.groups = unhanded(np.asarray(crystals.space_groups)[:, :2])
        """(B, 2) space groups without handedness; 0 where not known (yet)."""
        self._fingerprints: dict[int, np.ndarray] = {}
        self._primitives: dict[int, Crystal | None] = {}

    def __len__(self) -> int:
        return len(self.formula)

    def forget(self) -> None:
        """Free the memory that grows with the number of crystals looked at."""
        for table in (self._fingerprints, self._primitives):
            table.clear()

    def fingerprints(self, rows: np.ndarray, workers: Workers) -> np.ndarray:
        """Return the fingerprints of rows of one anonymised formula, (rows, S, F)."""
        known = self.crystals.fingerprints(rows)
        if known is not None:
            return known
        self._work_out(self._fingerprints, rows, fingerprint, workers)
        return np.stack([self._fingerprints[row] for row in rows.tolist()])

    def space_groups(self, rows: np.ndarray, workers: Workers) -> np.ndarray:
        """Return space groups without handedness, (rows, 2), found where not known."""
        unknown = rows[~self.groups[rows].any(axis=1)]
        found: dict[int, tuple[int, ...]] = {}
        self._work_out(found, unknown, space_groups, workers)
        for row, groups in found.items():
            self.groups[row] = groups
        return self.groups[rows]

    def primitives(
        self, rows: np.ndarray, test: Test, workers: Workers
    ) -> list[Crystal | None]:
        """Return the cells that the matcher compares, None where there is none."""
        # The cells of the strict test are few, and of no use to the others.
        table = {} if test == "strained" else self._primitives
        self._work_out(table, rows, partial(primitive, test=test), workers)
        return [table[row] for row in rows.tolist()]

    def _work_out(
        self,
        table: dict[int, _R],
        rows: np.ndarray,
        function: Callable[[Crystal], _R],
        workers: Workers,
    ) -> None:
        """Enter a fact of crystals into a table, where it is not there yet."""
        missing = [row for row in np.unique(rows).tolist() if row not in table]
        crystals = (self.crystals.crystal(row) for row in missing)
        found = workers.map(function, crystals, CHUNK)
        table.update(zip(missing, found, strict=True))
