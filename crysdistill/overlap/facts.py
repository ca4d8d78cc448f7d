"""The facts that a search needs about each crystal, computed once on all cores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from crysdistill.overlap.matching import space_groups, unhanded
from crysdistill.store.fingerprints import NEIGHBORS, compositions, fingerprint
from crysdistill.structures.crystal import Crystal
from crysdistill.workers import Workers

CHUNK = 64
"""Crystals per job, about a tenth of a second of work."""


class Collection(Protocol):
    """Many crystals, by row. `Store` and `CrystalList` are collections."""

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
        """(B, 2) at both tolerances of `SYMPREC`; 0 is unknown, and found if needed."""

    @property
    def structures_hash(self) -> str:
        """A SHA-256 of names, species, cells and coordinates."""

    def __len__(self) -> int: ...

    def crystal(self, row: int) -> Crystal:
        """Return one crystal."""

    def fingerprints(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the fingerprints of rows of S species, (rows, S, F); None if unknown.

        A store rounds them by at most 6e-5, a hundredth of a difference that matters.
        """


class Numbers:
    """A number for each formula, shared by the collections of one search."""

    def __init__(self) -> None:
        self.formulas: dict[bytes, int] = {}
        self.anonymous: dict[bytes, int] = {}


class Facts:
    """A collection of crystals and the facts found about them.

    Args:
        crystals: the collection.
        numbers: the formula numbers of the search; new formulas are added.
    """

    def __init__(self, crystals: Collection, numbers: Numbers) -> None:
        self.crystals = crystals
        offsets, species, amounts = compositions(
            crystals.atom_offsets, crystals.atomic_numbers
        )
        self.species = np.diff(offsets)
        """(B,) how many species a crystal has, S."""
        self.amounts = [amounts, offsets]
        self.formula = _number(
            np.stack([species, amounts], 1), offsets, numbers.formulas
        )
        """(B,) number of the reduced formula."""
        self.anonymous = _number(amounts[:, None], offsets, numbers.anonymous)
        """(B,) number of the anonymised formula."""
        volumes = np.abs(np.linalg.det(np.asarray(crystals.cells, np.float64)))
        self.volume = volumes / np.diff(crystals.atom_offsets)
        """(B,) Å³ per atom."""
        self.groups = unhanded(np.asarray(crystals.space_groups)[:, :2])
        """(B, 2) space groups without handedness; 0 if not known (yet)."""
        self.first_profile = np.full(len(crystals), -1, np.int64)
        """(B,) where a crystal's fingerprint starts in `profiles`; -1 if unknown."""
        self.profiles = np.empty((0, 2 * NEIGHBORS), np.float32)

    def __len__(self) -> int:
        return len(self.formula)

    def amounts_of(self, row: int) -> tuple[int, ...]:
        """Return the amounts in a crystal's anonymised formula, in rising order."""
        amounts, offsets = self.amounts
        return tuple(amounts[offsets[row] : offsets[row + 1]].tolist())

    def find_profiles(self, rows: np.ndarray, workers: Workers) -> None:
        """Add the fingerprints of some crystals to `profiles`."""
        rows = np.unique(rows[self.first_profile[rows] < 0])
        ends = len(self.profiles) + np.cumsum(self.species[rows])
        self.first_profile[rows] = ends - self.species[rows]
        if not len(rows):
            return
        more = np.empty((int(ends[-1]) - len(self.profiles), 2 * NEIGHBORS), np.float32)
        self.profiles = np.concatenate([self.profiles, more])
        if self.crystals.fingerprints(rows[:1]) is None:
            crystals = (self.crystals.crystal(row) for row in rows.tolist())
            found = workers.map(fingerprint, crystals, CHUNK)
            for row, profile in zip(rows.tolist(), found, strict=True):
                start = self.first_profile[row]
                self.profiles[start : start + len(profile)] = profile
            return
        for size in np.unique(self.species[rows]).tolist():
            some = rows[self.species[rows] == size]
            places = self.first_profile[some][:, None] + np.arange(size)
            self.profiles[places] = self.crystals.fingerprints(some)

    def find_space_groups(self, rows: np.ndarray, workers: Workers) -> None:
        """Fill in the unknown space groups of some crystals in `groups`."""
        rows = np.unique(rows[~self.groups[rows].any(axis=1)])
        crystals = (self.crystals.crystal(row) for row in rows.tolist())
        for row, groups in zip(
            rows.tolist(), workers.map(space_groups, crystals, CHUNK), strict=True
        ):
            self.groups[row] = groups


def _number(
    rows: np.ndarray, offsets: np.ndarray, numbers: dict[bytes, int]
) -> np.ndarray:
    """Return a number for each stretch of rows; equal stretches share one."""
    data = np.ascontiguousarray(rows.astype(np.int32)).tobytes()
    places = (offsets * rows.shape[1] * 4).tolist()
    return np.array(
        [
            numbers.setdefault(data[start:end], len(numbers))
            for start, end in itertools.pairwise(places)
        ],
        np.int64,
    )
