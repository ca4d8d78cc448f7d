"""Compare two files: show their overlap in the terminal, and write it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rich
from rich.markup import escape

from crysdistill.errors import InputError
from crysdistill.files import writable
from crysdistill.overlap.finding import find_overlaps
from crysdistill.overlap.report import METHOD, Overlap, check_kinds
from crysdistill.overlap.search import KINDS
from crysdistill.overlap.sides import Side, open_side
from crysdistill.workers import check_engine


def compare_files(
    corpus: str | Path,
    dataset: str | Path,
    out: str | Path,
    *,
    kinds: Iterable[str] = KINDS,
    pairs_per_entry: int = 1000,
    workers: int | None = None,
    cluster: str | None = None,
    progress: bool = True,
) -> Overlap:
    """Compare two stores or sources, show the result, and write it.

    Args:
        corpus: the crystals to learn from; anything that `build` reads.
        dataset: the crystals for evaluation; anything that `build` reads.
        out: CSV file for the pairs, `corpus_id,dataset_id,kind`. The statement,
            counts, histogram and hashes go beside it, with the suffix `.json`.
        kinds: the kinds of pairs to look for; see `find_overlap`.
        pairs_per_entry: see `find_overlap`.
        workers: processes; if None, all cores for a large task.
        cluster: Dask workers instead, for the search; see `find_overlap`.
        progress: whether to show progress bars.

    Raises:
        InputError: a side cannot be read or is empty, a setting is out of range, or
            the result cannot be written there.
    """
    out = writable(out, (corpus, dataset))  # before the work, not after it
    kinds = check_kinds(kinds)
    check_engine(workers, cluster)
    summary = writable(out.with_suffix(".json"), (corpus, dataset))
    if summary == out:
        raise InputError(
            f"{out} is the file for the numbers; name the table of pairs, such as "
            f"{out.with_suffix('.csv').name}"
        )
    sides = [
        open_side(path, workers=workers, progress=progress)
        for path in (corpus, dataset)
    ]
    for side in sides:
        if side.remark:
            rich.print(escape(side.remark))
    first, second = sides
    [overlap] = find_overlaps(
        first.crystals,
        [(second.name, second.crystals)],
        kinds=kinds,
        pairs_per_entry=pairs_per_entry,
        workers=workers,
        cluster=cluster,
        progress=progress,
    )
    overlap.write(out)
    text = json.dumps(summarize(overlap, *sides), indent=2)
    summary.write_text(text + "\n", encoding="utf-8")
    rich.print(overlap.table())
    rich.print(overlap.histogram_table())
    print(f"{overlap.statement}; pairs: {out}, numbers: {summary}")
    return overlap


def summarize(overlap: Overlap, corpus: Side, dataset: Side) -> dict[str, Any]:
    """Return an overlap without its pairs, as plain values for JSON.

    Args:
        overlap: the overlap of both sides.
        corpus: one side.
        dataset: the other.
    """
    histogram = overlap.histogram().to_dict("records")
    for row in histogram:
        row["to"] = row["to"] if math.isfinite(row["to"]) else None
    return {
        "statement": overlap.statement,
        "hash": overlap.hash,
        **{
            name: {
                "name": side.name,
                "structures_hash": digest,
                "crystals": len(side.crystals),
                "quarantined": [list(entry) for entry in side.quarantined],
            }
            for name, side, digest in zip(
                ("corpus", "dataset"), (corpus, dataset), overlap.hashes, strict=True
            )
        },
        "kinds": list(overlap.kinds),
        "pairs_per_entry": overlap.pairs_per_entry,
        "counts": overlap.counts,
        "nearest_distances": histogram,
        "method": METHOD,
    }
