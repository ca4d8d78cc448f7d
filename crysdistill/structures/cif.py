"""CIF, read strictly: a crystal, or one line that says why not."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache

import gemmi
import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.crystal import (
    FULL_OCCUPANCY,
    Crystal,
    disordered,
    label_number,
    species_number,
    unknown_element,
    validate,
)
from crysdistill.structures.elements import MAX_ATOMIC_NUMBER, symbols
from crysdistill.structures.operations import (
    check_setting,
    expand,
    group_operations,
    operations,
)

_OPERATIONS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
_HALL = ("_space_group_name_Hall", "_symmetry_space_group_name_Hall")
_HERMANN_MAUGUIN = ("_space_group_name_H-M_alt", "_symmetry_space_group_name_H-M")
_GROUP_NUMBER = ("_space_group_IT_number", "_symmetry_Int_Tables_number")
_SITE = (
    "label",
    "type_symbol",
    "fract_x",
    "fract_y",
    "fract_z",
    "occupancy",
    "attached_hydrogens",
)
_CELL = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
_FORMULA_PART = re.compile(r"([A-Z][a-z]?)((?:[0-9]+\.?[0-9]*|\.[0-9]+)?)")
_BLOCK = re.compile(rb"^[ \t]*data_", re.MULTILINE | re.IGNORECASE)
_FORMULA_TOLERANCE = 0.005  # relative; a formula may be rounded


def read_cif(data: bytes, material_id: str) -> Crystal:
    """Read the first block with atoms of a CIF.

    Symmetry is expanded to the full cell; atoms come in pymatgen's order, by
    electronegativity and then as written, because the published graphs treat atom 0
    specially. Coordinates within 1e-4 of 1/3 and 2/3 are taken for these, as pymatgen
    does.

    Args:
        data: the content of the file.
        material_id: the name of the crystal.

    Raises:
        BadStructure: the file is damaged, disordered, names an unknown element, lacks a
            value or cannot be a crystal.
    """
    block = _block_with_atoms(data)
    cell = _cell(block)
    numbers, frac = _sites(block)
    frac = _exact_thirds(frac)
    rotations, translations = _symmetry(block, cell)
    if len(rotations) > 1:
        frac, site = expand(frac, rotations, translations, cell)
        numbers = numbers[site]
    order = np.argsort(_electronegativity_rank()[numbers], kind="stable")
    crystal = validate(Crystal(material_id, numbers[order], frac[order], cell))
    _check_formula(block, crystal.atomic_numbers)
    return crystal


def split_cif(data: bytes) -> list[tuple[str, bytes]]:
    """Return name and content of each block with atoms, if there are several.

    A file of one block, by far the most common, is not parsed for this.

    Raises:
        BadStructure: it has several blocks but is damaged.
    """
    if len(_BLOCK.findall(data)) < 2:
        return []
    found = []
    for block in _document(data):
        if len(block.find_values("_atom_site_fract_x")):
            single = gemmi.cif.Document()
            single.add_copied_block(block)
            found.append((block.name, single.as_string().encode()))
    return found if len(found) > 1 else []


def _block_with_atoms(data: bytes) -> gemmi.cif.Block:
    """Return the first block that lists atoms."""
    document = _document(data)
    for block in document:
        if len(block.find_values("_atom_site_fract_x")):
            return block
    for block in document:
        if len(block.find_values("_atom_site_Cartn_x")):
            raise BadStructure("Cartesian coordinates only; write `_atom_site_fract_x`")
    raise BadStructure(
        "no atoms (`_atom_site_fract_x`): cut short, or not a crystal structure; get "
        "the file again"
    )


def _document(data: bytes) -> gemmi.cif.Document:
    """Parse a file."""
    text = data.removeprefix(b"\xef\xbb\xbf").strip()
    if not text:
        raise BadStructure("empty file; get it again or remove it")
    if text.startswith(b"<"):
        raise BadStructure("a web page or XML, not a CIF; get the file again")
    if not text.isascii():  # accents in names of authors; nothing that is read here
        text = text.decode("utf-8", "replace").encode("ascii", "replace")
    try:
        return gemmi.cif.read_string(text + b"\n", check_level=0)
    except (ValueError, RuntimeError) as error:
        place = re.match(r"[^:]*:(\d+)(?::\d+\(\d+\))?:? *(.*)", str(error))
        where, what = place.groups() if place else ("?", str(error))
        raise BadStructure(
            f"not a valid CIF at line {where} ({what}): damaged or cut short; get the "
            "file again"
        ) from None


def _plain(value: str) -> str:
    """Take off the quotes of a CIF value."""
    return gemmi.cif.as_string(value) if value[:1] in "'\";" else value


def _known(value: str | None) -> bool:
    return value not in (None, "", "?", ".")


def _number(value: str) -> float:
    """Read a CIF number, with or without its uncertainty; NaN where it is none."""
    try:
        return float(value)
    except ValueError:
        return gemmi.cif.as_number(_plain(value))


def _numbers(values: Sequence[str]) -> np.ndarray:
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return np.array([_number(value) for value in values])


def _cell(block: gemmi.cif.Block) -> np.ndarray:
    """Return the cell (3, 3) as pymatgen lays it: c along z, a in the xz plane."""
    values = []
    for name in _CELL:
        tag = f"_cell_{name}"
        text = block.find_value(tag)
        if text is None:
            raise BadStructure(f"no `{tag}`: cut short, or no cell; complete the cell")
        value = _number(text)
        if not math.isfinite(value):
            raise BadStructure(f"`{tag}` is `{text}`, not a number; complete the cell")
        if value <= 0 or (name.startswith("angle") and value >= 180):
            raise BadStructure(f"`{tag}` is {text}, which is impossible; mend the cell")
        values.append(value)
    a, b, c = values[:3]
    cos_alpha, cos_beta, cos_gamma = np.cos(np.radians(values[3:]))
    sin_alpha, sin_beta, _ = np.sin(np.radians(values[3:]))
    cos_gamma_star = (cos_alpha * cos_beta - cos_gamma) / (sin_alpha * sin_beta)
    if abs(cos_gamma_star) >= 1:
        angles = ", ".join(f"{angle:g}" for angle in values[3:])
        raise BadStructure(f"the angles {angles} close no cell (impossible); mend them")
    gamma_star = np.arccos(cos_gamma_star)
    return np.array(
        [
            [a * sin_beta, 0.0, a * cos_beta],
            [
                -b * sin_alpha * np.cos(gamma_star),
                b * sin_alpha * np.sin(gamma_star),
                b * cos_alpha,
            ],
            [0.0, 0.0, c],
        ]
    )


def _site_columns(block: gemmi.cif.Block) -> dict[str, list[str]]:
    """Return the `_atom_site_` columns of a block; one that is not there is empty."""
    loop = block.find_values("_atom_site_fract_x").get_loop()
    if loop is None:  # a single site may be written without a loop
        return {name: list(block.find_values(f"_atom_site_{name}")) for name in _SITE}
    values, width = loop.values, loop.width()
    columns: dict[str, list[str]] = {name: [] for name in _SITE}
    for number, tag in enumerate(loop.tags):
        columns[tag.lower().removeprefix("_atom_site_")] = values[number::width]
    return columns


def _sites(block: gemmi.cif.Block) -> tuple[np.ndarray, np.ndarray]:
    """Return the atomic numbers (S,) and coordinates (S, 3) of the sites as listed."""
    columns = _site_columns(block)
    coordinates = [columns[f"fract_{axis}"] for axis in "xyz"]
    count = len(coordinates[0])
    for axis, values in zip("xyz", coordinates, strict=True):
        if not values:
            raise BadStructure(
                f"no `_atom_site_fract_{axis}`; complete the coordinates"
            )
    types = columns["type_symbol"] or ["?"] * count
    labels = columns["label"] or [f"{symbol}({n})" for n, symbol in enumerate(types, 1)]
    _check_occupancies(labels, columns["occupancy"])
    _check_attached_hydrogens(labels, columns["attached_hydrogens"])
    numbers = [species_number(symbol) for symbol in types]
    for row, number in enumerate(numbers):
        if not number:
            numbers[row] = _unusual_species(_plain(labels[row]), _plain(types[row]))
    frac = _numbers([value for values in coordinates for value in values])
    frac = np.ascontiguousarray(frac.reshape(3, count).T)
    if not np.isfinite(frac).all():
        row, axis = np.argwhere(~np.isfinite(frac))[0].tolist()
        raise BadStructure(
            f"a coordinate of site {_plain(labels[row])} is "
            f"`{coordinates[axis][row]}`, not a number; complete it or remove the entry"
        )
    return np.array(numbers), frac


def _unusual_species(label: str, symbol: str) -> int:
    """Return the atomic number of a site whose symbol is quoted or not given."""
    number = species_number(symbol) if _known(symbol) else label_number(label)
    if not number:
        name = symbol if _known(symbol) else label
        raise BadStructure(unknown_element(f"site {label}", name))
    return number


def _check_attached_hydrogens(labels: list[str], values: list[str]) -> None:
    """Refuse hydrogens that are counted but not placed."""
    for label, value in zip(labels, values, strict=False):
        if _number(value) > 0:
            raise BadStructure(
                f"site {_plain(label)} has hydrogens without coordinates; add them"
            )


def _check_occupancies(labels: list[str], values: list[str]) -> None:
    """Refuse every site that is not full."""
    for text in dict.fromkeys(values):  # most often there is but one value
        value = _number(text)
        if abs(value - 1) <= FULL_OCCUPANCY:
            continue
        label = _plain(labels[values.index(text)])
        if math.isnan(value):
            raise BadStructure(
                f"the occupancy of site {label} is `{text}`; write 1 if it is full"
            )
        if value > 1:
            raise BadStructure(
                f"site {label} has occupancy {value:g}, which is more than one atom"
            )
        raise BadStructure(disordered(label, f"occupancy {value:g}"))


def _exact_thirds(frac: np.ndarray) -> np.ndarray:
    """Replace 0.3333 and 0.6667 by the fractions that they stand for."""
    for third in (1 / 3, 2 / 3):
        frac = np.where(np.abs(frac / third - 1) <= 1e-4, third, frac)
    return frac


@cache
def _electronegativity_rank() -> np.ndarray:
    """Return where pymatgen's order puts each atomic number, (101,)."""
    from pymatgen.core import Element

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noble gases have no electronegativity
        keys = [(Element.from_Z(z).X, symbols()[z]) for z in range(1, len(symbols()))]
    # Python cannot order NaN; noble gases go last, as the least willing to bind.
    ordered = sorted(
        range(1, len(symbols())),
        key=lambda z: (keys[z - 1][0] != keys[z - 1][0], keys[z - 1]),
    )
    rank = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)
    rank[ordered] = np.arange(MAX_ATOMIC_NUMBER)
    return rank


def _symmetry(
    block: gemmi.cif.Block, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rotations (M, 3, 3) and translations (M, 3) of a CIF block."""
    for tag in _OPERATIONS:
        listed = tuple(_plain(value) for value in block.find_values(tag))
        if any(_known(value) for value in listed):
            break
    else:
        listed = _named_group(block)
    rotations, translations = operations(listed)
    if len(rotations) > 1:
        check_setting(rotations, cell)
    return rotations, translations


def _named_group(block: gemmi.cif.Block) -> tuple[str, ...]:
    """Return the operations of the group that a block names; P1 if it names none."""

    def named(tags: tuple[str, ...]) -> str | None:
        values = (_plain(block.find_value(tag) or "?") for tag in tags)
        return next((value for value in values if _known(value)), None)

    if block.find_values("_space_group_symop_magn_operation.xyz"):
        raise BadStructure("magnetic symmetry is not read; write the file as plain CIF")
    alpha, _, gamma = (_number(block.find_value(f"_cell_{name}")) for name in _CELL[3:])
    return group_operations(
        named(_HALL), named(_HERMANN_MAUGUIN), named(_GROUP_NUMBER), alpha, gamma
    )


def _check_formula(block: gemmi.cif.Block, numbers: np.ndarray) -> None:
    """Refuse a file whose atoms are fewer than its formula says.

    It is how a file shows that it was cut between two atoms, or that hydrogens were
    never located. A formula with other elements says nothing: it was left behind by
    whoever substituted an element.
    """
    text = _plain(block.find_value("_chemical_formula_sum") or "?")
    stated = _amounts(text)
    counts = np.bincount(numbers)
    found = {z: int(counts[z]) for z in np.flatnonzero(counts).tolist()}
    if not stated or not found.keys() <= stated.keys():
        return
    units = len(numbers) / sum(stated.values())
    proportional = all(
        abs(found.get(z, 0) - amount * units) <= _FORMULA_TOLERANCE * amount * units
        for z, amount in stated.items()
    )
    whole = max(units, 1 / units)
    if proportional and abs(whole - round(whole)) <= _FORMULA_TOLERANCE * whole:
        return
    atoms = " ".join(f"{symbols()[z]}{n}" for z, n in found.items())
    raise BadStructure(
        f"its atoms ({atoms}) do not make up its formula ({text}): cut short, or atoms "
        "without coordinates; complete the file or mend `_chemical_formula_sum`"
    )


@lru_cache(maxsize=1024)
def _amounts(formula: str) -> dict[int, float]:
    """Read `Fe2 O3` as amounts by atomic number; nothing where it is written oddly."""
    amounts: dict[int, float] = {}
    for part in formula.split():
        match = _FORMULA_PART.fullmatch(part)
        z = species_number(match.group(1)) if match else 0
        if match is None or not z:
            return {}
        amounts[z] = amounts.get(z, 0.0) + float(match.group(2) or 1)
    return amounts
