"""Element tables: the numbers that describe an element to an encoder.

A table is a float array with one row per atomic number. Row 0 means "no element":
encoders see it for a masked atom.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

import numpy as np

MAX_ATOMIC_NUMBER = 100
"""The last element with a row in the tables (fermium)."""

CGCNN_BLOCKS = {
    "group": 19,  # 0 = lanthanides and actinides, else the group 1-18
    "period": 7,
    "electronegativity": 10,  # Pauling, 0.5-4.0
    "covalent_radius": 10,  # pm, 25-250
    "valence_electrons": 12,  # 1-12
    "ionization_energy": 10,  # ln(eV), 1.3-3.3
    "electron_affinity": 10,  # eV, -3-3.7
    "block": 4,  # s, p, d, f
    "atomic_volume": 10,  # ln(cm3/mol), 1.5-4.3
}
"""The nine one-hot blocks of the CGCNN element vector and their widths."""


@cache
def _bins() -> tuple[dict[str, str], ...]:
    """Return the rows of `elements.csv`: one bin number per element and block."""
    text = resources.files(__package__).joinpath("elements.csv").read_text("utf-8")
    return tuple(csv.DictReader(text.splitlines()))


@cache
def symbols() -> tuple[str, ...]:
    """Return chemical symbols by atomic number; entry 0 is "X" (no element)."""
    return ("X", *(row["symbol"] for row in _bins()))


@cache
def atomic_numbers_by_symbol() -> dict[str, int]:
    """Return the atomic number of each chemical symbol in the tables."""
    return {symbol: z for z, symbol in enumerate(symbols()) if z}


def cgcnn92() -> np.ndarray:
    """Return the 92-bit element table of CGCNN, shape (101, 92), float32.

    There are nine properties, each one-hot over equal bins (`CGCNN_BLOCKS`). The block
    of an unknown property is zero. The bin numbers are kept in `elements.csv`, because
    today's property collections put up to 58 elements in other bins than the published
    table (its covalent radii come from another source, as do its electron affinities of
    the lanthanides).

    The table does not distinguish {La, Ce}, {Sm, Gd}, {Ho, Er}, {Th, Np}, {Am, Cm} and
    {Bk, Cf, Es, Fm}.

    Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
    doi:10.1103/PhysRevLett.120.145301, supplement, Table S2; the bins equal those
    of the element vectors published with the code.
    """
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, sum(CGCNN_BLOCKS.values())), np.float32)
    for row in _bins():
        start = 0
        for block, width in CGCNN_BLOCKS.items():
            if row[block]:
                table[int(row["atomic_number"]), start + int(row[block])] = 1.0
            start += width
    return table


def onehot() -> np.ndarray:
    """Return one-hot atomic numbers, shape (101, 101), float32.

    Column 0 marks a masked atom.
    """
    return np.eye(MAX_ATOMIC_NUMBER + 1, dtype=np.float32)


ELEMENT_TABLES = {"cgcnn92": cgcnn92, "onehot": onehot}
"""Element tables by the name that configurations and weights files use."""


def element_table(name: str) -> np.ndarray:
    """Return the element table called `name`, shape (101, features), float32.

    Raises:
        ValueError: `name` is not one of `ELEMENT_TABLES`.
    """
    if name not in ELEMENT_TABLES:
        known = ", ".join(ELEMENT_TABLES)
        raise ValueError(f"unknown element table {name!r}; choose one of {known}")
    return ELEMENT_TABLES[name]()
