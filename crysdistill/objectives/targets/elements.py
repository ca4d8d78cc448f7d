"""Properties of the elements from pymatgen; NaN where pymatgen has none."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from crysdistill.structures.elements import MAX_ATOMIC_NUMBER

if TYPE_CHECKING:
    from pymatgen.core import Element

__all__ = ["PROPERTIES", "Property", "property_table", "standard_table", "valence"]

_CAPACITY = {"s": 2, "p": 6, "d": 10, "f": 14}


class Property(NamedTuple):
    """A numerical property of the elements.

    Args:
        unit: empty for a pure number.
        read: maps an element to its number.
    """

    unit: str
    read: Callable[[Element], float | None]


def valence(element: Element) -> dict[str, int]:
    """Return the electrons outside the noble-gas core by orbital: s, p, d, f."""
    found = dict.fromkeys(_CAPACITY, 0)
    text = element.electronic_structure.rpartition("]")[2]  # [Ar].3d6.4s2
    for orbital, electrons in re.findall(r"\d([spdf])(\d+)", text):
        found[orbital] += int(electrons)
    return found


def _unpaired(element: Element) -> float:
    """Return the unpaired electrons of the free atom, by Hund's first rule."""
    filled = valence(element)
    return sum(min(n, _CAPACITY[o] - n) for o, n in filled.items() if n)


def _covalent_radius(element: Element) -> float | None:
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius

    return CovalentRadius.radius.get(element.symbol)


PROPERTIES: dict[str, Property] = {
    "period": Property("", lambda e: e.row),
    "group": Property("", lambda e: e.group),
    "mendeleev_number": Property("", lambda e: e.mendeleev_no),
    "log_mass": Property("ln u", lambda e: math.log(e.atomic_mass)),
    "electronegativity": Property("Pauling", lambda e: e.X),
    "ionization_energy": Property("eV", lambda e: e.ionization_energy),
    "electron_affinity": Property("eV", lambda e: e.electron_affinity),
    "covalent_radius": Property("Å", _covalent_radius),
    "van_der_waals_radius": Property("Å", lambda e: e.van_der_waals_radius),
    "melting_point": Property("K", lambda e: e.melting_point),
    "s_electrons": Property("", lambda e: valence(e)["s"]),
    "p_electrons": Property("", lambda e: valence(e)["p"]),
    "d_electrons": Property("", lambda e: valence(e)["d"]),
    "f_electrons": Property("", lambda e: valence(e)["f"]),
    "unpaired_electrons": Property("", _unpaired),
    "mass": Property("u", lambda e: e.atomic_mass),
}
"""The properties in the tables, by name.

Sources: pymatgen, S. P. Ong et al., Comput. Mater. Sci. 68, 314 (2013),
doi:10.1016/j.commatsci.2012.10.028; covalent radii, B. Cordero et al., Dalton Trans.
2832 (2008), doi:10.1039/b801115j; Mendeleev numbers, D. G. Pettifor, Solid State
Commun. 51, 31 (1984), doi:10.1016/0038-1098(84)90765-8. Electrons are those outside
the noble-gas core.
"""


@cache
def _read(name: str) -> tuple[float, ...]:
    """Return a property by atomic number; NaN where unknown, and for "no element"."""
    from pymatgen.core import Element

    found = [math.nan]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: helium has no electronegativity
        for number in range(1, MAX_ATOMIC_NUMBER + 1):
            value = PROPERTIES[name].read(Element.from_Z(number))
            found.append(math.nan if value is None else float(value))
    return tuple(found)


def property_table(names: Sequence[str]) -> Tensor:
    """Return properties by atomic number, (101, P) float32; NaN where unknown."""
    return torch.tensor([_read(name) for name in names]).T.contiguous()


def standard_table(names: Sequence[str]) -> Tensor:
    """Return the same, standardised over the elements with a known value."""
    table = property_table(names).double()  # (101, P)
    mean = table.nanmean(dim=0)
    deviation = (table - mean).square().nanmean(dim=0).sqrt()
    return ((table - mean) / deviation).float()
