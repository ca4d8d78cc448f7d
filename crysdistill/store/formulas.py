"""The formulas of a corpus in few bytes: how much any dataset can share with it.

Weights carry them, so that a dataset can be compared with a corpus that is not at hand.
All cells of a crystal have one reduced formula, whatever their size, setting, origin,
strain and order of atoms. So a crystal whose formula no crystal of the corpus has is
not in the corpus: that is proof. (Entries that share an id but not a formula are not
one crystal.) One whose formula the corpus has may be in it, or may be a polymorph.
Space groups would set some polymorphs apart, but they depend on tolerances, so a
missing one would prove nothing.

A formula is kept as a hash of four bytes. A formula that is not among n others has the
hash of one of them with a probability of n / 2^32, 1.4e-5 for 60,000. Its crystals are
then counted as if the corpus had the formula, so the count stays an upper bound.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np

from crysdistill.errors import InputError
from crysdistill.store.fingerprints import compositions

_DAMAGED = "the formulas of its corpus are damaged; copy or write the file again"


class Composed(Protocol):
    """Many crystals of which at least the atoms are known."""

    @property
    def atom_offsets(self) -> np.ndarray:
        """(B + 1,) first atom of each crystal."""

    @property
    def atomic_numbers(self) -> np.ndarray:
        """(N,) uint8, those of all crystals."""


@dataclass(frozen=True)
class Formulas:
    """The reduced formulas of some crystals, as hashes; by default those of none.

    Args:
        hashes: four bytes each, little-endian, sorted and distinct.
    """

    hashes: bytes = b""

    @classmethod
    def of(cls, crystals: Composed, rows: np.ndarray | None = None) -> Formulas:
        """Return the formulas of crystals.

        Args:
            crystals: a store or another collection.
            rows: of the crystals that count; all if None.
        """
        found = _hashes(crystals)
        return cls._of_numbers(found if rows is None else found[rows])

    @classmethod
    def _of_numbers(cls, numbers: np.ndarray) -> Formulas:
        return cls(np.unique(numbers).astype("<u4").tobytes())

    @property
    def _numbers(self) -> np.ndarray:
        return np.frombuffer(self.hashes, "<u4")

    def __len__(self) -> int:
        return len(self.hashes) // 4

    def __or__(self, other: Formulas) -> Formulas:
        """Return the formulas of both."""
        return self._of_numbers(np.concatenate([self._numbers, other._numbers]))

    def has(self, crystals: Composed) -> np.ndarray:
        """Return which crystals have one of these formulas, (B,) bool."""
        return np.isin(_hashes(crystals), self._numbers)

    def packed(self) -> str:
        """Return them as text, about three bytes a formula.

        The differences of the sorted hashes are small: their first byte is zero and
        their second byte has few values. Bytes of one place stand together, so that
        zlib can use this.
        """
        steps = np.diff(self._numbers.astype(np.int64), prepend=0).astype("<u4")
        places = steps.view(np.uint8).reshape(-1, 4).T  # (4, n)
        return base64.b64encode(zlib.compress(places.tobytes(), 9)).decode("ascii")

    @classmethod
    def unpacked(cls, text: str) -> Formulas:
        """Return what `packed` wrote.

        Raises:
            InputError: the text is damaged.
        """
        try:
            data = zlib.decompress(base64.b64decode(text, validate=True))
            places = np.frombuffer(data, np.uint8).reshape(4, -1)
        except (binascii.Error, zlib.error, ValueError, TypeError):
            raise InputError(_DAMAGED) from None
        steps = np.ascontiguousarray(places.T).view("<u4").ravel()
        numbers = np.cumsum(steps, dtype=np.int64)
        if len(steps) and (numbers[-1] >= 1 << 32 or not steps[1:].all()):
            raise InputError(_DAMAGED)
        return cls(numbers.astype("<u4").tobytes())


def join_formulas(parts: Iterable[Formulas | None]) -> Formulas | None:
    """Return the formulas of all parts; None if those of one part are not known."""
    known = list(parts)
    some = [one for one in known if one is not None]
    return (
        reduce(Formulas.__or__, some, Formulas()) if len(some) == len(known) else None
    )


def _hashes(crystals: Composed) -> np.ndarray:
    """Return the hash of each crystal's reduced formula, (B,) uint32.

    It is BLAKE2b of the atomic number and amount of each species, as little-endian
    integers of four bytes, by rising amount, then by atomic number.
    """
    offsets, species, amounts = compositions(
        np.asarray(crystals.atom_offsets), np.asarray(crystals.atomic_numbers)
    )
    data = np.stack([species, amounts], axis=1).astype("<u4").tobytes()
    known: dict[bytes, int] = {}
    found = np.empty(len(offsets) - 1, np.uint32)
    for row, (start, end) in enumerate(itertools.pairwise((8 * offsets).tolist())):
        text = data[start:end]
        if text not in known:
            digest = hashlib.blake2b(text, digest_size=4).digest()
            known[text] = int.from_bytes(digest, "little")
        found[row] = known[text]
    return found
