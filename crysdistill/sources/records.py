"""A record: one entry of a source, cheap to make and parsed later by a worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from crysdistill.errors import BadStructure
from crysdistill.store.origins import Origin
from crysdistill.structures.cif import read_cif
from crysdistill.structures.crystal import Crystal, validate
from crysdistill.structures.poscar import read_poscar
from crysdistill.structures.readers import (
    read_bytes,
    read_cssr,
    read_extxyz,
    read_flat,
    read_gen,
    read_jarvis,
    read_pymatgen,
    read_res,
)


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a source: a structure to parse, or the reason to refuse it.

    Args:
        source: the file or folder as the user named it.
        material_id: the id in the file, else the file's stem.
        format: `cif`, `poscar`, `res`, `cssr`, `gen`, `extxyz`, `flat`, `pymatgen`,
            `jarvis`, `json` (one of the last three), `crystal`, or `none`.
        payload: the path of a file, its bytes, a line or an entry of JSON, or a
            crystal.
        properties: known labels by name.
        problem: the reason why it goes straight to quarantine.
        place: its place in the source, unless `material_id` shows it.
        made_up: whether the program made up `material_id`, since the source has none.
    """

    source: str
    material_id: str
    format: str = "none"
    payload: bytes | str | dict[str, Any] | Crystal | None = None
    properties: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    place: str = ""
    made_up: bool = False

    def refuse(self, reason: str) -> Record:
        """Return this record with a reason that sends it to quarantine."""
        return replace(
            self, format="none", payload=None, problem=_placed(self.place, reason)
        )


@dataclass
class Source:
    """A source of structures.

    Args:
        path: the path as the user named it.
        records: starts reading from the beginning.
        count: the estimated number of records, for progress bars.
        properties: the names of its labels.
        contents: hashes the content of its files, to recognise a changed source.
        origins: the databases and publications that it names.
        remarks: remarks for the user on how it is read.
    """

    path: Path
    records: Callable[[], Iterator[Record]]
    count: int | None
    properties: tuple[str, ...]
    contents: Callable[[], str]
    origins: tuple[Origin, ...] = ()
    remarks: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """The hash of its files' content, wherever they lie; reads them once."""
        return self.contents()


def parse(record: Record) -> Crystal:
    """Read and check the structure of a record.

    Raises:
        BadStructure: it cannot be read; the text names the cause.
    """
    if record.problem is not None:
        raise BadStructure(record.problem)
    try:
        crystal = _READERS[record.format](record)
    except BadStructure as error:
        raise BadStructure(_placed(record.place, str(error))) from None
    except Exception as error:  # one entry must not stop the others
        text = " ".join(str(error).split())[:160]
        reason = (
            f"cannot be read as {record.format} ({type(error).__name__}: {text}); mend "
            "it or remove it"
        )
        raise BadStructure(_placed(record.place, reason)) from error
    return replace(crystal, properties=record.properties)


def _placed(place: str, reason: str) -> str:
    return f"{place}: {reason}" if place else reason


def _content(record: Record) -> bytes:
    if isinstance(record.payload, bytes):
        return record.payload
    return read_bytes(str(record.payload))


def _entry(record: Record) -> Mapping[str, Any]:
    """Return the dictionary that describes the structure of an entry."""
    if isinstance(record.payload, Mapping):
        entry = record.payload
    else:
        entry = load_json(_content(record))
    return structure_of(entry)


STRUCTURE_KEYS = (
    "structure",
    "atoms",
    "final_structure",
    "relaxed_structure",
    "initial_structure",
    "unrelaxed_structure",
)
"""Keys that may hold the structure of an entry; the first present key counts."""


def structure_key(entry: Mapping[str, Any]) -> str | None:
    """Return the key that holds an entry's structure; None if the entry is one."""
    known = next((key for key in STRUCTURE_KEYS if key in entry), None)
    if known is not None or layout_of(entry) is not None:
        return known
    called = (key for key in entry if str(key).lower().endswith("structure"))
    return next(called, None)


def structure_of(entry: Mapping[str, Any]) -> Any:
    """Return the description of an entry's structure, parsed if it is JSON text."""
    key = structure_key(entry)
    found = entry if key is None else entry[key]
    if isinstance(found, str) and found.lstrip()[:1] == "{":
        try:
            return load_json(found.encode())
        except ValueError:
            return found
    return found


def layout_of(structure: Mapping[str, Any]) -> str | None:
    """Return the format of a dictionary that describes a structure, or None."""
    if "sites" in structure or "@class" in structure:
        return "pymatgen"
    if "lattice_mat" in structure:
        return "jarvis"
    if structure.keys() & {"lattice", "species", "frac"}:
        return "flat"
    return None


def _json(record: Record) -> Crystal:
    """Read a file that should hold one structure."""
    try:
        entry = load_json(_content(record))
    except ValueError as error:
        raise BadStructure(
            f"not valid JSON ({error}): damaged or cut short; get the file again"
        ) from None
    if isinstance(entry, dict):
        record = replace(record, payload=entry)
        structure = _entry(record)
        layout = layout_of(structure) if isinstance(structure, dict) else None
        if layout is not None:
            return _READERS[layout](record)
    raise BadStructure("not one structure; give it as a source of its own")


def _crystal(record: Record) -> Crystal:
    if not isinstance(record.payload, Crystal):
        raise TypeError("a record of format `crystal` must hold a Crystal")
    return validate(replace(record.payload, material_id=record.material_id))


_READERS: dict[str, Callable[[Record], Crystal]] = {
    "cif": lambda record: read_cif(_content(record), record.material_id),
    "poscar": lambda record: read_poscar(_content(record), record.material_id),
    "res": lambda record: read_res(_content(record), record.material_id),
    "cssr": lambda record: read_cssr(_content(record), record.material_id),
    "gen": lambda record: read_gen(_content(record), record.material_id),
    "extxyz": lambda record: read_extxyz(_content(record), record.material_id),
    "json": _json,
    "flat": lambda record: read_flat(_entry(record), record.material_id),
    "pymatgen": lambda record: read_pymatgen(_entry(record), record.material_id),
    "jarvis": lambda record: read_jarvis(_entry(record), record.material_id),
    "crystal": _crystal,
}


def load_json(data: bytes) -> Any:
    """Parse JSON, including the NaN that Python writes.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
