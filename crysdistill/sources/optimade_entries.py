"""Turning a structure of OPTIMADE into an entry, or into a reason to refuse it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crysdistill.sources.web import start
from crysdistill.structures.crystal import FULL_OCCUPANCY, disordered

FIELDS = (
    "lattice_vectors",
    "cartesian_site_positions",
    "species",
    "species_at_sites",
    "dimension_types",
    "structure_features",
)
"""Fields of an entry that we ask for."""


class _NoCrystal(Exception):  # noqa: N818 - a reason, for quarantine
    """The reason why an entry is no ordered crystal."""


def entry_of(resource: Any, properties: Sequence[str] = ()) -> dict[str, Any]:
    """Return a structure of OPTIMADE as an entry of a page.

    Args:
        resource: the structure in the answer of the service.
        properties: names of the numbers to read as labels.

    Returns:
        A flat entry, or `id` and `problem` if it holds no ordered crystal.
    """
    if not isinstance(resource, Mapping) or resource.get("id") in (None, ""):
        return {"problem": f"an entry without `id`: `{start(str(resource))}`"}
    material_id = str(resource["id"])
    attributes = resource.get("attributes")
    try:
        if not isinstance(attributes, Mapping):
            raise _NoCrystal("no `attributes`; ask the database")
        structure = _structure(attributes)
        values = {name: attributes.get(name) for name in properties}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise _NoCrystal(f"`{name}` is `{value}`, not a number; leave it out")
    except Exception as error:  # one entry must not stop the others
        problem = str(error)
        if not isinstance(error, _NoCrystal):
            name = type(error).__name__
            problem = (
                f"not in OPTIMADE's format ({name}: {start(problem)}); leave it out"
            )
        return {"id": material_id, "structure": None, "problem": problem}
    if properties:
        return {"id": material_id, "structure": structure, **values}
    return {"id": material_id, **structure}


def _structure(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `lattice`, `species` and `frac` of an ordered crystal."""
    for name in ("lattice_vectors", "cartesian_site_positions", "species_at_sites"):
        if not attributes.get(name):
            raise _NoCrystal(f"no `{name}` in the database; leave it out")
    periodic = attributes.get("dimension_types") or [1, 1, 1]
    if list(periodic) != [1, 1, 1]:
        raise _NoCrystal(
            f"periodic in {periodic.count(1)} of 3 directions; only crystals are read"
        )
    # The list of sites lacks some atoms of such structures.
    missing = {"implicit_atoms", "site_attachments", "unknown_positions", "assemblies"}
    if odd := sorted(missing & set(attributes.get("structure_features") or ())):
        raise _NoCrystal(f"has {', '.join(odd)}: not every atom has one known position")
    try:
        lattice = np.array(attributes["lattice_vectors"], np.float64)
        positions = np.array(attributes["cartesian_site_positions"], np.float64)
        frac = np.linalg.solve(lattice.T, positions.T).T
    except (ValueError, TypeError, np.linalg.LinAlgError):
        raise _NoCrystal(
            "its lattice or positions are not numbers, or span no volume; leave it out"
        ) from None
    species = _symbols(attributes)
    return {"lattice": lattice.tolist(), "species": species, "frac": frac.tolist()}


def _symbols(attributes: Mapping[str, Any]) -> list[str]:
    """Return the element on each site."""
    names = attributes["species_at_sites"]
    kinds = attributes.get("species")
    if not kinds:  # optional if every site holds one element
        return [str(name) for name in names]
    by_name = {kind["name"]: kind for kind in kinds}
    symbols = []
    for site, name in enumerate(names):
        if name not in by_name:
            raise _NoCrystal(f"site {site} holds `{name}`, which `species` lacks")
        if attached := by_name[name].get("attached"):
            raise _NoCrystal(
                f"site {site} has {', '.join(attached)} attached, without positions; "
                "leave it out"
            )
        parts = _occupation(by_name[name])
        if len(parts) != 1 or abs(parts[0][1] - 1) > FULL_OCCUPANCY:
            holds = " + ".join(f"{symbol} {share:g}" for symbol, share in parts)
            raise _NoCrystal(disordered(str(site), holds or "nothing"))
        symbols.append(parts[0][0])
    return symbols


def _occupation(kind: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the elements on the sites of a species, and their shares."""
    symbols = [str(symbol) for symbol in kind["chemical_symbols"]]
    shares = kind.get("concentration") or [1.0] * len(symbols)
    return list(zip(symbols, map(float, shares), strict=True))
