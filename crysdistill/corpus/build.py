"""Building a store: sources to shards, in parallel and resumable, to one file."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from crysdistill import __version__
from crysdistill.corpus.filters import Filters, count_filtered
from crysdistill.corpus.firewall import Firewall
from crysdistill.corpus.merge import merge_shards
from crysdistill.corpus.shards import (
    BuildSettings,
    Rejection,
    make_shard,
    read_list,
    read_shard,
)
from crysdistill.errors import InputError, did_you_mean
from crysdistill.files import write_whole
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.locks import only_one, room_for
from crysdistill.sources import open_sources
from crysdistill.sources.folders import structure_format
from crysdistill.sources.records import Record, Source
from crysdistill.store.checks import read_checks, statement
from crysdistill.store.origins import Origin, check_licence
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.symmetry import (
    ANGLE_TOLERANCE,
    ENGINES,
    SYMPREC,
    Engine,
    engine_versions,
)
from crysdistill.workers import await_files, check_engine, engine, spread

SHARD_SIZE = 256
"""Crystals in a shard: a second of work, so that little is lost when a build stops."""

MANIFEST = "build.json"
"""In the folder of shards: what they were made from. The last file to go."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        store: the file written.
        quarantine: the table of refused entries.
        read: entries in the sources.
        built: crystals in the store.
        rejections: the refused entries; `read` = `built` + their number.
        overlap: of which datasets the store is clean; "" where none was excluded.
    """

    store: Path
    quarantine: Path
    read: int
    built: int
    rejections: list[Rejection]
    overlap: str = ""

    @property
    def filtered(self) -> dict[str, int]:
        """How many entries each filter refused."""
        return count_filtered(r.reason for r in self.rejections)


def build(
    sources: Sequence[str | Path | Crystal],
    out: str | Path,
    *,
    graph: GraphSettings | None = None,
    symmetry: Engine | None = "fast",
    filters: Filters | None = None,
    keep_unlabelled: bool = False,
    labels: bool = True,
    workers: int | None = None,
    cluster: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    exclude: Sequence[str | Path] = (),
    exclude_kinds: Iterable[str] = ("id", "structure"),
    duplicates: bool = True,
    licence: str = "",
) -> BuildReport:
    """Build a store from structure files, folders, tables or other stores.

    Finished shards stay in `OUT.parts/` until the store is written: run the same
    command again after an interruption and it goes on where it was. The result does
    not depend on the number of workers, nor on where they are.

    Args:
        sources: CIF or POSCAR files, folders (with or without `id_prop.csv`),
            `structures.jsonl.gz` (with `properties.csv` beside it), pymatgen JSON,
            stores, or specs of databases (see `fetch`), downloaded first; crystals
            that are already in memory stand among them.
        out: the store to write; refused entries go to `OUT.quarantine.csv`
            as `source, material_id, reason`.
        graph: how neighbours become edges.
        symmetry: what finds space groups, the slowest part: `fast` or `spglib`; None
            finds none.
        filters: which sound crystals are refused (and listed).
        keep_unlabelled: keep structures without a label in a labelled source.
        labels: whether to read labels at all.
        workers: processes; all cores where None.
        cluster: Dask workers instead: `local:N`, `tcp://HOST:PORT` or a scheduler file
            of a running scheduler, or `slurm:FILE.yaml`; see `engine`.
        overwrite: whether an existing store may be replaced.
        progress: whether to show a progress bar.
        exclude: datasets (stores or sources); crystals that also stand in one of them
            are refused, and the store says of which datasets it is clean.
        exclude_kinds: of the pairs that decide; see `find_overlap`. With none, all
            are kept, and only counted.
        duplicates: whether a crystal that is the same as an earlier one (a pair of
            kind `structure`) is kept.
        licence: SPDX identifier of sources that do not say theirs (files of yours).

    Raises:
        InputError: a source cannot be read, the store exists, another build is
            writing it, or the interrupted build had other settings.
    """
    out = Path(out)
    parts = out.with_name(out.name + ".parts")
    # With its shards still there, the store is one whose build did not come to its end.
    if out.exists() and not overwrite and not (parts / MANIFEST).exists():
        raise InputError(f"{out} exists; give another name or `--overwrite`")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; create it first")
    check_engine(workers, cluster)
    check_licence(licence)
    if symmetry is not None and symmetry not in ENGINES:
        raise InputError(
            f"`symmetry` is {symmetry!r} but must be one of {', '.join(ENGINES)}"
            f"{did_you_mean(str(symmetry), ENGINES)}"
        )
    opened = open_sources(sources, keep_unlabelled, labels, parts, progress)
    settings = BuildSettings(graph or GraphSettings(), symmetry, filters or Filters())
    properties = list(dict.fromkeys(name for s in opened for name in s.properties))
    firewall = Firewall.open(
        exclude, exclude_kinds, duplicates, workers, cluster, progress
    )
    busy = f"{out} is being built by another process; wait for it, or build into"
    room = room_for(parts, "finished shards")
    with only_one(parts, f"{busy} another file"), room:
        _check_resumable(parts, opened, settings, properties, firewall, licence)
        shards = _make_shards(
            parts,
            opened,
            properties,
            settings,
            workers,
            cluster,
            progress,
        )
        facts = {
            "version": __version__,
            "graph": settings.graph.to_dict(),
            "properties": properties,
            "symmetry": {
                "symprec": list(SYMPREC),
                "angle_tolerance": ANGLE_TOLERANCE,
                "engine": engine_versions(symmetry) if symmetry else "none",
            },
            "filters": asdict(settings.filters),
            "origins": _origins(opened, licence),
        }
        drop = firewall.apply(shards, parts, facts)
        built, rejections = merge_shards(shards, out, facts, drop, progress)
        quarantine = out.with_name(out.name + ".quarantine.csv")
        _write_quarantine(quarantine, rejections)
        for path in parts.iterdir():
            if path.is_dir():  # a download that was given up
                shutil.rmtree(path)
            elif path.name != MANIFEST:
                path.unlink()
        shutil.rmtree(parts)
    overlap = statement(read_checks(facts)) if firewall.datasets else ""
    return BuildReport(
        out, quarantine, built + len(rejections), built, rejections, overlap
    )


def _origins(sources: Sequence[Source], licence: str) -> list[dict[str, Any]]:
    """Return where the crystals come from, each origin once."""
    origins: dict[Origin, None] = {}
    for source in sources:
        own = (Origin(source.path.name, licence=licence),)
        origins |= dict.fromkeys(source.origins or own)
    return [origin.to_dict() for origin in origins]


def _check_resumable(
    parts: Path,
    sources: Sequence[Source],
    settings: BuildSettings,
    properties: list[str],
    firewall: Firewall,
    licence: str,
) -> None:
    """Refuse to go on with the shards of other sources or settings."""
    identity = {
        "version": __version__,
        "sources": [s.fingerprint for s in sources],
        "settings": asdict(settings),
        "properties": properties,
        "shard_size": SHARD_SIZE,
        "origins": _origins(sources, licence),
        **firewall.identity,
    }
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest = parts / MANIFEST
    if manifest.exists() and json.loads(manifest.read_text())["hash"] != digest:
        raise InputError(
            f"{parts} holds an interrupted build of other sources or settings; "
            "delete it to start anew"
        )
    text = json.dumps({**identity, "hash": digest}, indent=2)
    write_whole(manifest, text.encode())


def _chunks(sources: Sequence[Source]) -> Iterator[list[Record]]:
    """Cut the stream of records into shards."""
    records = (record for source in sources for record in source.records())
    while chunk := list(islice(records, SHARD_SIZE)):
        yield chunk


def _make_shards(
    parts: Path,
    sources: Sequence[Source],
    properties: list[str],
    settings: BuildSettings,
    workers: int | None,
    cluster: str | None,
    progress: bool,
) -> list[Path]:
    """Make every shard that is not there yet; return all, in order."""
    counts = [source.count for source in sources]
    total = None if None in counts else sum(c for c in counts if c is not None)
    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("building"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("quarantined {task.fields[refused]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    paths: list[Path] = []
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("build", total=total, refused=0)
        refused = 0

        def count(result: tuple[int, int]) -> None:
            nonlocal refused
            refused += result[1]
            bar.update(task, advance=sum(result), refused=refused)

        def jobs() -> Iterator[tuple[Any, ...]]:
            for number, chunk in enumerate(_chunks(sources)):
                path = parts / f"{number:06d}.npz"
                paths.append(path)
                if path.exists():
                    arrays = read_shard(path)
                    count((len(arrays["atoms"]), len(read_list(arrays["rejections"]))))
                else:
                    yield path.absolute(), chunk, properties, settings

        if cluster is None and total is not None and total <= SHARD_SIZE:
            workers = 1

        # Of these the names travel to the workers, of others the content.
        named = [
            s.path for s in sources if s.path.is_dir() or structure_format(s.path.name)
        ]
        with engine(
            workers,
            cluster,
            folder=parts,
            opened=named,
            kept="finished shards are kept, ",
        ) as pool:
            for result in pool.map(partial(spread, make_shard), jobs()):
                count(result)
        if cluster is not None:
            await_files(paths)
    return paths


def _write_quarantine(path: Path, rejections: Sequence[Rejection]) -> None:
    """Write the table of refused entries; an empty one says that all went well."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "material_id", "reason"])
        writer.writerows((r.source, r.material_id, r.reason) for r in rejections)
