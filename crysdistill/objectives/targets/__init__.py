"""Families of targets that follow from a crystal and need no labels."""

from __future__ import annotations

from crysdistill.objectives.targets.angular import Angular
from crysdistill.objectives.targets.charges import Charges
from crysdistill.objectives.targets.coordination import Coordination
from crysdistill.objectives.targets.crystal import Crystal
from crysdistill.objectives.targets.densities import Densities
from crysdistill.objectives.targets.family import Column, Family
from crysdistill.objectives.targets.orbitals import Orbitals
from crysdistill.objectives.targets.radial import Radial

FAMILIES: dict[str, type[Family]] = {
    "radial": Radial,
    "angular": Angular,
    "coordination": Coordination,
    "orbitals": Orbitals,
    "densities": Densities,
    "charges": Charges,
    "crystal": Crystal,
}
"""Families by the name that configurations use; those of atoms come first."""

__all__ = ["FAMILIES", "Column", "Family"]
