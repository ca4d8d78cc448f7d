"""What a CIF counts itself, held against the atoms that were read from it.

Formula, formula units and multiplicities say how many atoms there are. A file that was
cut, lost its symmetry or lists no hydrogens shows itself there. An error of the file's
author cannot be told from a loss, so each disagreement is a refusal that gives both
numbers.
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
_VOLUME_TOLERANCE = 0.1  # relative; a relaxed cell may keep the volume of the old one


def check_volume(block: Block, volume: float) -> None:
    """Refuse a cell whose volume is far from the one that is stated.

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
    """Hold the multiplicity of each site against the atoms made of it.

    SHELXL-97 writes under the same tag how many operations leave the site in place, as
    does `_atom_site_site_symmetry_order`: either is taken if it holds for all sites.

    Args:
        table: the sites.
        labels: of the sites.
        images: (S,) how many atoms each has become.
        order: how many operations there are.

    Returns:
        Whether they are there, hold, and say more than that each site is one atom.

    Raises:
        BadStructure: they do not hold.
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
    """Hold the formula and its number Z in the cell against the atoms.

    pymatgen writes the atoms of the whole cell as the formula, and as Z their greatest
    common divisor: that is taken as well.

    Args:
        block: of the file.
        atoms: (N,) atomic numbers of the cell.

    Returns:
        Whether both are there and hold.

    Raises:
        BadStructure: they do not hold.
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
        if not parts or (len(parts) > 1 and word.isupper()):  # NACL may be any of two
            return {}
        for symbol, amount in parts:
            z = species_number(symbol)
            if not z:
                return {}
            found[z] = found.get(z, 0.0) + float(amount or 1)
    return {z: amount for z, amount in found.items() if amount > 0}
