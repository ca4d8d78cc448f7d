"""CIF, read strictly: the result is a crystal, or one line that says why not."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from functools import cache

import gemmi
import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.cif_block import Block, number, parse_cif
from crysdistill.structures.cif_counts import (
    check_formula,
    check_multiplicities,
    check_volume,
)
from crysdistill.structures.cif_sites import (
    has_atoms,
    is_placeholder,
    read_sites,
    site_table,
)
from crysdistill.structures.cif_symmetry import stated_symmetry
from crysdistill.structures.crystal import Crystal, validate
from crysdistill.structures.elements import MAX_ATOMIC_NUMBER, symbols
from crysdistill.structures.operations import SAME_SITE, check_setting, expand
from crysdistill.structures.settings import Setting
from crysdistill.structures.text import as_text

_CELL = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
_HEADER = re.compile(r"^[ \t]*data_", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """One data block of a CIF that holds several.

    Args:
        name: of the block.
        content: a CIF with only this block.
        problem: why it is not a crystal; "" if it may be one.
    """

    name: str
    content: bytes
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Reading:
    """The crystal of a block in one setting, and whether the file's counts prove it."""

    setting: Setting
    crystal: Crystal
    proven: bool


def read_cif(data: bytes, material_id: str) -> Crystal:
    """Read the first block with atoms of a CIF.

    Symmetry is expanded to the full cell. Atoms come in pymatgen's order, by
    electronegativity and then as written, because the published graphs treat atom 0
    specially. Coordinates within 1e-4 of 1/3 and 2/3 become these fractions, as in
    pymatgen. The crystal must agree with the other statements of the file: its formula,
    Z, multiplicities, volume, and its symmetry under other tags.

    Args:
        data: the content of the file.
        material_id: the name of the crystal.

    Raises:
        BadStructure: the file is damaged, is disordered, contradicts itself, leaves its
            symmetry open, names an unknown element, lacks a value, or cannot be a
            crystal.
    """
    block = _block_with_atoms(data)
    cell = _cell(block)
    check_volume(block, abs(float(np.linalg.det(cell))))
    table = site_table(block)
    labels, numbers, frac = read_sites(block, table)
    frac = _exact_thirds(frac)
    symmetry = stated_symmetry(block)
    readings: list[_Reading] = []
    refusals: list[BadStructure] = []
    for setting in symmetry.settings:
        try:
            readings.append(
                _read_in(setting, block, material_id, (labels, numbers, frac, cell))
            )
        except BadStructure as refusal:
            refusals.append(refusal)
    stated = len(symmetry.settings[0].operations[0]) > 1
    if not readings and not (stated and symmetry.doubt):
        raise refusals[0]
    if symmetry.doubt and not (readings and readings[0].proven):
        raise BadStructure(symmetry.doubt)
    if len(readings) > 1 and not _same_atoms(readings[0].crystal, readings[1].crystal):
        _refuse_two_origins(readings)
    return readings[0].crystal


def split_cif(data: bytes) -> list[Part]:
    """Return the blocks of a multi-block CIF that are, or should be, crystals.

    Blocks without a cell and without atoms describe the measurement. Blocks whose only
    atoms are `?` are templates. Neither is a crystal. A cell without atoms is a crystal
    that lost them. A file with one block, by far the most common, is not parsed here.

    Returns:
        Nothing if there is only one block.

    Raises:
        BadStructure: the file has several blocks but is damaged.
    """
    if len(_HEADER.findall(as_text(data))) < 2:
        return []
    document = parse_cif(data)
    if len(document) < 2:
        return []
    found = []
    for parsed in document:
        block = Block(parsed)
        problem = ""
        if is_placeholder(block):
            continue
        if not has_atoms(block):
            if not math.isfinite(number(block.value("_cell_length_a") or "?")):
                continue
            problem = (
                "has a cell but no atoms (`_atom_site_fract_x`); add them or remove "
                "the block"
            )
        single = gemmi.cif.Document()
        single.add_copied_block(parsed)
        found.append(Part(parsed.name, single.as_string().encode(), problem))
    return found


def _block_with_atoms(data: bytes) -> Block:
    """Return the first block that lists atoms."""
    blocks = [Block(parsed) for parsed in parse_cif(data)]
    listing = [block for block in blocks if has_atoms(block)]
    for block in listing:
        if not is_placeholder(block):
            return block
    if listing:
        raise BadStructure(
            "its only atoms are placeholders (`?`); add the atom sites or remove the "
            "entry"
        )
    raise BadStructure(
        "no atoms (`_atom_site_fract_x`): cut short, or not a crystal structure; get "
        "the file again"
    )


def _read_in(
    setting: Setting,
    block: Block,
    material_id: str,
    sites: tuple[list[str], np.ndarray, np.ndarray, np.ndarray],
) -> _Reading:
    """Make the cell's atoms in one setting, and check them by the file's counts."""
    labels, numbers, frac, cell = sites
    rotations, translations = setting.operations
    site = np.arange(len(numbers))
    if len(rotations) > 1:
        check_setting(rotations, cell)
        frac, site = expand(frac, rotations, translations, cell)
    atoms = numbers[site]
    order = np.argsort(_electronegativity_rank()[atoms], kind="stable")
    crystal = validate(Crystal(material_id, atoms[order], frac[order], cell))
    images = np.bincount(site, minlength=len(numbers))
    proven = check_multiplicities(site_table(block), labels, images, len(rotations))
    proven |= check_formula(block, crystal.atomic_numbers)
    return _Reading(setting, crystal, proven)


def _same_atoms(one: Crystal, other: Crystal) -> bool:
    """Whether two readings have the same atoms at the same places."""
    if one.atomic_numbers.tolist() != other.atomic_numbers.tolist():
        return False
    delta = one.frac_coords[:, None] - other.frac_coords
    delta = (delta - np.rint(delta)) @ one.cell
    alike = one.atomic_numbers[:, None] == other.atomic_numbers
    near = np.einsum("ijk,ijk->ij", delta, delta) < SAME_SITE**2
    return bool((near & alike).any(axis=1).all())


def _refuse_two_origins(readings: list[_Reading]) -> None:
    """Refuse a file that does not state its origin, with the atoms for each origin."""
    name, _, _ = readings[0].setting.name.partition(":")
    counts = " and ".join(
        f"{len(r.crystal.atomic_numbers)} atoms with `{r.setting.name}`"
        for r in readings
    )
    raise BadStructure(
        f"`{name}` has two origins and the file does not say which: {counts}; write "
        "one of these symbols, or list the symmetry operations"
    )


def _cell(block: Block) -> np.ndarray:
    """Return the cell (3, 3) oriented as in pymatgen: c along z, a in the xz plane."""
    values = []
    for name in _CELL:
        tag = f"_cell_{name}"
        text = next(iter(block.column(tag)), None)
        if text is None:
            raise BadStructure(f"no `{tag}`: cut short, or no cell; complete the cell")
        text = block.value(tag) or text
        value = number(text)
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
        raise BadStructure(f"the angles {angles} form no cell (impossible); mend them")
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


def _exact_thirds(frac: np.ndarray) -> np.ndarray:
    """Replace 0.3333 and 0.6667 by exact thirds."""
    for third in (1 / 3, 2 / 3):
        frac = np.where(np.abs(frac / third - 1) <= 1e-4, third, frac)
    return frac


@cache
def _electronegativity_rank() -> np.ndarray:
    """Return the rank of each atomic number in pymatgen's order, (101,)."""
    from pymatgen.core import Element

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noble gases have no electronegativity
        keys = [(Element.from_Z(z).X, symbols()[z]) for z in range(1, len(symbols()))]
    # Python cannot order NaN. Noble gases go last, because they hardly bind.
    ordered = sorted(
        range(1, len(symbols())),
        key=lambda z: (keys[z - 1][0] != keys[z - 1][0], keys[z - 1]),
    )
    rank = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)
    rank[ordered] = np.arange(MAX_ATOMIC_NUMBER)
    return rank
