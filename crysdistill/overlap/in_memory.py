"""A collection of crystals in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from crysdistill.store.checks import structures_hash
from crysdistill.structures.crystal import Crystal


class CrystalList:
    """A collection in memory.

    Args:
        crystals: the crystals, in order.
        space_groups: (B, 2), if already known.
        made_up: (B,) whether the program made up each name; None if it made up none.
    """

    def __init__(
        self,
        crystals: Iterable[Crystal],
        space_groups: np.ndarray | None = None,
        made_up: np.ndarray | None = None,
    ) -> None:
        self.crystals = list(crystals)
        counts = [len(c.atomic_numbers) for c in self.crystals]
        self.material_ids = [c.material_id for c in self.crystals]
        self.atom_offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        none = np.empty(0, np.uint8)
        self.atomic_numbers = np.concatenate(
            [none, *(c.atomic_numbers for c in self.crystals)]
        )
        cells = [c.cell for c in self.crystals]
        self.cells = np.array(cells, np.float32).reshape(-1, 3, 3)
        if space_groups is None:
            space_groups = np.zeros((len(self.crystals), 2), np.uint8)
        self.space_groups = space_groups
        none = np.zeros(len(self.crystals), bool)
        self.made_up = none if made_up is None else made_up

    def __len__(self) -> int:
        return len(self.crystals)

    def crystal(self, row: int) -> Crystal:
        """Return one crystal."""
        return self.crystals[row]

    def fingerprints(self, rows: np.ndarray) -> None:
        """Return None: they are not known yet."""

    @cached_property
    def structures_hash(self) -> str:
        """The hash, the same as that of a store of these crystals."""
        names = [name.encode() for name in self.material_ids]
        sizes = np.cumsum([0, *map(len, names)], dtype=np.int64)
        frac = [np.asarray(c.frac_coords, np.float32) for c in self.crystals]
        arrays = {
            "atom_offsets": self.atom_offsets,
            "atomic_numbers": self.atomic_numbers,
            "cells": self.cells,
            "frac_coords": np.concatenate([np.empty((0, 3), np.float32), *frac]),
            "material_id_offsets": sizes,
            "material_ids": np.frombuffer(b"".join(names), np.uint8),
        }
        return structures_hash(
            {
                f"structures/{name}": hashlib.sha256(array.tobytes()).hexdigest()
                for name, array in arrays.items()
            }
        )
