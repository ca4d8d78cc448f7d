"""Merging shards into one store, in order, with one shard in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from rich.progress import Progress

from crysdistill.corpus.shards import Rejection, read_list, read_shard
from crysdistill.files import check_space, whole
from crysdistill.store.checks import structures_hash
from crysdistill.store.fingerprints import NEIGHBORS
from crysdistill.store.layout import FORMAT, MADE_UP, SCHEMA

_HASHED_ROWS = 1 << 22  # rows of a dataset that are hashed at a time


# The few arrays of a shard that a survey reads.
_SURVEYED = (
    *("atoms", "edges", "species", "material_ids", "made_up", "sources", "rejections"),
)


@dataclass
class _Survey:
    """The result of a first pass over the shards: sizes, and the crystals to keep."""

    keep: list[np.ndarray] = field(default_factory=list)
    atoms: list[np.ndarray] = field(default_factory=list)
    edges: list[np.ndarray] = field(default_factory=list)
    species: list[np.ndarray] = field(default_factory=list)
    id_bytes: list[np.ndarray] = field(default_factory=list)
    made_up: list[np.ndarray] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    most_neighbors: int = 0
    highest_code: int = 0


def merge_shards(
    paths: Sequence[Path],
    out: Path,
    facts: dict[str, Any],
    drop: Mapping[int, str] | None = None,
    progress: bool = False,
) -> tuple[int, list[Rejection]]:
    """Write the store of all shards; a repeated `material_id` is refused.

    The file appears whole or not at all, and not at all without a crystal. Its bytes
    depend only on the shards, on `facts` and on `drop`.

    Args:
        paths: the shards, in order.
        out: the store to write.
        facts: the description of the store, as plain values.
        drop: reasons to refuse crystals, by their row in the store without `drop`.
        progress: whether to show a progress bar.

    Returns:
        The number of crystals, and all refused entries.
    """
    # The merge reads the shards twice; hashing is as much work as writing.
    with Progress(disable=not progress) as bar:
        task = bar.add_task("writing the store", total=3 * len(paths))

        def step(share: float = 1) -> None:
            bar.advance(task, share)

        return _merge(paths, out, facts, drop or {}, step)


def _merge(
    paths: Sequence[Path],
    out: Path,
    facts: dict[str, Any],
    drop: Mapping[int, str],
    step: Callable[[float], None],
) -> tuple[int, list[Rejection]]:
    survey = _look(paths, drop, step)
    if not any(keep.any() for keep in survey.keep):
        return 0, survey.rejections
    with whole(out) as partial:
        check_space(partial, _size(survey, len(facts["properties"])))
        with h5py.File(partial, "w") as file:
            _write(file, paths, survey, len(facts["properties"]), step)
            hashes, checksums = _hashes(file, lambda share: step(share * len(paths)))
            identity = {"graph": facts["graph"], "arrays": hashes}
            text = json.dumps(identity, sort_keys=True)
            facts = {
                **facts,
                "sources": survey.sources,
                "hashes": hashes,
                "checksums": checksums,
                "structures_hash": structures_hash(hashes),
                "hash": hashlib.sha256(text.encode()).hexdigest(),
            }
            text = json.dumps(facts, sort_keys=True)
            file.attrs["format"] = FORMAT
            file.attrs["schema"] = SCHEMA
            file.attrs["facts"] = text
            file.attrs["checksum"] = xxhash.xxh3_128_hexdigest(text.encode())
    return sum(int(keep.sum()) for keep in survey.keep), survey.rejections


def _size(survey: _Survey, properties: int) -> int:
    """Return the size of a store in bytes, with room for the overhead of HDF5."""
    crystals, atoms, edges, species, id_bytes = (
        sum(int(array.sum()) for array in arrays)
        for arrays in (
            survey.keep,
            survey.atoms,
            survey.edges,
            survey.species,
            survey.id_bytes,
        )
    )
    per_crystal = 4 * 8 + 36 + 3 + 3 + 2 + 8 * properties
    per_edge = 2 if survey.highest_code < 65536 else 4
    return (
        (1 << 20)
        + per_crystal * crystals
        + 14 * atoms  # atomic number, coordinates, count of neighbours
        + per_edge * edges
        + 2 * 2 * NEIGHBORS * species
        + id_bytes
    )


def _look(
    paths: Sequence[Path], drop: Mapping[int, str], step: Callable[[float], None]
) -> _Survey:
    """Read the shards once; refuse repeated ids and the crystals to drop.

    This holds a hundred bytes of a crystal in memory, so that millions fit.
    """
    survey = _Survey()
    digests: list[np.ndarray] = []
    for path in paths:
        arrays = read_shard(path, "id_digests", "most_neighbors", "highest_code")
        digests.append(arrays["id_digests"])
        survey.most_neighbors = max(
            survey.most_neighbors, int(arrays["most_neighbors"])
        )
        survey.highest_code = max(survey.highest_code, int(arrays["highest_code"]))
    first = _first_of_each(digests)
    unique = 0
    for path, keep in zip(paths, first, strict=True):
        arrays = read_shard(path, *_SURVEYED)
        survey.rejections += [Rejection(*r) for r in read_list(arrays["rejections"])]
        ids = read_list(arrays["material_ids"])
        sources = read_list(arrays["sources"])
        for row, (name, source) in enumerate(zip(ids, sources, strict=True)):
            reason = "duplicate id; the first one is kept, rename this one"
            if keep[row]:
                reason = drop.get(unique, "")
                unique += 1
            if reason:
                keep[row] = False
                survey.rejections.append(Rejection(source, name, reason))
            else:
                survey.sources[source] = survey.sources.get(source, 0) + 1
        survey.keep.append(keep)
        survey.made_up.append(arrays["made_up"][keep])
        survey.atoms.append(arrays["atoms"][keep])
        survey.edges.append(arrays["edges"][keep])
        survey.species.append(arrays["species"][keep])
        sizes = [len(name.encode()) for name in ids]
        survey.id_bytes.append(np.array(sizes, np.int64)[keep])
        step(1)
    return survey


def _first_of_each(digests: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return which ids, (B, 2) uint64 per shard, occur for the first time.

    Two ids among ten million share 128 bits by chance once in 10^24 corpora.
    """
    joined = np.concatenate([np.empty((0, 2), np.uint64), *digests])
    _, first = np.unique(joined.view("u8,u8"), return_index=True)
    new = np.zeros(len(joined), bool)
    new[first] = True
    return np.split(new, np.cumsum([len(part) for part in digests])[:-1])


def _write(
    file: h5py.File,
    paths: Sequence[Path],
    survey: _Survey,
    properties: int,
    step: Callable[[float], None],
) -> None:
    """Create the contiguous datasets and fill them shard by shard."""
    offsets = {
        "structures/atom_offsets": _offsets(survey.atoms),
        "graphs/edge_offsets": _offsets(survey.edges),
        "structures/material_id_offsets": _offsets(survey.id_bytes),
        "fingerprints/offsets": _offsets(survey.species),
    }
    for name, array in offsets.items():
        file.create_dataset(name, data=array)
    made_up = np.concatenate(survey.made_up)
    if made_up.any():
        file.create_dataset(MADE_UP, data=made_up.astype(np.uint8))
    atoms, edges, id_bytes, species = (int(array[-1]) for array in offsets.values())
    crystals = len(offsets["structures/atom_offsets"]) - 1
    count_type = np.uint8 if survey.most_neighbors < 256 else np.int32
    code_type = np.uint16 if survey.highest_code < 65536 else np.int32
    layout: dict[str, tuple[str, tuple[int, ...], Any]] = {
        "structures/atomic_numbers": ("atomic_numbers", (atoms,), np.uint8),
        "structures/frac_coords": ("frac_coords", (atoms, 3), np.float32),
        "structures/cells": ("cells", (crystals, 3, 3), np.float32),
        "structures/material_ids": ("id_bytes", (id_bytes,), np.uint8),
        "graphs/neighbor_counts": ("neighbor_counts", (atoms,), count_type),
        "graphs/edge_codes": ("edge_codes", (edges,), code_type),
        "graphs/shift_low": ("shift_low", (crystals, 3), np.int8),
        "graphs/shift_bits": ("shift_bits", (crystals, 3), np.uint8),
        "fingerprints/values": ("fingerprints", (species, 2 * NEIGHBORS), np.uint16),
    }
    for name, (_, shape, dtype) in layout.items():
        file.create_dataset(name, shape, dtype)
    groups: h5py.Dataset | None = None
    values = file.create_dataset(
        "properties/values", (properties, crystals), np.float64
    )
    filled = dict.fromkeys(layout, 0)
    row = 0
    for path, keep in zip(paths, survey.keep, strict=True):
        arrays = _kept(read_shard(path), keep)
        for name, (key, _, _) in layout.items():
            end = filled[name] + len(arrays[key])
            file[name][filled[name] : end] = arrays[key]
            filled[name] = end
        if groups is None:
            shape = (crystals, arrays["space_groups"].shape[1])
            groups = file.create_dataset("symmetry/space_groups", shape, np.uint8)
        end = row + len(arrays["cells"])
        groups[row:end] = arrays["space_groups"]
        values[:, row:end] = arrays["properties"].T
        row = end
        step(1)


def _kept(arrays: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
    """Drop the crystals that are not kept from the arrays of a shard."""
    ids = [
        name.encode()
        for name, kept in zip(read_list(arrays["material_ids"]), keep, strict=True)
        if kept
    ]
    atoms = np.repeat(keep, arrays["atoms"])
    edges = np.repeat(keep, arrays["edges"])
    species = np.repeat(keep, arrays["species"])
    per_atom = ("atomic_numbers", "frac_coords", "neighbor_counts")
    per_crystal = ("cells", "shift_low", "shift_bits", "space_groups", "properties")
    return {
        **{name: arrays[name][atoms] for name in per_atom},
        **{name: arrays[name][keep] for name in per_crystal},
        "edge_codes": arrays["edge_codes"][edges],
        "fingerprints": arrays["fingerprints"][species],
        "id_bytes": np.frombuffer(b"".join(ids), np.uint8),
    }


def _offsets(counts: list[np.ndarray]) -> np.ndarray:
    """Return the start of each crystal, and the total."""
    return np.concatenate([[0], np.cumsum(np.concatenate([*counts, []]))]).astype(
        np.int64
    )


def _hashes(
    file: h5py.File, step: Callable[[float], None]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the SHA-256 of every dataset's bytes, and their fast checksums.

    The hashes identify the store; the checksums are compared at every opening.
    """
    hashes, checksums = {}, {}
    total = sum(dataset.nbytes for group in file.values() for dataset in group.values())
    for group in sorted(file):
        for name in sorted(file[group]):
            dataset = file[group][name]
            identity, check = hashlib.sha256(), xxhash.xxh3_128()
            for start in range(0, len(dataset), _HASHED_ROWS):
                rows = np.ascontiguousarray(dataset[start : start + _HASHED_ROWS])
                if rows.size:
                    identity.update(rows.data.cast("B"))
                    check.update(rows.data.cast("B"))
            step(dataset.nbytes / total)
            hashes[f"{group}/{name}"] = identity.hexdigest()
            checksums[f"{group}/{name}"] = check.hexdigest()
    return hashes, checksums
