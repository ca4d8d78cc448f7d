"""Filters refuse sound crystals that a store should not hold, and are counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.neighbors import Neighbors
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import atomic_numbers_by_symbol, symbols

FILTERED = "filtered: "
"""The beginning of the reason when a filter refuses a crystal."""


@dataclass(frozen=True)
class Filters:
    """Limits for the crystals of a store; None sets no limit.

    Args:
        max_atoms: atoms in the cell.
        max_volume: Å³ per atom; molecules and layers in a vacuum have more than 60.
        min_distance: Å, between any two atoms.
        elements: symbols; crystals with any other element are refused.
        without: symbols; crystals with one of them are refused.

    Raises:
        InputError: a limit is not positive, or a symbol is no element.
    """

    max_atoms: int | None = None
    max_volume: float | None = None
    min_distance: float | None = None
    elements: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_atoms", "max_volume", "min_distance"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise InputError(f"`{name}` is {limit} but must be positive")
        known = atomic_numbers_by_symbol()
        for symbol in (*(self.elements or ()), *self.without):
            if symbol not in known:
                meant = did_you_mean(symbol.capitalize(), known)
                raise InputError(
                    f"`{symbol}` is no element{meant}; write symbols such as `Si,O`"
                )

    @cached_property
    def _refused_elements(self) -> np.ndarray:
        """(101,) whether an atomic number is refused."""
        numbers = atomic_numbers_by_symbol()
        refused = np.zeros(len(symbols()), bool)
        if self.elements is not None:
            refused[:] = True
            refused[[numbers[symbol] for symbol in self.elements]] = False
        refused[[numbers[symbol] for symbol in self.without]] = True
        return refused

    def before_graph(self, crystal: Crystal) -> str | None:
        """Return the reason to refuse a crystal by composition or size, or None.

        These tests come before the search for neighbours, which costs more.
        """
        atoms = len(crystal.atomic_numbers)
        if self.max_atoms is not None and atoms > self.max_atoms:
            return f"{FILTERED}{atoms} atoms, more than `max_atoms` {self.max_atoms}"
        volume = crystal.volume / atoms
        if self.max_volume is not None and volume > self.max_volume:
            return (
                f"{FILTERED}{volume:.1f} Å³ per atom, more than `max_volume` "
                f"{self.max_volume:g}"
            )
        refused = crystal.atomic_numbers[self._refused_elements[crystal.atomic_numbers]]
        if len(refused):
            symbol = symbols()[int(refused[0])]
            where = "in `without`" if symbol in self.without else "not in `elements`"
            return f"{FILTERED}{symbol} is {where}"
        return None

    def after_graph(self, graph: Neighbors) -> str | None:
        """Return the reason to refuse a crystal by its distances, or None."""
        if self.min_distance is None:
            return None
        shortest = float(graph.distances.min())
        if shortest >= self.min_distance:
            return None
        return (
            f"{FILTERED}two atoms {shortest:.2f} Å apart, less than `min_distance` "
            f"{self.min_distance:g}"
        )


def count_filtered(reasons: Iterable[str]) -> dict[str, int]:
    """Count the refusals of each filter, the most frequent first.

    Args:
        reasons: the reasons of all refused entries; only those of filters count.
    """
    found = (re.search(r"`(\w+)`", r) for r in reasons if r.startswith(FILTERED))
    return dict(Counter(match[1] for match in found if match).most_common())
