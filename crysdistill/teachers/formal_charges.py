"""Formal charges of the elements of a crystal, from its composition."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np

from crysdistill.store.fingerprints import compositions

Formula = tuple[tuple[int, int], ...]
"""Atomic numbers and counts of a reduced formula, by atomic number."""

_MOST = 100_000  # formulas whose charges are remembered


def formulas_of(atom_offsets: np.ndarray, atomic_numbers: np.ndarray) -> list[Formula]:
    """Return the reduced formulas of many crystals, which are the same for any cell.

    Args:
        atom_offsets: (B + 1,) first atom of each crystal.
        atomic_numbers: (N,) those of all crystals.
    """
    offsets, species, amounts = compositions(atom_offsets, atomic_numbers)
    pairs = list(zip(species.tolist(), amounts.tolist(), strict=True))
    return [
        tuple(sorted(pairs[first:end]))
        for first, end in itertools.pairwise(offsets.tolist())
    ]


@lru_cache(maxsize=_MOST)
def formal_charges(formula: Formula) -> Mapping[int, float] | None:
    """Return the most likely charge in e of each element; None if there is none.

    Each atom has one of its element's usual oxidation states, and the charges of all
    atoms add up to 0. Of all such choices the most likely one has the largest sum over
    atoms of how often the ICSD has that state of that element. If it has atoms of one
    element in different states, as in Fe3O4, all of them get their mean, because the
    composition does not say which atom has which state.

    There is none in a crystal of one element, in most alloys, with an element that has
    no oxidation states, such as helium, and where only several formula units together
    are neutral, as in SbO2.

    The states, the counts and the rule are those of `Composition.oxi_state_guesses` in
    pymatgen. That function lists all choices, which takes minutes for a long formula;
    here the best sums are joined atom by atom, in milliseconds.

    Args:
        formula: as `formulas_of` returns it.
    """
    if len(formula) < 2:
        return None
    # By total charge: how often, minus the squares of the charges, the elements' sums.
    # The second and third break ties, whatever the order of the atoms.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for element, count in formula:
        longer: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for total, (often, squares, sums) in best.items():
            for more, (its, its_squares) in _sums(element, count).items():
                found = (often + its, squares + its_squares, (*sums, more))
                known = longer.get(total + more)
                if known is None or found > known:
                    longer[total + more] = found
        best = longer
    if 0 not in best:
        return None
    return {
        element: total / count
        for (element, count), total in zip(formula, best[0][2], strict=True)
    }


@lru_cache(maxsize=_MOST)
def _sums(element: int, count: int) -> dict[int, tuple[int, int]]:
    """Return the best choice for each total charge of some atoms of an element."""
    best = {0: (0, 0)}
    for _ in range(count):
        longer: dict[int, tuple[int, int]] = {}
        for total, (often, squares) in best.items():
            for charge, number in _states(element).items():
                found = (often + number, squares - charge * charge)
                known = longer.get(total + charge)
                if known is None or found > known:
                    longer[total + charge] = found
        best = longer
    return best


@cache
def _states(element: int) -> dict[int, int]:
    """Return the usual oxidation states, and how often the ICSD has each."""
    from pymatgen.core import Element

    found = Element.from_Z(element)
    usual = found.icsd_oxidation_states or found.common_oxidation_states
    return {charge: _occurrences().get((found.symbol, charge), 0) for charge in usual}


@cache
def _occurrences() -> dict[tuple[str, float], int]:
    """Return how often the ICSD has each oxidation state, as pymatgen counts them."""
    from pymatgen.core import Composition

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Composition("NaCl").oxi_state_guesses()  # it reads its table on first use
    table = Composition.oxi_prob or {}
    return {(one.symbol, one.oxi_state): count for one, count in table.items()}
