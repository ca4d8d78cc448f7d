"""Orders of crystals that depend on their names only, not on their rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np


def shuffled(rows: np.ndarray, material_ids: Sequence[str], seed: int) -> np.ndarray:
    """Return rows in an order that depends only on their names and the seed."""
    names = [material_ids[row] for row in rows.tolist()]
    return rows[hashed_order(names, seed)]


def by_name(rows: np.ndarray, material_ids: Sequence[str]) -> np.ndarray:
    """Return rows in the order of their names; numbers in names sort as numbers."""

    def key(row: int) -> tuple[str, str]:
        name = material_ids[row]
        return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name), name

    return np.array(sorted(rows.tolist(), key=key), np.int64)


def hashed_order(names: Sequence[str], seed: int) -> np.ndarray:
    """Return the order of names by their hashes, (B,) int64."""
    keys = [hashlib.sha256(f"{seed}\n{name}".encode()).digest() for name in names]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
