"""An entry of a JSON file: its structure, its id and its labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from crysdistill.errors import BadStructure
from crysdistill.sources.cells import number
from crysdistill.sources.identity import ID_KEYS, IdSurvey, entry_id, is_id_key
from crysdistill.sources.records import (
    STRUCTURE_KEYS,
    Record,
    layout_of,
    structure_key,
    structure_of,
)

_NOT_KNOWN = "na"
"""JARVIS writes this for a property that it has not calculated."""

_EMPTY = ("", "nan", "none", "null", "n/a", _NOT_KNOWN)
"""Texts that mean an unknown number in files that write numbers as text."""

_OWN = {
    *("lattice", "species", "frac", "sites", "charge", "properties", "pbc"),
    *("lattice_mat", "coords", "elements", "abc", "angles", "cartesian", "props"),
    *("@module", "@class", "@version", "problem"),
}
"""Keys that belong to a structure and are no labels, even beside labels."""

_INSIDE = ("properties", "labels", "targets", "target")
"""Keys of an entry that may hold all its labels, by name."""

_WITH_UNIT = re.compile(r"[+-]?\d+(\.\d+)?\s+[A-Za-zÅµ/%].*")


def labels_beside(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of an entry that may be labels, by name."""
    key = structure_key(entry)
    alone = key is None  # the labels stand within the structure
    found: dict[str, Any] = {}
    for name in _INSIDE:
        inner = entry.get(name)
        if isinstance(inner, Mapping):
            found.update(inner)
    own = _OWN if alone else {key}
    return found | {n: value for n, value in entry.items() if n not in own}


@dataclass
class Survey:
    """The id keys and labels that the entries of a file share.

    A key beside a structure is a label if any entry holds a number there, as a number
    or as text. Beside the `atoms` of JARVIS it may hold numbers only, because some of
    its keys hold a number in one entry and a list or a name in the next.
    """

    ids: IdSurvey = field(default_factory=IdSurvey)
    _numbers: dict[str, None] = field(default_factory=dict)
    _mixed: set[str] = field(default_factory=set)
    _as_text: dict[str, list[int]] = field(default_factory=dict)
    _examples: dict[str, str] = field(default_factory=dict)
    _structures: set[str] = field(default_factory=set)

    def add(self, entry: Any, labels: bool = True) -> None:
        """Look at one entry.

        Args:
            entry: the parsed JSON of the entry.
            labels: whether to look for labels.
        """
        if not isinstance(entry, Mapping):
            return
        self.ids.add(entry)
        self._structures.update(key for key in STRUCTURE_KEYS if key in entry)
        if not labels:
            return
        for key, value in labels_beside(entry).items():
            if isinstance(value, int | float):
                if not isinstance(key, str) or key not in ID_KEYS:
                    self._numbers[key] = None
            elif isinstance(value, str) and value.strip().lower() not in _EMPTY:
                self._note_text(key, value)
                if "atoms" in entry and number(value) is None:
                    self._mixed.add(key)
            elif "atoms" in entry and value is not None and value != _NOT_KNOWN:
                self._mixed.add(key)

    def _note_text(self, key: str, value: str) -> None:
        counts = self._as_text.setdefault(key, [0, 0, 0])
        kind = 0 if number(value) is not None else 1 if _WITH_UNIT.match(value) else 2
        counts[kind] += 1
        if kind == 1:
            self._examples.setdefault(key, value)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the labels."""
        ids = self.ids.keys
        found = dict(self._numbers)
        for key, (numbers, *others) in self._as_text.items():
            if key not in ids and not is_id_key(key) and numbers >= sum(others):
                found[key] = None
        return tuple(n for n in found if n not in self._mixed and n not in ids)

    def remarks(self, path: object) -> list[str]:
        """Return remarks for the user on how the entries are read."""
        said = [
            f"{path}: `{key}` holds text such as `{example}`, so it is not read as a "
            "label; write only the number"
            for key, example in self._examples.items()
            if key not in self.names
        ]
        used = [key for key in STRUCTURE_KEYS if key in self._structures]
        if len(used) > 1:
            others = ", ".join(f"`{key}`" for key in used[1:])
            said.append(
                f"{path}: structures are read from `{used[0]}`; {others} is ignored"
            )
        return said


def label_values(
    entry: Mapping[str, Any], names: Iterable[str], na: bool = False
) -> dict[str, float]:
    """Return the known labels of an entry.

    Args:
        entry: labels by name.
        names: the labels to read.
        na: whether "na" means an unknown value.

    Raises:
        BadStructure: a label is not a finite number.
    """
    values: dict[str, float] = {}
    for key in names:
        value = entry.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if isinstance(value, str):
            if value.strip().lower() in _EMPTY and (na or value != _NOT_KNOWN):
                continue
            value = number(value) if number(value) is not None else value
        if not isinstance(value, int | float) or not _is_finite(value):
            shown = " ".join(str(value).split())[:60]
            raise BadStructure(
                f"`{key}` is `{shown}`, not a finite number; mend it, or write null"
            )
        values[key] = float(value)
    return values


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def entry_record(
    entry: Any,
    payload: Any,
    source: str,
    name: str,
    names: tuple[str, ...],
    place: str = "",
    keys: tuple[str, ...] = ID_KEYS,
    made_up: bool = True,
) -> Record:
    """Return the record of one entry.

    Args:
        entry: the parsed JSON of the entry.
        payload: the input of the reader.
        source: the name of the source.
        name: the id of an entry that has none itself.
        names: the labels to read.
        place: the place of the entry in the source.
        keys: the keys that may hold the id.
        made_up: whether the program made up `name`.
    """
    if not isinstance(entry, dict):
        record = Record(source, name, place=place)
        return record.refuse("not a structure; give a dictionary with its lattice")
    own = entry_id(entry, keys if made_up else ID_KEYS)
    record = Record(source, own or name, place=place, made_up=made_up and not own)
    if isinstance(entry.get("problem"), str) and not entry.get("structure"):
        return record.refuse(entry["problem"])  # what a service could not hand out
    structure = structure_of(entry)
    if structure is entry and isinstance(entry.get("cif"), str):
        structure = entry["cif"]
    if isinstance(structure, str) and "_cell_length_a" in structure:
        layout: str | None = "cif"
        payload = structure.encode("utf-8", "replace")
    elif not isinstance(structure, dict):
        key = structure_key(entry) or "structure"
        return record.refuse(f"`{key}` holds no structure; add it or remove the entry")
    else:
        layout = layout_of(structure)
    if layout is None:
        return record.refuse(
            "no structure; give `lattice`, `species` and `frac`, or pymatgen's "
            "`Structure.as_dict()`"
        )
    try:
        values = label_values(labels_beside(entry), names, layout == "jarvis")
    except BadStructure as error:
        return record.refuse(str(error))
    return Record(
        source, record.material_id, layout, payload, values, None, place, record.made_up
    )
