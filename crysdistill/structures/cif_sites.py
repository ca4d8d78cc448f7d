"""The atom sites of a CIF: one loop, full sites, known elements."""

from __future__ import annotations

import math
import re
from collections import defaultdict

import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.cif_block import (
    Block,
    Table,
    known,
    number,
    numbers,
    plain,
)
from crysdistill.structures.crystal import (
    FULL_OCCUPANCY,
    disordered,
    label_number,
    species_number,
    unknown_element,
)
from crysdistill.structures.elements import symbols

_PREFIX = "_atom_site_"
_COLUMNS = (
    "label",
    "type_symbol",
    "fract_x",
    "fract_y",
    "fract_z",
    "cartn_x",
    "occupancy",
    "attached_hydrogens",
    "calc_flag",
    "disorder_assembly",
    "disorder_group",
    "label_alt_id",
    "site_symmetry_multiplicity",
    "symmetry_multiplicity",
    "site_symmetry_order",
    "wyckoff_symbol",
)
_ATOMS = ("fract_x", "cartn_x")
_FORMULAS = ("sum", "moiety", "structural", "iupac", "analytical")
_SYMBOL = re.compile(r"[A-Z][a-z]?")


def site_tables(block: Block) -> list[Table]:
    """Return the loops of atom sites in a block, with tags without their prefix.

    Anisotropic displacements and moments have other prefixes.
    """
    found = []
    for loop in block.loops:
        table = {
            name: loop[_PREFIX + name] for name in _COLUMNS if _PREFIX + name in loop
        }
        if table.keys() - {"label"}:
            found.append(table)
    return found


def has_atoms(block: Block) -> bool:
    """Whether a block lists atoms, with or without coordinates."""
    return any(table.get(tag) for table in site_tables(block) for tag in _ATOMS)


def is_placeholder(block: Block) -> bool:
    """Whether the only atoms of a block are rows of `?` and `.`."""
    tags = ("label", "type_symbol", "fract_x", "fract_y", "fract_z")
    values = [
        value
        for table in site_tables(block)
        for tag in tags
        for value in table.get(tag, ())
    ]
    return has_atoms(block) and not any(known(plain(value)) for value in values)


def site_table(block: Block) -> Table:
    """Return the columns of the one loop of atoms; missing columns are empty.

    Raises:
        BadStructure: there are several loops, or none with fractional coordinates.
    """
    tables = site_tables(block)
    if len(tables) > 1:
        rows = " and ".join(str(len(next(iter(t.values())))) for t in tables)
        raise BadStructure(
            f"data_{block.name} has {len(tables)} loops of atoms, of {rows} rows; put "
            "all atoms into one loop"
        )
    table = {name: tables[0].get(name, []) for name in _COLUMNS} if tables else {}
    if not table or not (table["fract_x"] or table["cartn_x"]):
        raise BadStructure(
            "no atoms (`_atom_site_fract_x`): cut short, or not a crystal structure; "
            "get the file again"
        )
    if not table["fract_x"]:
        raise BadStructure("Cartesian coordinates only; write `_atom_site_fract_x`")
    count = len(table["fract_x"])
    for name, values in table.items():
        if len(values) not in (0, count):
            raise BadStructure(
                f"`{_PREFIX}{name}` has {len(values)} values for {count} atoms; mend "
                "the loop"
            )
    return table


def read_sites(block: Block, table: Table) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return names (S,), atomic numbers (S,) and coordinates (S, 3) of the sites.

    Raises:
        BadStructure: a site is not full, has no coordinates, or has no known element.
    """
    for axis in "xyz":
        if not table[f"fract_{axis}"]:
            raise BadStructure(
                f"no `_atom_site_fract_{axis}`; complete the coordinates"
            )
    count = len(table["fract_x"])
    types = table["type_symbol"] or ["?"] * count
    named = table["label"] or [f"{symbol}({n})" for n, symbol in enumerate(types, 1)]
    labels = [plain(label) for label in named]
    _check_occupancies(labels, table["occupancy"])
    _check_disorder(labels, table)
    _check_dummies(labels, table)
    elements = [species_number(symbol) for symbol in types]
    for row, element in enumerate(elements):
        if not element:
            elements[row] = _unusual_species(block, labels[row], plain(types[row]))
    coordinates = [table[f"fract_{axis}"] for axis in "xyz"]
    frac = numbers([value for values in coordinates for value in values])
    frac = np.ascontiguousarray(frac.reshape(3, count).T)
    if not np.isfinite(frac).all():
        row, axis = np.argwhere(~np.isfinite(frac))[0].tolist()
        raise BadStructure(
            f"a coordinate of site {labels[row]} is `{coordinates[axis][row]}`, not a "
            "number; complete it or remove the entry"
        )
    return labels, np.array(elements), frac


def _unusual_species(block: Block, label: str, symbol: str) -> int:
    """Return the atomic number of a site whose symbol is quoted or missing."""
    if known(symbol):
        element = species_number(symbol)
    else:
        element = label_number(label)
        _check_guess(block, label, element)
    if not element:
        name = symbol if known(symbol) else label
        raise BadStructure(unknown_element(f"site {label}", name))
    return element


def _check_guess(block: Block, label: str, element: int) -> None:
    """Refuse an element that is named only by a label, if the file's formulas lack it.

    Labels are free text: `W` is often water, `CA` a carbon.
    """
    formulas = [block.value(f"_chemical_formula_{name}") for name in _FORMULAS]
    given = [formula for formula in formulas if formula is not None]
    held = {species_number(s) for text in given for s in _SYMBOL.findall(text)}
    if element and held - {0} and element not in held:
        raise BadStructure(
            f"site {label} has no type symbol, and its label means "
            f"{symbols()[element]}, which the formula ({given[0]}) lacks; add "
            "`_atom_site_type_symbol`"
        )


def _check_occupancies(labels: list[str], values: list[str]) -> None:
    """Refuse every site that is not full."""
    for text in dict.fromkeys(values):  # usually there is only one value
        value = number(text)
        if abs(value - 1) <= FULL_OCCUPANCY:
            continue
        label = labels[values.index(text)]
        if math.isnan(value):
            raise BadStructure(
                f"the occupancy of site {label} is `{text}`; write 1 if it is full"
            )
        if value > 1:
            raise BadStructure(
                f"site {label} has occupancy {value:g}, which is more than one atom"
            )
        raise BadStructure(disordered(label, f"occupancy {value:g}"))


def _check_disorder(labels: list[str], table: Table) -> None:
    """Refuse alternative sites, whatever the occupancies say.

    A single group of full sites is accepted: it remains after someone has resolved the
    disorder.
    """
    assemblies = table["disorder_assembly"] or ["."] * len(labels)
    for column in ("disorder_group", "label_alt_id"):
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        for label, assembly, group in zip(
            labels, assemblies, table[column], strict=False
        ):
            name = plain(group)
            if known(name) and name != "0":
                groups[plain(assembly)].setdefault(name, label)
        for found in groups.values():
            (name, label), *others = found.items()
            if others:
                names = " and ".join(found)
                raise BadStructure(disordered(label, f"disorder groups {names}"))
            if name.startswith("-") or not table["occupancy"]:
                raise BadStructure(disordered(label, f"disorder group {name}"))


def _check_dummies(labels: list[str], table: Table) -> None:
    """Refuse sites that are not atoms, and hydrogens that have no coordinates."""
    for label, flag in zip(labels, table["calc_flag"], strict=False):
        if plain(flag).lower() == "dum":
            raise BadStructure(
                f"site {label} is a dummy (`_atom_site_calc_flag`), not an atom; "
                "remove it"
            )
    for label, value in zip(labels, table["attached_hydrogens"], strict=False):
        if number(value) > 0:
            raise BadStructure(
                f"site {label} has hydrogens without coordinates; add them"
            )
