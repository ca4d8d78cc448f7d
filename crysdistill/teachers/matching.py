"""Matches the atoms of a table to the atoms of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.teachers.tables.layout import Table, ranges

SAME_PLACE = 0.01
"""Å; atoms of one element closer than this, modulo the lattice, are the same atom.

Tables keep coordinates with at least four digits, and no two atoms of a crystal are
that close."""


@dataclass(frozen=True)
class Match:
    """How the atoms of a table map to the order of the store.

    Args:
        order: (N,) the table's atom for every atom of the store's crystals; both are
            counted from the first atom of their crystal.
        moved: the number of crystals whose atoms are in another order.
        trusted: the number of crystals with several atoms of an element, for which only
            the order of elements could be compared.
    """

    order: np.ndarray
    moved: int
    trusted: int


def match_ids(table: Table, store: Store, rows: np.ndarray) -> np.ndarray:
    """Return the table's rows for some rows of a store, by `material_id`.

    Raises:
        InputError: the table lacks a crystal, or lists one twice.
    """
    place = {name: row for row, name in enumerate(table.ids)}
    if len(place) < len(table.ids):
        twice = next(n for row, n in enumerate(table.ids) if place[n] != row)
        raise InputError(f"{table.path} has {twice} twice; leave one of them out")
    names = list(store.material_ids) if len(rows) == len(store) else None
    chosen = [names[row] if names else store.material_ids[row] for row in rows]
    found = np.array([place.get(name, -1) for name in chosen], np.int64)
    if (found < 0).any():
        missing = [chosen[k] for k in np.flatnonzero(found < 0)[:3]]
        count = int((found < 0).sum())
        raise InputError(
            f"{table.path} lacks {count:,} of {len(rows):,} crystals of {store.path} "
            f"({_some(missing, count)}); add them to it, or leave them out of the store"
        )
    return found


def match_atoms(
    table: Table, table_rows: np.ndarray, store: Store, rows: np.ndarray
) -> Match:
    """Match the atoms of crystals that are in both a table and a store.

    Two atoms are the same if they have the same element and the same position, modulo
    the lattice. If the table has no `frac_coords`, the order of elements must be the
    same, or every element must occur only once.

    Args:
        table: a table with atoms.
        table_rows: (R,) rows of the table.
        store: the store with the student's crystals.
        rows: (R,) the rows of the same crystals in the store.

    Raises:
        InputError: a crystal has other atoms, or their order cannot be determined.
    """
    offsets, counts = store.atom_offsets, np.asarray(table.counts)[table_rows]
    own = offsets[rows + 1] - offsets[rows]  # (R,)
    _refuse(own != counts, "other numbers of atoms", table, store, rows)
    places = ranges(offsets[rows], own)  # (N,)
    numbers = store.atomic_numbers[places]
    theirs = table.atoms(table_rows)
    good = numbers == theirs.numbers
    trusted = 0
    if theirs.frac_coords is not None:
        frac = store.frac_coords[places].astype(np.float64)  # (N, 3)
        cells = store.cells[rows].astype(np.float64)  # (R, 3, 3)
        cell = np.repeat(cells, own, axis=0)  # (N, 3, 3)
        good &= _apart(frac, theirs.frac_coords, cell) < SAME_PLACE
    owner = np.repeat(np.arange(len(rows)), own)  # (N,)
    suspect = np.unique(owner[~good])
    first = np.cumsum(own) - own
    order = ranges(np.zeros_like(own), own)  # (N,), as they are
    lost = np.zeros(len(rows), dtype=bool)
    for k in suspect:
        part = slice(first[k], first[k] + own[k])
        found = _pair(numbers[part], theirs.numbers[part])
        if theirs.frac_coords is not None:
            found &= (
                _apart(frac[part][:, None], theirs.frac_coords[part], cells[k])
                < SAME_PLACE
            )
        # One atom of the table for each of the store, and the other way round.
        if (found.sum(axis=0) == 1).all() and (found.sum(axis=1) == 1).all():
            order[part] = found.argmax(axis=1)
        else:
            lost[k] = True
    if theirs.frac_coords is None:
        what = "other elements, or another order of atoms,"
        mend = "write `frac_coords` into the table, by which atoms are recognised"
        _refuse(lost, what, table, store, rows, mend)
        several = _with_repeats(owner, numbers, len(rows))
        several[suspect] = False
        trusted = int(several.sum())
    else:
        _refuse(lost, "atoms at other places", table, store, rows)
    return Match(order, len(suspect), trusted)


def _apart(a: np.ndarray, b: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Return distances modulo the lattice, in Å; only small ones are exact."""
    delta = a - b
    delta -= np.round(delta)
    return np.linalg.norm(np.einsum("...a,...ab->...b", delta, cell), axis=-1)


def _pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return for all pairs whether `a` equals `b`, (a, b)."""
    return a[:, None] == b


def _with_repeats(owner: np.ndarray, numbers: np.ndarray, crystals: int) -> np.ndarray:
    """Return which crystals have several atoms of an element."""
    key = np.unique(owner * 256 + numbers.astype(np.int64))
    kinds = np.bincount(key // 256, minlength=crystals)
    return kinds < np.bincount(owner, minlength=crystals)


def _refuse(
    wrong: np.ndarray,
    what: str,
    table: Table,
    store: Store,
    rows: np.ndarray,
    mend: str = "",
) -> None:
    """Refuse crystals that differ between table and store."""
    if not wrong.any():
        return
    count = int(wrong.sum())
    names = [store.material_ids[rows[k]] for k in np.flatnonzero(wrong)[:3]]
    advice = mend or f"make the table from the structures of {store.path}"
    raise InputError(
        f"{count:,} of {len(rows):,} crystals of {table.path} have {what} than those "
        f"of {store.path} ({_some(names, count)}); {advice}"
    )


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (", ..." if count > len(names) else "")
