"""Building a store: sources become shards, in parallel, and shards become one file."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
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
from crysdistill.corpus.identity import (
    Identity,
    differences,
    identity_of,
    made_from,
    read_manifest,
)
from crysdistill.corpus.merge import merge_shards
from crysdistill.corpus.shards import (
    BuildSettings,
    Rejection,
    make_shard,
    read_list,
    read_shard,
)
from crysdistill.errors import InputError, did_you_mean
from crysdistill.files import whole, writable, write_whole
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.locks import only_one, room_for
from crysdistill.sources import open_sources
from crysdistill.sources.folders import structure_format
from crysdistill.sources.records import Record, Source
from crysdistill.sources.specs import is_spec
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
"""The file among the shards that notes their sources and settings; deleted last."""


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Args:
        store: the file written.
        quarantine: the table of refused entries.
        read: entries in the sources.
        built: crystals in the store.
        rejections: the refused entries; `read` = `built` + their number.
        overlap: the datasets of which the store is clean; "" if none was excluded.
        done_before: whether the store existed already, so that nothing was done.
        remarks: remarks for the user on how sources were read.
    """

    store: Path
    quarantine: Path
    read: int
    built: int
    rejections: list[Rejection]
    overlap: str = ""
    done_before: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def filtered(self) -> dict[str, int]:
        """The number of entries that each filter refused."""
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

    If a store of the same sources and settings exists, there is nothing to do. If no
    entry becomes a crystal, no store is written.

    Finished shards stay in `OUT.parts/` until the store is written, so that the same
    command continues after an interruption. The result depends neither on the number
    of workers nor on their machines.

    Args:
        sources: CIF or POSCAR files, folders (with or without `id_prop.csv`),
            `structures.jsonl.gz` (with `properties.csv` beside it), pymatgen JSON,
            stores, or specs of databases (see `fetch`), which are downloaded first.
            Crystals in memory may stand among them.
        out: the store to write; refused entries go to `OUT.quarantine.csv`
            as `source, material_id, reason`.
        graph: how neighbours become edges.
        symmetry: the engine that finds space groups, `fast` or `spglib`; None skips
            this slowest part.
        filters: limits; sound crystals outside them are refused and listed.
        keep_unlabelled: keep structures without a label in a labelled source.
        labels: whether to read labels at all.
        workers: processes; all cores if None.
        cluster: use Dask workers: `local:N`, `tcp://HOST:PORT` or the scheduler file
            of a running scheduler, or `slurm:FILE.yaml`; see `engine`.
        overwrite: whether an existing store may be replaced.
        progress: whether to show a progress bar.
        exclude: datasets (stores or sources). Crystals that one of them also holds are
            refused, and the store lists the datasets of which it is clean.
        exclude_kinds: the kinds of pairs that exclude a crystal; see `find_overlap`.
            If empty, pairs are counted but all crystals are kept.
        duplicates: whether to keep a crystal that is the same as an earlier one (a pair
            of kind `structure`).
        licence: SPDX identifier for sources that name none, such as your own files.

    Raises:
        InputError: a source cannot be read, another build is writing the store, or the
            store or an interrupted build has other sources or settings.
    """
    out = writable(out)
    if out.exists() and out.stat().st_size and not h5py.is_hdf5(out):
        raise InputError(f"{out} exists, and is no store; give another name")
    parts = out.with_name(out.name + ".parts")
    quarantine = out.with_name(out.name + ".quarantine.csv")
    # If its shards are still there, the build of the store did not finish.
    finished = out.exists() and not overwrite and not (parts / MANIFEST).exists()
    if finished and made_from(out) is None:
        raise InputError(f"{out} exists; give another name or `--overwrite`")
    check_engine(workers, cluster)
    check_licence(licence)
    if symmetry is not None and symmetry not in ENGINES:
        raise InputError(
            f"`symmetry` is {symmetry!r} but must be one of {', '.join(ENGINES)}"
            f"{did_you_mean(str(symmetry), ENGINES)}"
        )
    # Do not download again only to find that the store exists.
    asked = [s for s in sources if finished and isinstance(s, str) and is_spec(s)]
    rest = [s for s in sources if s not in asked] if asked else sources
    opened: list[Source] = []
    if rest or not asked:
        opened = open_sources(rest, keep_unlabelled, labels, parts, progress)
    settings = BuildSettings(graph or GraphSettings(), symmetry, filters or Filters())
    properties = list(dict.fromkeys(name for s in opened for name in s.properties))
    firewall = Firewall.open(
        exclude, exclude_kinds, duplicates, workers, cluster, progress
    )
    others = {
        "labels": labels,
        "keep_unlabelled": keep_unlabelled,
        "licence": licence,
        **firewall.identity,
    }
    identity = identity_of([*asked, *opened], settings, others)
    if finished:
        return _done(out, quarantine, identity)
    remarks = tuple(remark for source in opened for remark in source.remarks)
    busy = f"{out} is being built by another process; wait for it, or build into"
    room = room_for(parts, "finished shards")
    with only_one(parts, f"{busy} another file"), room:
        _check_resumable(parts, identity)
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
            "made_from": identity,
        }
        drop = firewall.apply(shards, parts, facts)
        built, rejections = merge_shards(shards, out, facts, drop, progress)
        _write_quarantine(quarantine, rejections)
        for path in parts.iterdir():
            if path.is_dir():  # an abandoned download
                shutil.rmtree(path)
            elif path.name != MANIFEST:
                path.unlink()
        shutil.rmtree(parts)
    overlap = statement(read_checks(facts)) if firewall.datasets else ""
    return BuildReport(
        out,
        quarantine,
        built + len(rejections),
        built,
        rejections,
        overlap,
        remarks=remarks,
    )


def _origins(sources: Sequence[Source], licence: str) -> list[dict[str, Any]]:
    """Return the origins of the crystals, each once."""
    origins: dict[Origin, None] = {}
    for source in sources:
        own = (Origin(source.path.name, licence=licence),)
        origins |= dict.fromkeys(source.origins or own)
    return [origin.to_dict() for origin in origins]


def _check_resumable(parts: Path, identity: Identity) -> None:
    """Refuse to continue with the shards of other sources or settings."""
    manifest = parts / MANIFEST
    before = read_manifest(manifest)
    now = {**identity, "shard_size": SHARD_SIZE}
    if before is not None and before != now and (said := differences(before, now)):
        raise InputError(
            f"{parts} holds an interrupted build of something else: "
            f"{'; '.join(said)}; give the same again, or delete it to start anew"
        )
    write_whole(manifest, json.dumps(now, indent=2).encode())


def _done(out: Path, quarantine: Path, identity: Identity) -> BuildReport:
    """Return the report of an existing store that this build would write again.

    Raises:
        InputError: the store has other sources or settings; the text names them.
    """
    before = made_from(out)
    if before is None:
        raise InputError(f"{out} exists; give another name or `--overwrite`")
    if said := differences(before, identity):
        raise InputError(
            f"{out} exists and is built from something else: {'; '.join(said)}; give "
            "another name or `--overwrite`"
        )
    from crysdistill.store.store import Store  # needs torch; a build does not

    store = Store.open(out)
    rejections: list[Rejection] = []
    if quarantine.is_file():
        with quarantine.open(newline="", encoding="utf-8") as file:
            rejections = [Rejection(*row) for row in list(csv.reader(file))[1:]]
    checks = read_checks(store.facts)
    return BuildReport(
        out,
        quarantine,
        len(store) + len(rejections),
        len(store),
        rejections,
        statement(checks) if checks else "",
        done_before=True,
    )


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
    """Make every missing shard; return all shards, in order."""
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

        # Workers get the names of these files, but the content of others.
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
    """Write the table of refused entries; it is empty if all went well."""
    with (
        whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["source", "material_id", "reason"])
        writer.writerows((r.source, r.material_id, r.reason) for r in rejections)
