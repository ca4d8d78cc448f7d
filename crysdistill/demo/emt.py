"""Labels of alloys by effective-medium theory (EMT), which needs no download.

EMT describes seven metals and their alloys well enough to order their stability and
stiffness. A network has to learn this physics from the structure.

Source: K. W. Jacobsen, P. Stoltze and J. K. Nørskov, Surf. Sci. 366, 394 (1996),
doi:10.1016/0039-6028(96)00816-3, as in ASE.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from ase import Atoms, units
from ase.calculators.emt import EMT, parameters
from joblib import Parallel, delayed
from pymatgen.optimization.neighbors import find_points_in_spheres

from crysdistill.errors import InputError
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import atomic_numbers_by_symbol, symbols

log = logging.getLogger(__name__)

METALS = ("Ag", "Al", "Au", "Cu", "Ni", "Pd", "Pt")
"""The elements that EMT describes well."""

PROPERTIES = {"formation_energy": "eV/atom", "bulk_modulus": "GPa"}
"""The labels and their units."""

_PERIODIC = np.ones(3, dtype=np.int64)
_SAME_POINT = 1e-8  # Å; pymatgen's own tolerance for "this is the atom itself"


def label_alloys(crystals: Sequence[Crystal], workers: int = 1) -> list[Crystal]:
    """Return the crystals at their EMT equilibrium volume, with their labels.

    The shape of the cell and the fractional coordinates do not change. At the returned
    volume, the pressure of EMT vanishes. `properties` gains `formation_energy`
    (eV/atom, against the fcc metals at their own equilibrium) and `bulk_modulus`
    (GPa, the slope of the same pressure curve). Crystals without an equilibrium are
    left out, and a warning counts and names them. The order does not change.

    Args:
        crystals: alloys of `METALS`, with roughly sensible volumes.
        workers: processes; the result does not depend on it.

    Raises:
        InputError: `workers` is below 1, or a crystal holds another element.
    """
    if workers < 1:
        raise InputError(f"`workers` is {workers} but must be at least 1")
    for crystal in crystals:
        others = set(symbols_of(crystal)) - set(METALS)
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


@cache
def atomic_volumes() -> dict[str, float]:
    """Return the close-packed volume of each metal in Å³, from EMT's own radii."""
    return {
        symbol: 4 / 3 * math.pi * (parameters[symbol][1] * units.Bohr) ** 3
        for symbol in METALS
    }


def radius(symbol: str) -> float:
    """Return half the nearest-neighbour distance of the fcc metal in Å."""
    return float((atomic_volumes()[symbol] / math.sqrt(32)) ** (1 / 3))


def rounded(cell: np.ndarray) -> np.ndarray:
    """Round the cell to remove the last bits, in which processors differ."""
    return np.round(cell, 6) + 0.0  # no -0.0, whose bytes differ from those of 0.0


def log_expansion(
    numbers: np.ndarray, frac_coords: np.ndarray, cell: np.ndarray
) -> float | None:
    """Return ln(equilibrium volume / volume of `cell`), None without an equilibrium.

    Args:
        numbers: (N,) atomic numbers.
        frac_coords: (N, 3).
        cell: (3, 3) in Å, rows are lattice vectors.
    """
    return _volume_at_rest(_PressureCurve(numbers, frac_coords, cell))


@dataclass(frozen=True, slots=True)
class _State:
    """Equilibrium: ln(volume / starting volume), eV per cell, GPa."""

    x: float
    energy: float
    bulk_modulus: float


def _label_all(crystals: Sequence[Crystal]) -> list[Crystal | None]:
    return [_label(crystal) for crystal in crystals]


def _label(crystal: Crystal) -> Crystal | None:
    """Return the crystal at equilibrium with its labels; None if there is none."""
    state = _equilibrium(crystal.atomic_numbers, crystal.frac_coords, crystal.cell)
    if state is None:
        return None
    composition = Counter(symbols_of(crystal))
    elemental = sum(n * _fcc_energy(symbol) for symbol, n in composition.items())
    energy = (state.energy - elemental) / len(crystal.atomic_numbers)
    properties = {
        **crystal.properties,
        "formation_energy": round(energy, 6) + 0.0,
        "bulk_modulus": round(state.bulk_modulus, 4),
    }
    cell = rounded(crystal.cell * math.exp(state.x / 3))
    return replace(crystal, cell=cell, properties=properties)


def symbols_of(crystal: Crystal) -> list[str]:
    """Return the element of each atom."""
    return [symbols()[number] for number in crystal.atomic_numbers]


@cache
def _fcc_energy(symbol: str) -> float:
    """Return the energy of the fcc metal at its EMT equilibrium in eV per atom."""
    side = (4 * atomic_volumes()[symbol]) ** (1 / 3)
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
    of energies. Five cells find the volume; a fit of energies needs seven in the right
    place.
    """
    x, pressure = 0.0, curve.at(0.0)[1]
    # Most metals have 50-200 GPa. If the step is too small, it gives no slope.
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

    The variable is x, the logarithm of the volume divided by that of `cell`.
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
        """Return energy and pressure at exp(x) times the volume of `cell`."""
        scale = math.exp(x / 3)
        self.atoms.cell[:] = self.cell * scale
        self.atoms.positions[:] = self.positions * scale
        # Calling the calculator directly skips its search for changes, which takes as
        # long as the energy.
        self.calculator.calculate(self.atoms, ["energy", "stress"], self.changes)
        self.changes = ["positions", "cell"]
        results = self.calculator.results
        return float(results["energy"]), -float(results["stress"][:3].sum()) / 3


class _ScaledEMT(EMT):
    """ASE's EMT for one crystal with a scaled cell; it keeps the neighbours.

    EMT spends four fifths of its time finding neighbours again. But scaling does not
    change neighbours, only which of them lie within the cutoff.
    """

    def initialize(self, atoms: Atoms) -> None:
        super().initialize(atoms)
        self.nl = _KeptNeighbours(float(self.rc_list))


class _KeptNeighbours:
    """The neighbour list that EMT needs, found once for a range of volumes."""

    def __init__(self, cutoff: float) -> None:
        self.cutoff = cutoff
        self.smallest_volume = math.inf

    def update(self, atoms: Atoms) -> None:
        """Find the neighbours, unless the kept ones suffice."""
        if atoms.get_volume() >= self.smallest_volume:
            return
        margin = 1.05  # in length; EMT itself drops atoms beyond its cutoff
        self.smallest_volume = atoms.get_volume() / margin**3
        centres, self.neighbours, self.images, _ = periodic_neighbours(
            atoms.positions, atoms.cell.array, self.cutoff * margin
        )
        self.first = np.searchsorted(centres, np.arange(len(atoms) + 1))

    def get_neighbors(self, atom: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the neighbours of an atom and the lattice translations to them."""
        own = slice(self.first[atom], self.first[atom + 1])
        return self.neighbours[own], self.images[own]


def periodic_neighbours(
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
