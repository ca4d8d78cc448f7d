"""Targets: coordination numbers, bond lengths and bond valences of an atom."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from crysdistill.graphs.batch import (
    gather_centres,
    gather_neighbours,
    sum_over_neighbours,
)
from crysdistill.objectives.targets.elements import property_table
from crysdistill.objectives.targets.family import Column, Family, signed_root
from crysdistill.objectives.targets.surroundings import Surroundings
from crysdistill.structures.elements import symbols

__all__ = ["REACHES", "Coordination", "bond_valence_table"]

REACHES = (1.1, 1.25, 1.45)
"""How far neighbours are counted, in sums of covalent radii."""

_SOFTNESS = 0.05  # of these counts, in the same unit
_DECAY = 0.31  # Å, of bond valences; pymatgen's value for its parameters


def bond_valence_table() -> Tensor:
    """Return the length of a bond of valence 1, (101, 101) in Å; NaN where unknown.

    R_ij = r_i + r_j - r_i r_j (sqrt(c_i) - sqrt(c_j))^2 / (c_i r_i + c_j r_j).

    Source: M. O'Keeffe and N. E. Brese, J. Am. Chem. Soc. 113, 3226 (1991),
    doi:10.1021/ja00009a002, Eq. 3, with pymatgen's values of its parameters.
    """
    from pymatgen.analysis.bond_valence import BV_PARAMS

    known = {element.symbol: row for element, row in BV_PARAMS.items()}
    unknown = {"r": torch.nan, "c": torch.nan}
    rows = [known.get(symbol, unknown) for symbol in symbols()]
    r = torch.tensor([row["r"] for row in rows], dtype=torch.float64)  # (101,)
    c = torch.tensor([row["c"] for row in rows], dtype=torch.float64)
    apart = (c.sqrt()[:, None] - c.sqrt()).square()  # (101, 101)
    cr = c * r
    return (r[:, None] + r - r[:, None] * r * apart / (cr[:, None] + cr)).float()


class Coordination(Family):
    """Coordination numbers, bond lengths, differences of electronegativity, valences.

    Counts are smooth: a neighbour at d counts 1 / (1 + exp((d / R - c) / 0.05)), where
    R is the sum of both covalent radii and c one of `REACHES`. The effective
    coordination number and the means over bonds weigh neighbours by
    `Surroundings.bonds`. Bond valences are exp((R_ij - d) / 0.31 Å), with a plus sign
    if the neighbour is more electronegative; `signed_root` compresses their sums. A
    target is not finite if a radius, an electronegativity or a bond valence parameter
    that it needs is unknown. Only neighbours in the graph count.

    Sources: see `Surroundings.bonds`, `bond_valence_table` and
    `crysdistill.objectives.targets.elements.PROPERTIES`.

    Differs from the sources: atomic radii are refitted, and bond valences decay over
    0.31 Å instead of 0.37, both as in pymatgen.
    """

    name: ClassVar[str] = "coordination"
    level: ClassVar[Literal["atoms", "crystals"]] = "atoms"

    facts: Tensor
    unit_valence: Tensor
    reaches: Tensor

    def __init__(self) -> None:
        super().__init__()
        buffers = {
            "facts": property_table(["covalent_radius", "electronegativity"]),
            "unit_valence": bond_valence_table(),
            "reaches": torch.tensor(REACHES),
        }
        for name, table in buffers.items():
            self.register_buffer(name, table, persistent=False)
        self.columns = (
            *(Column(f"neighbours within {c} radii") for c in REACHES),
            Column("effective coordination number"),
            Column("nearest distance", "Å"),
            Column("nearest distance over sum of radii"),
            Column("mean bond length", "Å"),
            Column("deviation of bond lengths", "Å"),
            Column("mean difference of electronegativity", "Pauling"),
            Column("mean absolute difference of electronegativity", "Pauling"),
            Column("compressed bond valence sum"),
            Column("compressed signed bond valence sum"),
        )

    def compute(self, seen: Surroundings) -> Tensor:
        """Return the twelve numbers of every atom, (N, 12)."""
        batch, lengths, weights = seen.batch, seen.lengths, seen.bonds
        of_atoms = seen.of_atoms(self.facts)  # (N, 2)
        theirs = gather_neighbours(of_atoms, batch)  # (E, 2)
        own = gather_centres(of_atoms, batch)
        relative = lengths / (theirs + own)[:, 0]  # (E,)
        differ = (theirs - own)[:, 1]  # (E,)
        counts = torch.sigmoid((self.reaches - relative[:, None]) / _SOFTNESS)  # (E, 3)
        neighbour, centre = seen.elements
        unit = self.unit_valence.flatten().index_select(0, 101 * neighbour + centre)
        valence = torch.exp((unit - lengths) / _DECAY)  # (E,)
        over_bonds = torch.stack((lengths, differ, differ.abs()), dim=1)  # (E, 3)
        valences = torch.stack((valence, valence * differ.sign()), dim=1)  # (E, 2)
        each = torch.cat((counts, weights[:, None] * over_bonds, valences), dim=1)
        counted, summed, valences = sum_over_neighbours(each, batch).split(
            [3, 3, 2], dim=1
        )
        number = seen.coordination
        mean, towards, apart = (summed / number[:, None]).unbind(1)  # (N,) each
        # Squares about the mean: a difference of squares would be lost in rounding.
        off = weights * (lengths - mean.index_select(0, batch.edge_index[1])).square()
        spread = (sum_over_neighbours(off, batch) / number).sqrt()
        closest = seen.least(relative)
        facts = (number, seen.nearest, closest, mean, spread, towards, apart)
        bonds = torch.stack(facts, dim=1)  # (N, 7)
        return torch.cat((counted, bonds, signed_root(valences)), dim=1)
