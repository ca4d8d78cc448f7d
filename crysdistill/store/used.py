"""The crystals of a store that a run learned from, in few bytes.

Weights carry them, so that a later run on the same store knows which of its test
crystals they have seen, and of which they know the labels.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from crysdistill.errors import InputError


class Named(Protocol):
    """A store, or another collection of crystals."""

    @property
    def structures_hash(self) -> str:
        """A SHA-256 of names, species, cells and coordinates."""

    def __len__(self) -> int:
        """Return the number of crystals."""


class Labelled(Named, Protocol):
    """A store with labels."""

    def property(self, name: str) -> np.ndarray:
        """Return the labels of all crystals, (B,), NaN where not known."""


@dataclass(frozen=True)
class Used:
    """Some crystals of one store.

    Args:
        store: the `structures_hash` of the store.
        labels: whether their labels were learned too.
        rows: one bit for each crystal of the store, packed as text.
        target: the property of these labels; "" if there are none, or if it was not
            recorded.
        corpus: whether they belong to a corpus, so that the checks in the weights are
            about them too.
    """

    store: str
    labels: bool
    rows: str
    target: str = ""
    corpus: bool = True

    @classmethod
    def of(
        cls,
        store: Named,
        rows: np.ndarray,
        labels: bool,
        target: str = "",
        corpus: bool = True,
    ) -> Used:
        """Return the crystals in some rows of a store."""
        chosen = np.zeros(len(store), bool)
        chosen[rows] = True
        data = zlib.compress(np.packbits(chosen).tobytes(), 9)
        packed = base64.b64encode(data).decode("ascii")
        return cls(store.structures_hash, labels, packed, target, corpus)

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows of the store are among them, (n,) bool.

        Raises:
            InputError: the text is damaged.
        """
        try:
            data = zlib.decompress(base64.b64decode(self.rows, validate=True))
            chosen = np.unpackbits(np.frombuffer(data, np.uint8))
            return chosen[rows].astype(bool)
        except (binascii.Error, zlib.error, ValueError, IndexError):
            raise InputError(
                "the rows that the weights learned from are damaged; copy or write the "
                "file again"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


UNKNOWN = Used("", True, "")
"""Stands for crystals, perhaps with labels, that nobody has recorded."""


def used_rows(
    store: Labelled, rows: np.ndarray, targets: Iterable[str], corpus: bool
) -> tuple[Used, ...]:
    """Return the crystals of a run by the labels that they have.

    Args:
        store: the store.
        rows: of the crystals that the run learned from or chose by.
        targets: the properties whose labels it read.
        corpus: whether these crystals are a corpus.
    """
    found, rest = [], np.ones(len(rows), bool)
    for target in targets:
        known = ~np.isnan(store.property(target)[rows])
        rest &= ~known
        if known.any():
            found.append(Used.of(store, rows[known], True, target, corpus))
    if rest.any():
        found.append(Used.of(store, rows[rest], False, corpus=corpus))
    return tuple(found)


def read_used(values: Iterable[Used | Mapping[str, Any]]) -> tuple[Used, ...]:
    """Return the entries of a weights file."""
    return tuple(one if isinstance(one, Used) else Used(**one) for one in values)


def join_used(parts: Iterable[tuple[Used, ...]]) -> tuple[Used, ...]:
    """Return the entries of all parts, each once."""
    return tuple(dict.fromkeys(chain.from_iterable(parts)))
