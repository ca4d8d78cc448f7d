"""Targets: how much charge an atom gives to its neighbours."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.graphs.batch import (
    gather_centres,
    gather_crystals,
    gather_neighbours,
    mean_over_atoms,
    sum_over_neighbours,
)
from crysdistill.objectives.targets.elements import property_table
from crysdistill.objectives.targets.family import Column, Family
from crysdistill.objectives.targets.surroundings import Surroundings

__all__ = ["Charges"]

_ROUNDS = 4
_COULOMB = 14.399645  # eV Å, of two unit charges
_SCREENING = 3.0  # Å


class Charges(Family):
    """Partial charges by electronegativity equalisation along bonds.

    An atom attracts electrons by chi_i(q) = (I + A) / 2 + (I - A) q, where I is the
    ionisation energy and A the electron affinity. There are four rounds, each half as
    strong as the one before. In each, dq_i = sum_j w_ij (chi_j - chi_i) / (I - A of the
    donor) / CN_i moves along bonds, with weights from `Surroundings.bonds`; CN_i is the
    sum of the weights. At the end all atoms give up an equal part of the crystal's
    excess charge. Besides the charge there is the potential of the neighbours' charges,
    screened over 3 Å. Only neighbours in the graph count.

    Source: J. Gasteiger and M. Marsili, Tetrahedron 36, 3219 (1980),
    doi:10.1016/0040-4020(80)80168-2, Eqs. 7-9.

    Differs from the paper: electronegativities are Mulliken's and linear in the charge,
    and do not refer to hybrid orbitals; bonds have weights.
    """

    name: ClassVar[str] = "charges"
    level: ClassVar[Literal["atoms", "crystals"]] = "atoms"

    energies: Tensor

    def __init__(self) -> None:
        super().__init__()
        table = property_table(["ionization_energy", "electron_affinity"])  # (101, 2)
        self.register_buffer("energies", table, persistent=False)
        self.columns = (
            Column("charge", "e"),
            Column("mean charge of bonded neighbours", "e"),
            Column("screened potential of the neighbours", "eV"),
        )

    def compute(self, seen: Surroundings) -> Tensor:
        """Return charge, neighbours' charge and potential of every atom, (N, 3)."""
        batch, lengths = seen.batch, seen.lengths
        weights = seen.bonds / gather_centres(seen.coordination, batch)  # (E,)
        ionization, affinity = seen.of_atoms(self.energies).unbind(1)  # (N,) each
        middle, slope = (ionization + affinity) / 2, ionization - affinity
        slopes = gather_neighbours(slope, batch), gather_centres(slope, batch)
        charge = torch.zeros_like(middle)
        for turn in range(_ROUNDS):
            pull = middle + slope * charge  # (N,) eV
            step = gather_neighbours(pull, batch) - gather_centres(pull, batch)
            # The donor is the less electronegative atom.
            giver = torch.where(step > 0, slopes[1], slopes[0])  # (E,)
            moved = sum_over_neighbours(weights * step / giver, batch)  # (N,)
            charge = charge + 0.5 ** (turn + 1) * moved
        excess = mean_over_atoms(charge.unsqueeze(1), batch)  # (B, 1)
        charge = charge - gather_crystals(excess, batch).squeeze(1)
        theirs = gather_neighbours(charge, batch)  # (E,)
        potential = _COULOMB * torch.exp(-lengths / _SCREENING) / lengths
        sums = torch.stack((weights * theirs, potential * theirs), dim=1)  # (E, 2)
        return torch.cat((charge.unsqueeze(1), sum_over_neighbours(sums, batch)), dim=1)
