"""Shards: the flat arrays of some hundred crystals, the unit of work of a build.

A shard depends only on its records and the settings. So any process can make it, it can
be made again after a crash, and shards can be merged in order. Without torch, worker
processes start in a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from crysdistill.corpus.filters import Filters
from crysdistill.errors import BadStructure
from crysdistill.files import whole
from crysdistill.graphs.neighbors import GraphSettings, Neighbors, find_neighbors
from crysdistill.sources.records import Record, parse
from crysdistill.store.fingerprints import NEIGHBORS, fingerprint, pack
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.symmetry import SYMPREC, Engine, space_groups

MAX_SHIFT_BITS = 7  # lattice translations stay within int8


@dataclass(frozen=True)
class Rejection:
    """One entry that did not become a crystal of the store."""

    source: str
    material_id: str
    reason: str


@dataclass(frozen=True)
class BuildSettings:
    """The treatment of every crystal in a build.

    Args:
        graph: how neighbours become edges.
        symmetry: the engine that finds space groups (at `SYMPREC`); None finds none.
        filters: limits; crystals outside them go to the quarantine table.
    """

    graph: GraphSettings
    symmetry: Engine | None = "fast"
    filters: Filters = field(default_factory=Filters)


def build_shard(
    records: Sequence[Record], properties: Sequence[str], settings: BuildSettings
) -> dict[str, np.ndarray]:
    """Turn records into the arrays of one shard.

    Args:
        records: the records in the order of their sources.
        properties: the names of the store's property columns.
        settings: the treatment of each crystal.

    Returns:
        The arrays by name; `rejections` holds refused entries and reasons as JSON.
    """
    crystals: list[Crystal] = []
    graphs: list[Neighbors] = []
    packed: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    sources: list[str] = []
    made_up: list[bool] = []
    rejections: list[tuple[str, ...]] = []
    for record in records:
        try:
            if record.problem is not None:
                raise BadStructure(record.problem)
            if _printable(record.material_id) != record.material_id:
                raise BadStructure("its name is not valid UTF-8; rename it")
            crystal = parse(record)
            _refuse(settings.filters.before_graph(crystal))
            graph = find_neighbors(crystal.frac_coords, crystal.cell, settings.graph)
            _refuse(settings.filters.after_graph(graph))
            packing = pack_edges(graph, len(crystal.atomic_numbers))
        except BadStructure as error:
            refused = (record.source, record.material_id, str(error))
            rejections.append(tuple(map(_printable, refused)))
            continue
        crystals.append(crystal)
        graphs.append(graph)
        packed.append(packing)
        sources.append(record.source)
        made_up.append(record.made_up)
    groups = [
        space_groups(c, settings.symmetry) if settings.symmetry else [0] * len(SYMPREC)
        for c in crystals
    ]
    profiles = [pack(fingerprint(c)) for c in crystals]
    codes = _flat([codes for codes, _, _ in packed], np.int32)
    counts = _flat([g.counts for g in graphs], np.int32)
    values = [[c.properties.get(name, np.nan) for name in properties] for c in crystals]
    return {
        "atoms": np.array([len(c.atomic_numbers) for c in crystals], np.int64),
        "edges": np.array([len(g.neighbor) for g in graphs], np.int64),
        "atomic_numbers": _flat([c.atomic_numbers for c in crystals], np.uint8),
        "frac_coords": _flat([c.frac_coords for c in crystals], np.float32, 3),
        "cells": np.array([c.cell for c in crystals], np.float32).reshape(-1, 3, 3),
        "neighbor_counts": counts,
        "most_neighbors": counts.max(initial=0),
        "edge_codes": codes,
        "highest_code": codes.max(initial=0),
        "shift_low": np.array([low for _, low, _ in packed], np.int8).reshape(-1, 3),
        "shift_bits": np.array([bits for _, _, bits in packed], np.uint8).reshape(
            -1, 3
        ),
        "species": np.array([len(p) for p in profiles], np.uint8),
        "fingerprints": _flat(profiles, np.uint16, 2 * NEIGHBORS),
        "space_groups": np.array(groups, np.uint8).reshape(-1, len(SYMPREC)),
        "properties": np.array(values, np.float64).reshape(
            len(crystals), len(properties)
        ),
        "material_ids": _json([c.material_id for c in crystals]),
        "id_digests": _digests([c.material_id for c in crystals]),
        "sources": _json(sources),
        "made_up": np.array(made_up, bool),
        "rejections": _json(rejections),
    }


def pack_edges(
    graph: Neighbors, atoms: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack the neighbour and its lattice translation into one integer per edge.

    A translation needs few bits, but the number differs between crystals: two for a
    large cell, four for a cell with a single atom. If the fields are as wide as the
    crystal needs, 16 bits hold almost every edge; a plain layout takes 40. The maximum
    is 31.

    Args:
        graph: the edges of one crystal.
        atoms: N, the number of its atoms.

    Returns:
        The codes (E,), the lowest translation (3,), and the bits of each field (3,):
        code = ((j << a | s_1 - low_1) << b | s_2 - low_2) << c | s_3 - low_3.

    Raises:
        BadStructure: the cell is so thin or so large that 32 bits do not suffice.
    """
    low = graph.shifts.min(axis=0)
    span = graph.shifts.max(axis=0) - low
    bits = np.array([int(s).bit_length() for s in span])
    if bits.max() > MAX_SHIFT_BITS or int(atoms - 1).bit_length() + bits.sum() > 31:
        raise BadStructure(
            f"its cell needs {int(bits.sum())} bits for lattice translations of "
            f"{atoms} atoms; use a reduced cell or a smaller `cutoff`"
        )
    code = graph.neighbor.astype(np.int64)
    for axis in range(3):
        code = (code << bits[axis]) | (graph.shifts[:, axis] - low[axis])
    return code, low, bits


def _refuse(reason: str | None) -> None:
    """Raise the reason of a filter, if there is one."""
    if reason is not None:
        raise BadStructure(reason)


def _printable(text: str) -> str:
    """Return text that can be written, since file names may hold any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a shard so that it appears whole or not at all."""
    # A worker may outlive a killed build by a moment, or continue after its cluster has
    # given it up.
    with whole(path, own=True) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_shard(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Read a shard back, all of it or the arrays of these names."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names or file.files}


def read_list(array: np.ndarray) -> list:
    """Read back a list that a shard keeps as JSON."""
    return json.loads(array.tobytes())


def _flat(
    arrays: list[np.ndarray], dtype: type, width: int | None = None
) -> np.ndarray:
    """Concatenate arrays; return an empty array if there are none."""
    if arrays:
        return np.concatenate(arrays).astype(dtype)
    return np.empty((0, width) if width else 0, dtype)


def _json(values: list) -> np.ndarray:
    """Keep a list of strings as the bytes of its JSON."""
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def _digests(ids: list[str]) -> np.ndarray:
    """Return a hash of each id, (B, 2) uint64, to find repeated ids."""
    digests = b"".join(xxhash.xxh3_128_digest(name.encode()) for name in ids)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def make_shard(
    path: Path,
    records: Sequence[Record],
    properties: Sequence[str],
    settings: BuildSettings,
) -> tuple[int, int]:
    """Build and write a shard; return the numbers of built and refused entries."""
    arrays = build_shard(records, properties, settings)
    write_shard(path, arrays)
    return len(arrays["atoms"]), len(read_list(arrays["rejections"]))
