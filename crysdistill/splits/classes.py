"""Drawing subsets that hold a proportional share of every class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crysdistill.errors import InputError
from crysdistill.splits.order import shuffled


def draw_within_classes(
    rows: np.ndarray,
    labels: np.ndarray,
    material_ids: Sequence[str],
    wanted: Mapping[str, int],
    seed: int,
) -> dict[str, np.ndarray]:
    """Draw subsets of the wanted sizes within classes."""
    values, number = np.unique(labels[rows], return_inverse=True)
    counts = np.bincount(number)
    subsets = sum(size > 0 for size in wanted.values())
    if len(values) and counts.min() < subsets:
        few = int(counts.argmin())
        raise InputError(
            f"only {counts[few]} of {len(rows)} crystals have the class "
            f"{values[few]:g}, too few for {subsets} subsets; leave out "
            "`split.stratify`"
        )
    order = shuffled(rows, material_ids, seed)
    members = [order[labels[order] == value] for value in values]
    chosen: dict[str, np.ndarray] = {}
    for place, (name, size) in enumerate(wanted.items()):
        later = sum(n > 0 for n in list(wanted.values())[place + 1 :])
        shares = _shares(np.array([len(m) for m in members]), size, later, name)
        parts = [m[:n] for m, n in zip(members, shares, strict=True)]
        members = [m[n:] for m, n in zip(members, shares, strict=True)]
        chosen[name] = _interleaved(parts)
    return chosen


def _shares(counts: np.ndarray, size: int, later: int, name: str) -> np.ndarray:
    """Divide a subset among classes: in proportion, but at least one of each.

    Args:
        counts: (C,) remaining crystals of each class.
        size: crystals of the subset.
        later: the number of later subsets that need one of each class.
        name: the name of the subset.
    """
    if not size:
        return np.zeros(len(counts), np.int64)
    most = counts - later
    if size < len(counts) or most.sum() < size:
        raise InputError(
            f"`{name}` with {size} crystals cannot share {len(counts)} classes with "
            f"the other subsets; change `split.{name}` or leave out `split.stratify`"
        )
    exact = counts * (size / counts.sum())
    shares = np.clip(np.floor(exact).astype(np.int64), 1, most)
    while (missing := size - shares.sum()) != 0:
        # The class furthest from its share, among those that can still change.
        step = 1 if missing > 0 else -1
        free = shares < most if step > 0 else shares > 1
        gap = np.where(free, step * (exact - shares), -np.inf)
        shares[gap.argmax()] += step
    return shares


def _interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Merge classes so that every prefix of the result has them in proportion."""
    places = [(np.arange(len(part)) + 0.5) / len(part) for part in parts if len(part)]
    rows = np.concatenate([np.empty(0, np.int64), *parts])
    return rows[np.argsort(np.concatenate([np.empty(0), *places]), kind="stable")]
