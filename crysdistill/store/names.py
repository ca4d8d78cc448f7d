"""The names of a store's crystals, decoded on demand."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """A list of strings that stays in the file.

    In every process, a hundred thousand Python strings take a hundred times the memory
    of a mapped column of bytes.

    Args:
        text: all names one after the other, UTF-8 in uint8.
        ends: the start of each name, and the length of `text`; (names + 1,) int64.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self._text = text
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        number = operator.index(row)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"no name {row}: there are {len(self)}")
        return (
            self._text[self._ends[number] : self._ends[number + 1]].tobytes().decode()
        )

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            ends = self._ends[start : start + _AT_ONCE + 1].tolist()
            text = self._text[ends[0] : ends[-1]].tobytes()
            for first, last in pairwise(ends):
                yield text[first - ends[0] : last - ends[0]].decode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Names, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 3 else ""
        return f"Names([{', '.join(map(repr, self[:3]))}{more}], {len(self)} in all)"


_AT_ONCE = 4096
"""Names whose text is read at once when iterating."""
