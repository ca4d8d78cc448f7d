"""The symmetry that a CIF states under any tag; never P1 merely for want of a tag.

Tags are those of the core dictionary (older and newer), of its dotted form, of mmCIF
and of the magnetic dictionary (older and newer). The spatial parts of magnetic
operations move the atoms; time reversal affects only the moments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.cif_block import Block, known, number, plain
from crysdistill.structures.operations import Operations, check_group, operations
from crysdistill.structures.settings import (
    Setting,
    from_hall,
    from_number,
    from_symbol,
    group_number,
    point_group_order,
)

_OPERATIONS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
_MAGNETIC = "_space_group_symop_magn_operation_xyz"
_CENTERING = "_space_group_symop_magn_centering_xyz"
_HALL = ("_space_group_name_hall", "_symmetry_space_group_name_hall")
_SYMBOL = (
    "_space_group_name_h-m_alt",
    "_symmetry_space_group_name_h-m",
    "_space_group_name_h-m",
    "_space_group_name_h-m_full",
    "_symmetry_space_group_name_h-m_full",
    "_symmetry_pdbx_full_space_group_name_h-m",
)
_NUMBER = ("_space_group_it_number", "_symmetry_int_tables_number")
_CODE = (
    "_space_group_it_coordinate_system_code",
    "_symmetry_it_coordinate_system_code",
    "_symmetry_int_tables_coordinate_system_code",
)
_MAGNETIC_NAMES = re.compile(
    r"_(magnetic_space_group|space_group_magn)_.*(name|number)"
)
_SPEAKS_OF_SYMMETRY = re.compile(
    r"space_?group|symmetry|symop|_magn_|laue|crystal_system|sg_symbol|h-m|_hall"
)
_NOT_OF_THE_GROUP = re.compile(
    r"^_(geom|atom|hbond|journal|publ|refln|diffrn|exptl)_|_(id|details|ref_setting)$"
)
_TRIVIAL = re.compile(
    r"p ?1(1'|\.1')?|1|1\.[12](\.\d+)?|c_?1(\^1)?|x, ?y, ?z(, ?\+?1)?|mx, ?my, ?mz"
    r"|a, ?b, ?c; ?0, ?0, ?0|triclinic|anorthic|none|unknown|n/?a",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\.?\d*([b-zA])")


@dataclass(frozen=True)
class Symmetry:
    """The symmetry that a file states.

    Args:
        settings: the groups that it may mean; only one if it is clear.
        doubt: a contradiction in the file; the file's own count of its atoms may
            resolve it.
    """

    settings: tuple[Setting, ...]
    doubt: str | None = None


def stated_symmetry(block: Block) -> Symmetry:
    """Return the symmetry of a block.

    Raises:
        BadStructure: it is modulated, cannot be read, or has two names that exclude
            each other.
    """
    _check_modulation(block)
    alpha, gamma = (
        number(block.value(f"_cell_angle_{angle}") or "?")
        for angle in ("alpha", "gamma")
    )
    stated_number, code = block.first(_NUMBER), block.first(_CODE)
    lists = list(_listed(block))
    if lists:  # operations apply to the cell as it is, in any setting
        code = None
    named = [(hall, from_hall(hall)) for hall in _values(block, _HALL)]
    named += [
        (symbol, from_symbol(symbol, code, alpha, gamma))
        for symbol in _values(block, _SYMBOL)
    ]
    if stated_number is not None and not named and not lists:
        named.append((stated_number, from_number(stated_number, code, alpha, gamma)))
    readable = [(name, settings) for name, settings in named if settings]
    chosen: tuple[Setting, ...]
    if lists:
        chosen = (Setting("", group_number(lists[0]), lists[0]),)
        says = f"lists {_count(len(lists[0][0]))}"
    elif readable:
        name, chosen = readable[0]
        says = f"names `{name}` with {_count(len(chosen[0].operations[0]))}"
    elif named:
        raise BadStructure(
            f"the space group `{named[-1][0]}` is not known and no symmetry operations "
            "are listed; add `_space_group_symop_operation_xyz`"
        )
    else:
        hint = _hint(block)
        mend = (
            ", but no symmetry operations and no space group are read; add "
            "`_space_group_symop_operation_xyz`"
        )
        return Symmetry(_P1, hint + mend if hint else None)
    doubt = _doubt(says, chosen, lists, readable, stated_number)
    if doubt is None and len(chosen[0].operations[0]) == 1:
        doubt = _magnetic_name(says, block)
    mend = "; complete the symmetry operations or mend the name"
    return Symmetry(chosen, doubt + mend if doubt else None)


def _values(block: Block, tags: Sequence[str]) -> list[str]:
    """Return all values of some tags."""
    found = (block.value(tag) for tag in tags)
    return list(dict.fromkeys(value for value in found if value is not None))


def _check_modulation(block: Block) -> None:
    """Refuse modulated crystals, whose atoms are not at their average positions."""
    dimension = block.value("_cell_modulation_dimension")
    if (dimension is not None and number(dimension) > 0) or any(
        "_ssg_" in tag and any(map(known, map(plain, values)))
        for tag, values in block.tags()
    ):
        raise BadStructure(
            "a modulated structure (superspace group), which is not read; write a "
            "commensurate approximant"
        )


def _listed(block: Block) -> Iterator[Operations]:
    """Yield each list of operations: plain ones first, then magnetic ones."""
    for tag in _OPERATIONS:
        triplets = tuple(block.column(tag))
        if any(map(known, triplets)):
            yield check_group(operations(triplets))
    triplets = tuple(block.column(_MAGNETIC))
    if any(map(known, triplets)):
        centering = tuple(t for t in block.column(_CENTERING) if known(t))
        rotations, shifts = operations(tuple(map(_spatial, triplets)))
        _, centers = operations(tuple(map(_spatial, centering or ("x,y,z",))))
        yield check_group(
            (
                np.tile(rotations, (len(centers), 1, 1)),
                (centers[:, None] + shifts).reshape(-1, 3),
            )
        )


def _spatial(triplet: str) -> str:
    """Return `x,y,z` of `x,y,z,+1`."""
    return ",".join(triplet.split(",")[:3])


def _count(operations: int) -> str:
    return f"{operations} symmetry operation{'s' * (operations != 1)}"


_P1 = (Setting("P 1", 1, operations(("x,y,z",))),)


def _doubt(
    says: str,
    chosen: tuple[Setting, ...],
    lists: list[Operations],
    named: list[tuple[str, tuple[Setting, ...]]],
    stated_number: str | None,
) -> str | None:
    """Return how a file contradicts itself; None if it does not."""
    order, number = len(chosen[0].operations[0]), chosen[0].number
    for other in lists[1:]:
        if len(other[0]) != order:
            return f"it {says}, but {len(other[0])} under another tag"
    # Many programs write P 1 by default; a longer list of operations overrules it.
    default = bool(lists) and order > 1
    for name, settings in named:
        theirs, their_number = len(settings[0].operations[0]), settings[0].number
        if default and theirs == 1:
            continue
        if theirs != order:
            return f"it {says}, but names `{name}`, which has {theirs}"
        if number and their_number and number != their_number:
            return (
                f"it {says}, which is number {number}, but names `{name}`, which is "
                f"number {their_number}"
            )
    expected = point_group_order(stated_number or "0")
    if not expected or (default and expected == 1):
        return None
    rotations = len(np.unique(np.rint(chosen[0].operations[0]), axis=0))
    if rotations != expected:
        return (
            f"it {says} ({rotations} without translations), but gives the space group "
            f"number {stated_number}, which has {expected}"
        )
    if number and float(stated_number or 0) != number:
        return f"it {says}, which is number {number}, but gives number {stated_number}"
    return None


def _magnetic_name(says: str, block: Block) -> str | None:
    """Return the magnetic group that a file names beside P1; None if there is none."""
    for tag, values in block.tags():
        for value in map(plain, values) if _MAGNETIC_NAMES.match(tag) else ():
            if known(value) and not _TRIVIAL.fullmatch(value):
                return f"it {says}, but `{tag}` is `{value}`"
    return None


def _hint(block: Block) -> str | None:
    """Return a hint of symmetry in a file without operations and without a group."""
    for tag, values in block.tags():
        if not _SPEAKS_OF_SYMMETRY.search(tag) or _NOT_OF_THE_GROUP.search(tag):
            continue
        for value in map(plain, values):
            if known(value) and not _TRIVIAL.fullmatch(value):
                return f"`{tag}` is `{value}`"
    for value in map(plain, block.column("_atom_site_wyckoff_symbol")):
        if _LETTER.fullmatch(value):
            return f"a site has the Wyckoff position `{value}`"
    return None
