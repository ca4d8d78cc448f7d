"""Structure types, and the ways to put the metals of EMT on their sites.

The structures are prototypes of the AFLOW library, as pymatgen bundles them. Two
descriptions of one structure count as one prototype.

Sources: M. J. Mehl et al., Comput. Mater. Sci. 136, S1 (2017),
doi:10.1016/j.commatsci.2017.01.017, and D. Hicks et al., Comput. Mater. Sci. 161, S1
(2019), doi:10.1016/j.commatsci.2018.10.043.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from crysdistill.demo.emt import (
    METALS,
    atomic_volumes,
    log_expansion,
    periodic_neighbours,
    radius,
)
from crysdistill.structures.elements import atomic_numbers_by_symbol

MAX_EXPANSION = 2.0
"""A prototype is left out if the metal needs more than this many times its close-packed
volume: molecular crystals and networks such as quartz are no alloys."""

MIN_CONTACT = 0.75
"""A decoration is left out if two atoms are closer than this share of the sum of their
metallic radii."""

# Two descriptions of one structure have pair functions that differ by at most 0.07
# (relative root mean square), and the long polytypes 6H and 9R differ from zincblende
# and wurtzite by 0.10-0.12, for EMT by less than 1 meV/atom. Such a neighbour among
# the training crystals would spoil a test on unseen prototypes. Pairs that
# crystallography distinguishes begin at 0.14, such as the Laves phases C14 and C15.
_SAME_STRUCTURE = 0.12
_PAIR_GRID = np.arange(0.4, 2.6, 0.05)  # in units of (volume per atom)^(1/3)
_PAIR_WIDTH = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Prototype:
    """One structure type: sites of K kinds without elements.

    Args:
        name: the Strukturbericht symbol, else the AFLOW label.
        kinds: (N,) the kind of each site, one of K.
        frac_coords: (N, 3), wrapped into [0, 1).
        cell: (3, 3), rows are lattice vectors, scaled to one Å³ per atom.
        expansion: the equilibrium volume over the sum of the close-packed atomic
            volumes, when copper sits on all sites.
        contacts: (K, K) shortest distance between two kinds, for this cell.
        swaps: permutations of the kinds that give the same structure again.
    """

    name: str
    kinds: np.ndarray
    frac_coords: np.ndarray
    cell: np.ndarray
    expansion: float
    contacts: np.ndarray
    swaps: tuple[tuple[int, ...], ...]


@cache
def prototypes(max_atoms: int) -> tuple[Prototype, ...]:
    """Return the prototypes with 2-4 kinds of sites and at most `max_atoms` atoms.

    Simple prototypes come first, so a higher limit only adds to the end. If prototypes
    are nearly one structure, such as long polytypes, the first is kept.
    """
    found: list[Prototype] = []
    pairs: list[np.ndarray] = []
    for entry in _library_entries(max_atoms):
        kinds, frac_coords, cell = _sites(entry)
        contacts, pair = _pair_functions(kinds, frac_coords, cell)
        if any(_permutations_between(pair, other) for other in pairs):
            continue
        expansion = _expansion(frac_coords, cell)
        if expansion > MAX_EXPANSION:
            continue
        swaps = tuple(
            order
            for order in _permutations_between(pair, pair)
            if order != tuple(range(len(pair)))
        )
        pairs.append(pair)
        found.append(
            Prototype(
                _name(entry, {prototype.name for prototype in found}),
                kinds,
                frac_coords,
                cell,
                expansion,
                contacts,
                swaps,
            )
        )
    return tuple(found)


@cache
def decorations(prototype: Prototype) -> tuple[tuple[str, ...], ...]:
    """Return the elements for each kind of site, each distinct structure once."""
    per_kind = np.bincount(prototype.kinds)  # (K,)
    count = len(per_kind)
    chosen = np.array(list(itertools.permutations(range(len(METALS)), count)))  # (M, K)
    radii = np.array([radius(metal) for metal in METALS])[chosen]  # (M, K)
    volumes = np.array([atomic_volumes()[metal] for metal in METALS])[chosen]
    per_atom = prototype.expansion * (volumes @ per_kind) / per_kind.sum()  # (M,)
    distances = prototype.contacts * per_atom[:, None, None] ** (1 / 3)  # (M, K, K)
    touching = radii[:, :, None] + radii[:, None, :]  # (M, K, K)
    kept = np.min(distances / touching, axis=(1, 2)) >= MIN_CONTACT  # (M,)
    # If swaps turn decorations into each other, keep the first one.
    place = len(METALS) ** np.arange(count)[::-1]  # (K,)
    for order in prototype.swaps:
        kept &= chosen @ place <= chosen[:, order] @ place
    return tuple(tuple(METALS[k] for k in row) for row in chosen[kept].tolist())


def _library_entries(max_atoms: int) -> list[dict[str, Any]]:
    """Return the usable entries of pymatgen's AFLOW library, the simple ones first."""
    # Importing pymatgen.analysis.prototypes takes 3 s; its data file takes 0.02 s.
    path = resources.files("pymatgen.analysis") / "prototypes"
    packed = (path / "aflow_prototypes.json.gz").read_bytes()
    entries = [
        entry
        for entry in json.loads(gzip.decompress(packed))
        if len(entry["snl"]["sites"]) <= max_atoms
        and 2 <= len(set(_site_symbols(entry))) <= 4
    ]
    return sorted(
        entries,
        key=lambda entry: (
            len(entry["snl"]["sites"]),
            -int(entry["tags"]["aflow"].split("_")[2]),  # the space group
            entry["tags"]["aflow"],
            entry["tags"]["strukturbericht"],
        ),
    )


def _site_symbols(entry: dict[str, Any]) -> list[str]:
    return [site["species"][0]["element"] for site in entry["snl"]["sites"]]


def _name(entry: dict[str, Any], taken: set[str]) -> str:
    """Return a name without hyphens that no other prototype has."""
    tags = entry["tags"]
    names = [str(tags["aflow"])]
    if re.fullmatch(r"[A-Z]\d*(_\w+)?", tags["strukturbericht"]):
        names.insert(0, str(tags["strukturbericht"]))
    # AFLOW gives one label to structures that differ in free coordinates only.
    numbered = (f"{tags['aflow']}_v{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain(names, numbered) if name not in taken)


def _sites(entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return kinds (N,), fractional coordinates (N, 3) and the cell at 1 Å³/atom."""
    found = _site_symbols(entry)
    # AFLOW letters the kinds A, B, C ... in the alphabetical order of the elements.
    order = sorted(set(found))
    kinds = np.array([order.index(symbol) for symbol in found])  # (N,)
    coords = np.array([site["abc"] for site in entry["snl"]["sites"]])  # (N, 3)
    cell = np.array(entry["snl"]["lattice"]["matrix"])  # (3, 3)
    cell *= (len(kinds) / abs(np.linalg.det(cell))) ** (1 / 3)
    return kinds, np.round(coords, 8) % 1.0, cell


def _pair_functions(
    kinds: np.ndarray, frac_coords: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return shortest distances (K, K) and smoothed pair distances (K, K, grid).

    The pair functions are per atom of the crystal, so they depend neither on the choice
    of cell nor on the handedness.
    """
    reach = _PAIR_GRID[-1] + 4 * _PAIR_WIDTH
    centres, neighbours, _, distances = periodic_neighbours(
        frac_coords @ cell, cell, reach
    )
    a, b, count = kinds[centres], kinds[neighbours], kinds.max() + 1
    contacts = np.full((count, count), np.inf)
    np.minimum.at(contacts, (a, b), distances)
    pair = np.zeros((count, count, len(_PAIR_GRID)))
    offset = (_PAIR_GRID - distances[:, None]) / _PAIR_WIDTH  # (E, grid)
    np.add.at(pair, (a, b), np.exp(-0.5 * offset**2))
    return contacts, pair / len(kinds)


def _permutations_between(pair: np.ndarray, other: np.ndarray) -> list[tuple[int, ...]]:
    """Return the renamings of kinds that make `other` the same structure as `pair`."""
    if pair.shape != other.shape:
        return []
    found = []
    for order in itertools.permutations(range(len(pair))):
        renamed = other[np.ix_(order, order)]
        difference = np.sum((pair - renamed) ** 2)
        scale = 0.5 * np.sum(pair**2 + renamed**2)
        if difference < _SAME_STRUCTURE**2 * scale:
            found.append(order)
    return found


def _expansion(frac_coords: np.ndarray, cell: np.ndarray) -> float:
    """Return the volume of copper here divided by its close-packed volume."""
    volume = atomic_volumes()["Cu"]
    numbers = np.full(len(frac_coords), atomic_numbers_by_symbol()["Cu"])
    # Start at the equilibrium of a structure of medium packing.
    start = cell * (1.2 * volume) ** (1 / 3)
    x = log_expansion(numbers, frac_coords, start)
    # Nothing found means that the atoms never meet: infinitely roomy.
    return math.inf if x is None else round(1.2 * math.exp(x), 4)
