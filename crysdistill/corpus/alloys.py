"""A corpus of alloys that needs no download: real structure types, real physics.

The structures are prototypes of the AFLOW library, as pymatgen bundles them, whose
sites are decorated with the seven metals that effective-medium theory (EMT)
describes. EMT also gives their labels: the formation energy and the bulk modulus at
the equilibrium volume. All of it follows from a seed: the same crystals come out on
each machine, and a shorter list is the beginning of a longer one.

Sources: prototypes: M. J. Mehl et al., Comput. Mater. Sci. 136, S1 (2017),
doi:10.1016/j.commatsci.2017.01.017, and D. Hicks et al., Comput. Mater. Sci. 161, S1
(2019), doi:10.1016/j.commatsci.2018.10.043. EMT: K. W. Jacobsen, P. Stoltze and J. K.
Nørskov, Surf. Sci. 366, 394 (1996), doi:10.1016/0039-6028(96)00816-3, as in ASE.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.emt import EMT, parameters
from joblib import Parallel, delayed
from pymatgen.optimization.neighbors import find_points_in_spheres

from crysdistill.elements import atomic_numbers_by_symbol, symbols
from crysdistill.errors import InputError
from crysdistill.structures import Crystal

log = logging.getLogger(__name__)

METALS = ("Ag", "Al", "Au", "Cu", "Ni", "Pd", "Pt")
"""The elements that EMT describes well."""

PROPERTIES = {"formation_energy": "eV/atom", "bulk_modulus": "GPa"}
"""The labels and their units."""

MAX_EXPANSION = 2.0
"""A prototype is left out where the metal needs more than this many times its close-
packed volume: molecular crystals and networks such as quartz, no alloys."""

MIN_CONTACT = 0.75
"""A decoration is left out where two atoms are closer than this share of the sum of
their metallic radii."""

VOLUME_JITTER = 0.02
"""The volume varies evenly by up to this share, so that composition and prototype
alone do not give it away."""

# Two descriptions of one structure have pair functions that differ by at most 0.07
# (relative root mean square), and the long polytypes 6H and 9R differ from zincblende
# and wurtzite by 0.10-0.12, for EMT by less than 1 meV/atom. Such a neighbour among
# the training crystals would spoil a test on unseen prototypes. From 0.14 on come
# pairs that crystallography tells apart, such as the Laves phases C14 and C15.
_SAME_STRUCTURE = 0.12
_PAIR_GRID = np.arange(0.4, 2.6, 0.05)  # in units of (volume per atom)^(1/3)
_PAIR_WIDTH = 0.05

_PERIODIC = np.ones(3, dtype=np.int64)
_SAME_POINT = 1e-8  # Å; pymatgen's own tolerance for "this is the atom itself"


@dataclass(frozen=True, slots=True, eq=False)
class Prototype:
    """One structure type: sites of K kinds that wait for elements.

    Args:
        name: the Strukturbericht symbol, else the AFLOW label.
        kinds: (N,) which of the K kinds each site is.
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


def prototype_of(material_id: str) -> str:
    """Return the prototype's name from an id such as `A15-AlNi3-0123`.

    Raises:
        InputError: the id was not made here.
    """
    match = re.fullmatch(r"([^-]+)-[^-]+-\d+", material_id)
    if not match:
        raise InputError(
            f"`{material_id}` is no id of this corpus, such as `A15-AlNi3-0123`"
        )
    return match[1]


def alloy_corpus(count: int, seed: int, max_atoms: int = 16) -> list[Crystal]:
    """Return the first `count` alloys of the sequence that `seed` gives.

    The sequence goes round by round: each round takes one new decoration (2-4
    elements) of every prototype that has any left, in shuffled order. No structure
    comes twice, not even with its sites renamed. Cells are estimates: the atomic
    volumes of the metals, times the expansion of the prototype, times a jitter.

    Args:
        count: how many.
        seed: which sequence.
        max_atoms: prototypes with larger primitive cells are left out.

    Raises:
        InputError: an argument is out of range, or there are fewer decorations than
            `count`.
    """
    _at_least("count", count, 1)
    _at_least("max_atoms", max_atoms, 2)
    sequence = []
    for prototype in prototypes(max_atoms):
        decorations = sorted(
            (_digest(seed, prototype, elements), elements)
            for elements in _decorations(prototype)
        )
        sequence += [
            (turn, digest, prototype, elements)
            for turn, (digest, elements) in enumerate(decorations)
        ]
    if count > len(sequence):
        raise InputError(
            f"`count` is {count} but there are {len(sequence)} alloys of at most "
            f"{max_atoms} atoms; increase `max_atoms`"
        )
    sequence.sort(key=lambda entry: entry[:2])
    return [
        _decorate(prototype, elements, digest, serial)
        for serial, (_, digest, prototype, elements) in enumerate(sequence[:count])
    ]


def label_alloys(crystals: Sequence[Crystal], workers: int = 1) -> list[Crystal]:
    """Return the crystals at their EMT equilibrium volume, with their labels.

    The shape of the cell and the fractional coordinates stay as they are; the volume
    is where the pressure of EMT vanishes. `properties` gains `formation_energy`
    (eV/atom, against the fcc metals at their own equilibrium) and `bulk_modulus`
    (GPa, the slope of the same pressure curve). Crystals without an equilibrium are
    left out, and a warning counts and names them. The order stays.

    Args:
        crystals: alloys of `METALS`, with roughly sensible volumes.
        workers: processes; the result does not depend on it.

    Raises:
        InputError: `workers` is below 1, or a crystal holds another element.
    """
    _at_least("workers", workers, 1)
    for crystal in crystals:
        others = set(_symbols_of(crystal)) - set(METALS)
        if others:
            raise InputError(
                f"{crystal.material_id}: EMT has no {', '.join(sorted(others))}; "
                f"it knows {', '.join(METALS)}"
            )
    # Chunks are small enough to share the work evenly between the processes.
    chunks = [crystals[start : start + 64] for start in range(0, len(crystals), 64)]
    labelled = Parallel(n_jobs=workers)(delayed(_label_all)(chunk) for chunk in chunks)
    results = [crystal for chunk in labelled for crystal in chunk]
    failed = [
        crystal.material_id
        for crystal, result in zip(crystals, results, strict=True)
        if result is None
    ]
    if failed:
        log.warning(
            "%d of %d crystals have no EMT equilibrium near their volume and are "
            "left out: %s%s",
            len(failed),
            len(crystals),
            ", ".join(failed[:10]),
            ", ..." if len(failed) > 10 else "",
        )
    return [crystal for crystal in results if crystal is not None]


def demo_sets(
    seed: int, corpus_size: int, dataset_size: int, workers: int = 1
) -> tuple[list[Crystal], list[Crystal]]:
    """Return an unlabelled corpus and a labelled dataset with no structure in common.

    Both come from one sequence of `alloy_corpus`: the dataset is its beginning, so
    that it holds every prototype about equally often and does not depend on
    `corpus_size`; the corpus is what follows. Dataset structures are at their EMT
    equilibrium volume; corpus structures keep their estimated cells, which cost
    nothing: they differ from equilibrium by 1.6 % in length (one standard
    deviation), and pretraining on equilibrium cells was no better on the whole.

    Args:
        seed: which sequence.
        corpus_size: structures without labels.
        dataset_size: structures with labels.
        workers: processes that compute labels.

    Raises:
        InputError: an argument is out of range.
    """
    _at_least("corpus_size", corpus_size, 1)
    _at_least("dataset_size", dataset_size, 1)
    dataset: list[Crystal] = []
    used = 0
    while len(dataset) < dataset_size:  # again only where labels could not be had
        wanted = dataset_size - len(dataset)
        dataset += label_alloys(alloy_corpus(used + wanted, seed)[used:], workers)
        used += wanted
    return alloy_corpus(used + corpus_size, seed)[used:], dataset


@cache
def prototypes(max_atoms: int) -> tuple[Prototype, ...]:
    """Return the prototypes with 2-4 kinds of sites and at most `max_atoms` atoms.

    Simple ones come first, so a higher limit only adds to the end. Of prototypes that
    are nearly one structure, long polytypes among them, the first is kept.
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


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"`{name}` is {value} but must be at least {least}")


# --- The prototypes ------------------------------------------------------------------


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

    The pair functions are per atom of the crystal, so they do not depend on the
    choice of cell, nor on the handedness.
    """
    reach = _PAIR_GRID[-1] + 4 * _PAIR_WIDTH
    centres, neighbours, _, distances = _neighbours(frac_coords @ cell, cell, reach)
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
    """Return how much more volume copper takes here than when close packed."""
    volume = _atomic_volumes()["Cu"]
    numbers = np.full(len(frac_coords), atomic_numbers_by_symbol()["Cu"])
    # Start where a structure of middling packing is at ease.
    start = cell * (1.2 * volume) ** (1 / 3)
    x = _volume_at_rest(_PressureCurve(numbers, frac_coords, start))
    # Nothing found means that the atoms never meet: infinitely roomy.
    return math.inf if x is None else round(1.2 * math.exp(x), 4)


# --- Decoration ----------------------------------------------------------------------


@cache
def _atomic_volumes() -> dict[str, float]:
    """Return the close-packed volume of each metal in Å³, from EMT's own radii."""
    return {
        symbol: 4 / 3 * math.pi * (parameters[symbol][1] * units.Bohr) ** 3
        for symbol in METALS
    }


def _radius(symbol: str) -> float:
    """Return half the nearest-neighbour distance of the fcc metal in Å."""
    return float((_atomic_volumes()[symbol] / math.sqrt(32)) ** (1 / 3))


@cache
def _decorations(prototype: Prototype) -> tuple[tuple[str, ...], ...]:
    """Return the elements for each kind of site, each distinct structure once."""
    per_kind = np.bincount(prototype.kinds)  # (K,)
    count = len(per_kind)
    chosen = np.array(list(itertools.permutations(range(len(METALS)), count)))  # (M, K)
    radii = np.array([_radius(metal) for metal in METALS])[chosen]  # (M, K)
    volumes = np.array([_atomic_volumes()[metal] for metal in METALS])[chosen]
    per_atom = prototype.expansion * (volumes @ per_kind) / per_kind.sum()  # (M,)
    distances = prototype.contacts * per_atom[:, None, None] ** (1 / 3)  # (M, K, K)
    touching = radii[:, :, None] + radii[:, None, :]  # (M, K, K)
    kept = np.min(distances / touching, axis=(1, 2)) >= MIN_CONTACT  # (M,)
    # Of decorations that swaps turn into each other, the first one stays.
    place = len(METALS) ** np.arange(count)[::-1]  # (K,)
    for order in prototype.swaps:
        kept &= chosen @ place <= chosen[:, order] @ place
    return tuple(tuple(METALS[k] for k in row) for row in chosen[kept].tolist())


def _digest(seed: int, prototype: Prototype, elements: tuple[str, ...]) -> bytes:
    """Return 16 bytes that shuffle and jitter alike on every machine.

    NumPy may change its random streams from one version to the next.
    """
    text = f"{seed} {prototype.name} {' '.join(elements)}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _decorate(
    prototype: Prototype, elements: tuple[str, ...], digest: bytes, serial: int
) -> Crystal:
    """Return the prototype with elements on its sites and an estimated volume."""
    counts = np.bincount(prototype.kinds).tolist()  # K numbers
    share = int.from_bytes(digest[8:], "big") / 2**64  # the order took the first half
    jitter = 1 + VOLUME_JITTER * (2 * share - 1)
    decoration = list(zip(elements, counts, strict=True))
    volume = sum(_atomic_volumes()[element] * count for element, count in decoration)
    scale = (volume / sum(counts) * prototype.expansion * jitter) ** (1 / 3)
    divisor = math.gcd(*counts)
    formula = "".join(
        f"{element}{count // divisor if count > divisor else ''}"
        for element, count in decoration
    )
    numbers = np.array([atomic_numbers_by_symbol()[element] for element in elements])
    return Crystal(
        f"{prototype.name}-{formula}-{serial:04d}",
        numbers[prototype.kinds].astype(np.uint8),
        prototype.frac_coords.copy(),
        _rounded(prototype.cell * scale),
    )


def _rounded(cell: np.ndarray) -> np.ndarray:
    """Return the cell without the last bits, in which processors differ."""
    return np.round(cell, 6) + 0.0  # no -0.0, whose bytes differ from those of 0.0


# --- Labels --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _State:
    """Equilibrium: ln(volume / starting volume), eV per cell, GPa."""

    x: float
    energy: float
    bulk_modulus: float


def _label_all(crystals: Sequence[Crystal]) -> list[Crystal | None]:
    return [_label(crystal) for crystal in crystals]


def _label(crystal: Crystal) -> Crystal | None:
    """Return the crystal at equilibrium with its labels; None where there is none."""
    state = _equilibrium(crystal.atomic_numbers, crystal.frac_coords, crystal.cell)
    if state is None:
        return None
    composition = Counter(_symbols_of(crystal))
    elemental = sum(n * _fcc_energy(symbol) for symbol, n in composition.items())
    energy = (state.energy - elemental) / len(crystal.atomic_numbers)
    properties = {
        **crystal.properties,
        "formation_energy": round(energy, 6) + 0.0,
        "bulk_modulus": round(state.bulk_modulus, 4),
    }
    cell = _rounded(crystal.cell * math.exp(state.x / 3))
    return replace(crystal, cell=cell, properties=properties)


def _symbols_of(crystal: Crystal) -> list[str]:
    return [symbols()[number] for number in crystal.atomic_numbers]


@cache
def _fcc_energy(symbol: str) -> float:
    """Return the energy of the fcc metal at its EMT equilibrium in eV per atom."""
    side = (4 * _atomic_volumes()[symbol]) ** (1 / 3)
    cell = side / 2 * (np.ones((3, 3)) - np.eye(3))
    number = np.array([atomic_numbers_by_symbol()[symbol]])
    state = _equilibrium(number, np.zeros((1, 3)), cell)
    if state is None:
        raise RuntimeError(f"EMT finds no equilibrium of fcc {symbol}")
    return state.energy


def _equilibrium(
    numbers: np.ndarray, frac_coords: np.ndarray, cell: np.ndarray
) -> _State | None:
    """Return the state in which scaling the cell changes no energy, or None."""
    curve = _PressureCurve(numbers, frac_coords, cell)
    x = _volume_at_rest(curve)
    if x is None:
        return None
    half = 0.005
    stiffness = (curve.at(x - half)[1] - curve.at(x + half)[1]) / (2 * half)
    energy, pressure = curve.at(x)
    if not (stiffness > 0 and abs(pressure) < 1e-4 * stiffness):
        return None
    return _State(x, energy, stiffness / units.GPa)


def _volume_at_rest(curve: _PressureCurve) -> float | None:
    """Return the x at which the pressure vanishes, or None.

    The secant method follows the pressure itself, which EMT gives without differences
    of energies: five cells find the volume, where a fit of energies needs seven in
    the right place.
    """
    x, pressure = 0.0, curve.at(0.0)[1]
    # Most metals have 50-200 GPa. A step that is too small gives no slope.
    step = _clipped(pressure / (100 * units.GPa))
    step = math.copysign(max(abs(step), 0.01), step)
    for _ in range(40):
        previous, previous_pressure = x, pressure
        x += step
        if abs(x) > 3:
            return None
        pressure = curve.at(x)[1]
        slope = (pressure - previous_pressure) / (x - previous)
        # Past the point of rupture the pressure rises with the volume: turn back.
        step = _clipped(-pressure / slope) if slope < 0 else -0.1
        if abs(step) < 1e-4:
            return x + step
    return None


def _clipped(step: float) -> float:
    return min(max(step, -0.12), 0.12)


class _PressureCurve:
    """Energy (eV) and pressure (eV/Å³) of one crystal against its volume.

    The volume is given by x, its logarithm after division by that of `cell`.
    """

    def __init__(
        self, numbers: np.ndarray, frac_coords: np.ndarray, cell: np.ndarray
    ) -> None:
        self.atoms = Atoms(numbers, scaled_positions=frac_coords, cell=cell, pbc=True)
        self.cell = cell
        self.positions = self.atoms.positions.copy()
        self.calculator = _ScaledEMT()
        self.changes = ["numbers", "positions", "cell"]

    def at(self, x: float) -> tuple[float, float]:
        """Return energy and pressure where the volume is exp(x) times the first."""
        scale = math.exp(x / 3)
        self.atoms.cell[:] = self.cell * scale
        self.atoms.positions[:] = self.positions * scale
        # Asking the calculator directly skips the search for what has changed, which
        # takes as long as the energy.
        self.calculator.calculate(self.atoms, ["energy", "stress"], self.changes)
        self.changes = ["positions", "cell"]
        results = self.calculator.results
        return float(results["energy"]), -float(results["stress"][:3].sum()) / 3


class _ScaledEMT(EMT):
    """ASE's EMT for one crystal whose cell is scaled, which keeps its neighbours.

    Four fifths of EMT's time go into finding neighbours anew, though scaling changes
    no neighbour, only which of them lie within the cutoff.
    """

    def initialize(self, atoms: Atoms) -> None:
        super().initialize(atoms)
        self.nl = _KeptNeighbours(float(self.rc_list))


class _KeptNeighbours:
    """What EMT asks of a neighbour list, found once for a range of volumes."""

    def __init__(self, cutoff: float) -> None:
        self.cutoff = cutoff
        self.smallest_volume = math.inf

    def update(self, atoms: Atoms) -> None:
        """Find the neighbours unless those at hand will do."""
        if atoms.get_volume() >= self.smallest_volume:
            return
        margin = 1.05  # in length; EMT itself drops what lies beyond its cutoff
        self.smallest_volume = atoms.get_volume() / margin**3
        centres, self.neighbours, self.images, _ = _neighbours(
            atoms.positions, atoms.cell.array, self.cutoff * margin
        )
        self.first = np.searchsorted(centres, np.arange(len(atoms) + 1))

    def get_neighbors(self, atom: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the neighbours of an atom and the lattice translations to them."""
        own = slice(self.first[atom], self.first[atom + 1])
        return self.neighbours[own], self.images[own]


def _neighbours(
    positions: np.ndarray, cell: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return centres, neighbours, images and distances, sorted by centre."""
    points = np.ascontiguousarray(positions, dtype=float)
    lattice = np.ascontiguousarray(cell, dtype=float)
    centres, neighbours, images, distances = find_points_in_spheres(
        points, points, float(cutoff), _PERIODIC, lattice, _SAME_POINT
    )
    order = np.argsort(centres, kind="stable")
    order = order[distances[order] > _SAME_POINT]
    return centres[order], neighbours[order], images[order], distances[order]
