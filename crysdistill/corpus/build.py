"""Building a store: sources to shards, in parallel and resumable, to one file."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from crysdistill.corpus.checks import read_checks, statement
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
from crysdistill.corpus.sources import open_sources
from crysdistill.corpus.sources.records import Record, Source
from crysdistill.errors import InputError, did_you_mean
from crysdistill.neighbors import GraphSettings
from crysdistill.symmetry import (
    ANGLE_TOLERANCE,
    ENGINES,
    SYMPREC,
    Engine,
    engine_versions,
)

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
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    graph: GraphSettings | None = None,
    symmetry: Engine | None = "fast",
    filters: Filters | None = None,
    keep_unlabelled: bool = False,
    labels: bool = True,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    exclude: Sequence[str | Path] = (),
    exclude_kinds: Iterable[str] = ("id", "structure"),
) -> BuildReport:
    """Build a store from structure files, folders, tables or other stores.

    Finished shards stay in `OUT.parts/` until the store is written: run the same
    command again after an interruption and it goes on where it was. The result does
    not depend on the number of workers.

    Args:
        sources: CIF or POSCAR files, folders (with or without `id_prop.csv`),
            `structures.jsonl.gz` (with `properties.csv` beside it), pymatgen JSON,
            stores.
        out: the store to write; refused entries go to `OUT.quarantine.csv`
            as `source, material_id, reason`.
        graph: how neighbours become edges.
        symmetry: what finds space groups, the slowest part: `fast` or `spglib`; None
            finds none.
        filters: which sound crystals are refused (and listed).
        keep_unlabelled: keep structures without a label in a labelled source.
        labels: whether to read labels at all.
        workers: processes; all cores where None.
        overwrite: whether an existing store may be replaced.
        progress: whether to show a progress bar.
        exclude: datasets (stores or sources); crystals that also stand in one of them
            are refused, and the store says of which datasets it is clean.
        exclude_kinds: of the pairs that decide; see `find_overlap`. With none, all
            are kept, and only counted.

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
    if workers is not None and workers < 1:
        raise InputError(f"`workers` is {workers} but must be at least 1")
    if symmetry is not None and symmetry not in ENGINES:
        raise InputError(
            f"`symmetry` is {symmetry!r} but must be one of {', '.join(ENGINES)}"
            f"{did_you_mean(str(symmetry), ENGINES)}"
        )
    opened = open_sources(sources, keep_unlabelled, labels)
    settings = BuildSettings(graph or GraphSettings(), symmetry, filters or Filters())
    properties = list(dict.fromkeys(name for s in opened for name in s.properties))
    firewall = Firewall.open(exclude, exclude_kinds, workers, progress)
    with _locked(parts, out), _room_for(parts):
        _check_resumable(parts, opened, settings, properties, firewall)
        shards = _make_shards(
            parts,
            opened,
            properties,
            settings,
            workers or os.cpu_count() or 1,
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
        }
        drop = firewall.apply(shards, parts, facts)
        built, rejections = merge_shards(shards, out, facts, drop)
        quarantine = out.with_name(out.name + ".quarantine.csv")
        _write_quarantine(quarantine, rejections)
        for path in parts.iterdir():
            if path.name != MANIFEST:
                path.unlink()
        shutil.rmtree(parts)
    overlap = statement(read_checks(facts)) if firewall.datasets else ""
    return BuildReport(
        out, quarantine, built + len(rejections), built, rejections, overlap
    )


@contextmanager
def _locked(parts: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a build; the system lets go of it when the process dies."""
    parts.mkdir(exist_ok=True)
    with (parts / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{out} is being built by another process; wait for it, or build into "
                "another file"
            ) from None
        yield


@contextmanager
def _room_for(parts: Path) -> Iterator[None]:
    """Say what to do about a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{error.strerror} in {parts.parent}: finished shards are kept in "
            f"{parts.name}; make room and run the same command again"
        ) from None


def _check_resumable(
    parts: Path,
    sources: Sequence[Source],
    settings: BuildSettings,
    properties: list[str],
    firewall: Firewall,
) -> None:
    """Refuse to go on with the shards of other sources or settings."""
    identity = {
        "version": __version__,
        "sources": [s.fingerprint for s in sources],
        "settings": asdict(settings),
        "properties": properties,
        "shard_size": SHARD_SIZE,
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
    partial = manifest.with_suffix(".partial")
    partial.write_text(json.dumps({**identity, "hash": digest}, indent=2))
    partial.replace(manifest)


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
    workers: int,
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

        if total is not None and total <= SHARD_SIZE:
            workers = 1
        with _pool(workers) as pool:
            running: deque[Future[tuple[int, int]]] = deque()
            for number, chunk in enumerate(_chunks(sources)):
                path = parts / f"{number:06d}.npz"
                paths.append(path)
                if path.exists():
                    arrays = read_shard(path)
                    count((len(arrays["atoms"]), len(read_list(arrays["rejections"]))))
                elif pool is None:
                    count(make_shard(path, chunk, properties, settings))
                else:
                    job = pool.submit(make_shard, path, chunk, properties, settings)
                    running.append(job)
                    # A short queue keeps memory flat however long the source is.
                    if len(running) > 2 * workers:
                        count(running.popleft().result())
            while running:
                count(running.popleft().result())
    return paths


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yield a pool of fresh processes, or None where one process is enough."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise RuntimeError(
                "a build process died (out of memory?); finished shards are kept, run "
                "the same command again, with fewer `--workers` if it repeats"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    """Keep numerical libraries from starting threads, and end with the build."""
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End this process when the build has been killed, which no queue would tell it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_quarantine(path: Path, rejections: Sequence[Rejection]) -> None:
    """Write the table of refused entries; an empty one says that all went well."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "material_id", "reason"])
        writer.writerows((r.source, r.material_id, r.reason) for r in rejections)
