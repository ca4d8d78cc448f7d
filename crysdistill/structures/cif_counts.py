"""Compare the counts that a CIF states with the atoms that were read from it.

Formula, formula units and multiplicities state the number of atoms. They expose a file
that was cut, lost its symmetry or lists no hydrogens. An error of the file's author
looks the same as such a loss. So every disagreement is refused, with both numbers.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.cif_block import Block, Table, number, plain
from crysdistill.structures.crystal import species_number
from crysdistill.structures.elements import symbols

_MULTIPLICITIES = ("site_symmetry_multiplicity", "symmetry_multiplicity")
_WYCKOFF = re.compile(r"\.?(\d+)\(?[a-zA]\)?")
_FORMULA_PART = re.compile(r"([A-Z][a-z]?)((?:[0-9]+\.?[0-9]*|\.[0-9]+)?)")
_FORMULA = re.compile(rf"({_FORMULA_PART.pattern})+")
_TOLERANCE = 0.005  # relative; a formula may be rounded
_VOLUME_TOLERANCE = 0.1  # relative; a file may keep the volume from before relaxation


def check_volume(block: Block, volume: float) -> None:
    """Refuse a cell whose volume is far from the stated one.

    Raises:
        BadStructure: they differ by more than a tenth.
    """
    stated = number(block.value("_cell_volume") or "?")
    if stated > 0 and abs(stated / volume - 1) > _VOLUME_TOLERANCE:
        raise BadStructure(
            f"its cell has {volume:.4g} Å³ but `_cell_volume` is {stated:g}; mend "
            "either"
        )


def check_multiplicities(
    table: Table, labels: list[str], images: np.ndarray, order: int
) -> bool:
    """Compare the multiplicity of each site with the number of its atoms.

    SHELXL-97 writes another number under the same tag: how many operations leave the
    site in place, as `_atom_site_site_symmetry_order` does. Either meaning is accepted
    if it holds for all sites.

    Args:
        table: the sites.
        labels: of the sites.
        images: (S,) the number of atoms made of each site.
        order: the number of operations.

    Returns:
        Whether multiplicities are stated, agree, and are not all 1.

    Raises:
        BadStructure: they do not agree.
    """
    proven = False
    for tag in (*_MULTIPLICITIES, "site_symmetry_order", "wyckoff_symbol"):
        values = list(map(plain, table[tag]))
        if tag == "wyckoff_symbol":
            matches = map(_WYCKOFF.fullmatch, values)
            values = [match.group(1) if match else "?" for match in matches]
        stated = np.array([number(value) for value in values])
        given = np.flatnonzero(np.isfinite(stated) & (stated > 0))
        if not len(given):
            continue
        stated, made = stated[given], images[given]
        wrong = np.flatnonzero(stated != made)
        if tag == "site_symmetry_order":
            wrong = np.flatnonzero(stated * made != order)
        elif tag == "wyckoff_symbol" or (stated * made != order).any():
            proven |= len(given) == len(images) and bool((stated > 1).any())
        else:
            wrong = wrong[:0]
        if len(wrong):
            row = int(given[wrong[0]])
            atoms = f"{images[row]} atom{'s' * int(images[row] != 1)}"
            raise BadStructure(
                f"site {labels[row]} has `_atom_site_{tag}` {values[row]}, but its "
                f"symmetry ({order} operation{'s' * (order != 1)}) makes {atoms} of "
                "it; complete the symmetry or mend the number"
            )
    return proven


def check_formula(block: Block, atoms: np.ndarray) -> bool:
    """Compare the formula and Z, its number in the cell, with the atoms.

    pymatgen writes the atoms of the whole cell as the formula, and their greatest
    common divisor as Z. That is accepted as well.

    Args:
        block: of the file.
        atoms: (N,) atomic numbers of the cell.

    Returns:
        Whether both are stated and agree.

    Raises:
        BadStructure: they do not agree.
    """
    text = block.value("_chemical_formula_sum") or "?"
    units = number(block.value("_cell_formula_units_z") or "?")
    stated = amounts(text)
    counts = np.bincount(atoms)
    found = {z: int(counts[z]) for z in np.flatnonzero(counts).tolist()}
    shown = " ".join(f"{symbols()[z]}{n}" for z, n in found.items())
    if not stated:
        if units >= 1 and any(n % units for n in found.values()):
            raise BadStructure(
                f"its atoms ({shown}) do not make up {units:g} formula units "
                "(`_cell_formula_units_Z`); complete the file or mend the number"
            )
        return False
    strange = found.keys() - stated.keys()
    if strange:
        names = " and ".join(symbols()[z] for z in sorted(strange))
        raise BadStructure(
            f"its atoms ({shown}) hold {names}, which its formula ({text}) lacks; "
            "correct `_atom_site_type_symbol` or `_chemical_formula_sum`"
        )
    made = len(atoms) / sum(stated.values())
    proportional = all(
        abs(found.get(z, 0) - amount * made) <= _TOLERANCE * amount * made
        for z, amount in stated.items()
    )
    whole = max(made, 1 / made)
    if not proportional or abs(whole - round(whole)) > _TOLERANCE * whole:
        raise BadStructure(
            f"its atoms ({shown}) do not make up its formula ({text}): cut short, or "
            "atoms without coordinates; complete the file or mend "
            "`_chemical_formula_sum`"
        )
    if not units > 0:
        return False
    divisor = math.gcd(*(int(a) if a == int(a) else 1 for a in stated.values()))
    if all(abs(made * n - units) > _TOLERANCE * units for n in (1, divisor)):
        raise BadStructure(
            f"its atoms ({shown}) make up {made:g} formula units ({text}), but "
            f"`_cell_formula_units_Z` is {units:g}; complete the file or mend either"
        )
    return True


@lru_cache(maxsize=1024)
def amounts(formula: str) -> dict[int, float]:
    """Read `Fe2 O3` or `Fe2O3` as amounts by atomic number; {} if written oddly."""
    found: dict[int, float] = {}
    for word in formula.split():
        parts = _FORMULA_PART.findall(word) if _FORMULA.fullmatch(word) else []
        if not parts or (len(parts) > 1 and word.isupper()):  # NACL is ambiguous
            return {}
        for symbol, amount in parts:
            z = species_number(symbol)
            if not z:
                return {}
            found[z] = found.get(z, 0.0) + float(amount or 1)
    return {z: amount for z, amount in found.items() if amount > 0}
