"""Space groups by name: Hall and Hermann-Mauguin symbols, numbers, settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache

import gemmi
import numpy as np

from crysdistill.errors import BadStructure
from crysdistill.structures.operations import Operations, operations

_ORIGIN = re.compile(
    r"\s*(?:[:;]\s*|[(,\[]?\s*(?:origin(?:\s*choice)?\s*(?:no\.?)?|setting)\s*|\s+O)"
    r"([12])\s*[)\]]?\s*$",
    re.IGNORECASE,
)
_ICSD_ORIGIN = re.compile(r"\s*:?([SZ])$")
_AXES = re.compile(r"\s*[(\[:,]?\s*(hex|rhomb)\w*\.?(\s*axes)?\s*[)\]]?\s*$", re.I)


@dataclass(frozen=True)
class Setting:
    """One setting of a space group.

    Args:
        name: its extended Hermann-Mauguin symbol, such as `F d -3 m:2`; "" for a list
            of operations.
        number: 1-230; 0 if only operations are known.
        operations: rotations (M, 3, 3) and translations (M, 3).
    """

    name: str
    number: int
    operations: Operations


def from_hall(hall: str) -> tuple[Setting, ...]:
    """Return the setting of a Hall symbol, which is unambiguous; () if unknown."""
    try:
        found = gemmi.symops_from_hall(hall)
    except RuntimeError:
        return ()
    listed = operations(tuple(op.triplet() for op in found))
    return (Setting(hall, group_number(listed), listed),)


def from_symbol(
    symbol: str, code: str | None, alpha: float, gamma: float
) -> tuple[Setting, ...]:
    """Return the settings that a Hermann-Mauguin symbol may mean; () if unknown.

    Args:
        symbol: with or without spaces and origin.
        code: of the coordinate system, such as `2`, `b1`, `cab` or `H`.
        alpha: degrees; with `gamma` it distinguishes rhombohedral and hexagonal axes.
        gamma: degrees.

    Raises:
        BadStructure: symbol and code exclude each other.
    """
    # pymatgen writes P21/c as P2_1/c; S and Z are ICSD's origins 1 and 2.
    text = _ORIGIN.sub(r":\1", symbol.replace("_", "").strip())
    text = _ICSD_ORIGIN.sub(lambda m: ":1" if m.group(1) == "S" else ":2", text)
    text = _AXES.sub(lambda m: ":H" if m.group(1).lower() == "hex" else ":R", text)
    group = gemmi.find_spacegroup_by_name(text, alpha, gamma)
    if group is None:
        return ()
    if re.search(r":[12]$", text):
        return (_setting(group),)
    return _narrowed(_siblings(group), symbol, code)


def from_number(
    number: str, code: str | None, alpha: float, gamma: float
) -> tuple[Setting, ...]:
    """Return the settings that a number may mean, in the reference setting.

    Raises:
        BadStructure: there is no such group, or it does not have this code.
    """
    group = gemmi.find_spacegroup_by_name(_group(number).hm, alpha, gamma)
    return _narrowed(_siblings(group), number, code)


@lru_cache(maxsize=256)
def point_group_order(number: str) -> int:
    """Return the number of rotations of a numbered group, 1-48; 0 if there is none."""
    try:
        return len(list(_group(number).operations().sym_ops))
    except BadStructure:
        return 0


def group_number(listed: Operations) -> int:
    """Return the number of the group of some operations; 0 in an unusual setting.

    Args:
        listed: rotations (M, 3, 3) and translations (M, 3).
    """
    return _number_of(*(array.tobytes() for array in listed))


@lru_cache(maxsize=512)
def _number_of(rotations: bytes, translations: bytes) -> int:
    parts = gemmi.Op.DEN
    scaled = np.rint(np.frombuffer(rotations) * parts).astype(int).reshape(-1, 3, 3)
    shifts = np.rint(np.frombuffer(translations) * parts).astype(int).reshape(-1, 3)
    found = []
    for rotation, shift in zip(scaled.tolist(), (shifts % parts).tolist(), strict=True):
        operation = gemmi.Op()
        operation.rot, operation.tran = rotation, shift
        found.append(operation)
    try:
        group = gemmi.find_spacegroup_by_ops(gemmi.GroupOps(found))
    except (RuntimeError, ValueError):
        return 0
    return group.number if group is not None else 0


def _group(number: str) -> gemmi.SpaceGroup:
    group = None
    if re.fullmatch(r"\d{1,3}(\.0*)?", number):
        group = gemmi.find_spacegroup_by_number(int(float(number)))
    if group is None or group.number != float(number):
        raise BadStructure(f"no space group has number `{number}`; mend it")
    return group


def _setting(group: gemmi.SpaceGroup) -> Setting:
    triplets = tuple(op.triplet() for op in group.operations())
    return Setting(group.xhm(), group.number, operations(triplets))


@cache
def _table() -> list[gemmi.SpaceGroup]:
    return list(gemmi.spacegroup_table())


def _siblings(group: gemmi.SpaceGroup) -> list[gemmi.SpaceGroup]:
    """Return a group with both origins if it has two, else the group alone."""
    if group.ext not in ("1", "2"):
        return [group]
    return [
        g
        for g in _table()
        if (g.number, g.hm, g.qualifier) == (group.number, group.hm, group.qualifier)
    ]


def _narrowed(
    groups: list[gemmi.SpaceGroup], name: str, code: str | None
) -> tuple[Setting, ...]:
    """Return the settings that a coordinate system code allows."""
    code = (code or "").strip().lower()
    number = groups[0].number
    found = [g for g in groups if code in _codes(g)]
    if code and not found:
        others = [g for g in _table() if g.number == number and code in _codes(g)]
        bare = _bare(groups[0])
        found = [g for g in others if name.isdigit() or _bare(g) == bare]
        if others and not found:
            raise BadStructure(
                f"`{name}` does not go with its coordinate system code `{code}`, which "
                f"means `{others[0].xhm()}`; mend either"
            )
    return tuple(_setting(group) for group in found or groups)


def _codes(group: gemmi.SpaceGroup) -> set[str]:
    """Return the codes that mean a setting; `1` and `abc` if it has no other."""
    ext = group.ext.strip("\0").lower()
    codes = {ext + group.qualifier, ext, group.qualifier} - {""}
    if group.ext not in ("1", "2"):
        codes |= {"1", "abc"} if not codes else set()
    return codes


def _bare(group: gemmi.SpaceGroup) -> str:
    """Return `P21/c` for `P 1 21/c 1`: the symbol without its empty axes."""
    return "".join(word for word in group.hm.split() if word != "1")
