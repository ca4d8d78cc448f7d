"""Targets: which valence orbitals surround an atom."""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.graphs.batch import sum_over_neighbours
from crysdistill.objectives.targets.elements import valence
from crysdistill.objectives.targets.family import Column, Family
from crysdistill.objectives.targets.surroundings import Surroundings

__all__ = ["OCCUPATIONS", "Orbitals", "occupation_table"]

OCCUPATIONS = tuple(
    f"{orbital}{electrons}"
    for orbital, capacity in (("s", 2), ("p", 6), ("d", 10), ("f", 14))
    for electrons in range(1, capacity + 1)
)
"""The 32 occupations in an orbital-field matrix: s1, s2, p1, ... f14."""


def occupation_table() -> Tensor:
    """Return each element's occupations outside the noble-gas core, (101, 32)."""
    from pymatgen.core import Element

    table = torch.zeros(101, len(OCCUPATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(1, 101):
            for orbital, electrons in valence(Element.from_Z(number)).items():
                if electrons:
                    place = OCCUPATIONS.index(f"{orbital}{electrons}")
                    table[number, place] = 1.0
    return table


class Orbitals(Family):
    """An atom's row of the orbital-field matrix, as roots.

    The targets are the roots of the numbers of neighbours with one, two, ... electrons
    in their s, p, d and f orbitals. `Surroundings.bonds` weighs the neighbours. Pure
    numbers. Only neighbours in the graph count.

    Source: T. Lam Pham et al., Sci. Technol. Adv. Mater. 18, 756 (2017),
    doi:10.1080/14686996.2017.1378060.

    Differs from the paper: Hoppe's weights replace solid angles; targets are roots.
    """

    name: ClassVar[str] = "orbitals"
    level: ClassVar[Literal["atoms", "crystals"]] = "atoms"

    occupations: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("occupations", occupation_table(), persistent=False)
        self.columns = tuple(Column(f"{o} neighbours") for o in OCCUPATIONS)

    def compute(self, seen: Surroundings) -> Tensor:
        """Return the roots of the counts, (N, 32)."""
        having = seen.bonds[:, None] * seen.of_neighbours(self.occupations)  # (E, 32)
        return sum_over_neighbours(having, seen.batch).sqrt()
