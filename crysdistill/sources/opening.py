"""Opening a source by its path or spec.

To add a kind of source, add a file beside this one and a line in `open_source`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from crysdistill.errors import InputError, did_you_mean
from crysdistill.sources.ase_files import (
    DATABASES,
    frames_format,
    guess_format,
    open_ase_database,
    open_ase_file,
)
from crysdistill.sources.contents import contents_of, not_a_file
from crysdistill.sources.folders import (
    has_structures,
    hold_one_each,
    open_file,
    structure_format,
    tables_in,
)
from crysdistill.sources.in_memory import open_crystals
from crysdistill.sources.labelled_folders import open_folder, open_zip
from crysdistill.sources.records import Record, Source
from crysdistill.sources.snapshot import (
    SUFFIX,
    fetch,
    origin_path,
    read_origin,
)
from crysdistill.sources.specs import is_spec
from crysdistill.sources.tables import open_json, open_lines
from crysdistill.structures.crystal import Crystal

ACCEPTED = (
    "a CIF or POSCAR file, a folder or zip of them, `structures.jsonl[.gz]`, pymatgen "
    "JSON (`.json[.gz]`), an ASE database (`.db`), a file that ASE reads (such as "
    "`.extxyz`) or a store (`.h5`)"
)


def open_source(
    path: str | Path,
    keep_unlabelled: bool = False,
    labels: bool = True,
    into: Path | None = None,
    progress: bool = True,
) -> Source:
    """Open a source of structures; this reads names and labels only.

    Args:
        path: a CIF or POSCAR file; a folder or zip of them, with or without
            `id_prop.csv` or `properties.csv`; `structures.jsonl[.gz]`, with or without
            `properties.csv` beside it; pymatgen or JARVIS JSON; an ASE database, or a
            file that ASE reads; a store; with `into` also the spec of a database, such
            as `optimade:mp?filter=nelements=2`.
        keep_unlabelled: whether to keep structures that a label table does not label.
        labels: whether to read labels at all.
        into: the folder for downloads from databases; a finished download is reused.
        progress: whether to show the progress of a download.

    Raises:
        InputError: there is no such file, or it is of no known kind.
    """
    if is_spec(path):
        return _open_spec(str(path), keep_unlabelled, labels, into, progress)
    path = Path(path)
    if not (path.exists() or path.is_symlink()):
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(
            f"{path}: no such file or folder{did_you_mean(path.name, near)}"
        )
    if path.is_dir():
        return _open_folder(path, keep_unlabelled, labels)
    if reason := not_a_file(path):
        raise InputError(f"{path}: {reason}; give a file or a folder")
    name = path.name.lower().removesuffix(".gz")
    if structure_format(path.name):
        return open_file(path)
    if path.name.endswith(SUFFIX) and origin_path(path).is_file():
        return _open_snapshot(path, keep_unlabelled, labels)
    if name.endswith((".jsonl", ".ndjson")):
        return open_lines(path, keep_unlabelled, labels)
    if name.endswith(".json"):
        return open_json(path, keep_unlabelled, labels)
    if name.endswith(".zip"):
        return open_zip(path, keep_unlabelled, labels)
    if name.endswith((".h5", ".hdf5")):
        return open_store_source(path, labels)
    if name.endswith(tuple(DATABASES)):
        return open_ase_database(path, keep_unlabelled, labels)
    if layout := frames_format(path.name) or guess_format(path):
        return open_ase_file(path, layout, keep_unlabelled, labels)
    raise InputError(f"{path}: cannot read structures from it; give {ACCEPTED}")


def open_sources(
    paths: Sequence[str | Path | Crystal],
    keep_unlabelled: bool = False,
    labels: bool = True,
    into: Path | None = None,
    progress: bool = True,
) -> list[Source]:
    """Open several sources, in order; all are opened before any is read.

    The arguments are those of `open_source`. Crystals among the paths form one source,
    which comes last.

    Raises:
        InputError: none is given, or one cannot be opened.
    """
    if not paths:
        raise InputError(f"no source; give {ACCEPTED}")
    found = [
        open_source(path, keep_unlabelled, labels, into, progress)
        for path in paths
        if not isinstance(path, Crystal)
    ]
    crystals = [one for one in paths if isinstance(one, Crystal)]
    return [*found, open_crystals(crystals, labels)] if crystals else found


def open_store_source(path: Path, labels: bool = True) -> Source:
    """Open a store as a source of its crystals and properties.

    Raises:
        InputError: the file is no store, or a store of another schema.
    """
    # Stores need torch, which a worker that only parses files can do without.
    from crysdistill.store.store import Store

    store = Store.open_structures(path)

    def records() -> Iterator[Record]:
        for row, crystal in enumerate(store.crystals(range(len(store)))):
            yield Record(
                str(path),
                crystal.material_id,
                "crystal",
                crystal,
                crystal.properties if labels else {},
                made_up=bool(store.made_up[row]),
            )

    names = tuple(store.property_names) if labels else ()
    contents = contents_of([("", path)], labels)
    origins = tuple(store.origins)
    return Source(path, records, len(store), names, contents, origins)


def _open_snapshot(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a table of structures with a file that names its origin."""
    known = read_origin(path)
    source = open_lines(path, keep_unlabelled, labels)
    return replace(source, count=known.count or source.count, origins=(known.origin,))


def _open_spec(
    spec: str, keep_unlabelled: bool, labels: bool, into: Path | None, progress: bool
) -> Source:
    """Download a spec's structures, unless that is done, and open them as the spec."""
    if into is None:
        raise InputError(
            f"{spec}: only a build reads from a database; download it first: "
            f"`crysdistill fetch '{spec}' -o FILE{SUFFIX}`"
        )
    digest = hashlib.sha256(spec.encode()).hexdigest()[:12]
    name = re.sub(r"\W+", "-", spec)[:40].strip("-")
    path = into / f"{name}-{digest}{SUFFIX}"
    if not path.exists() or not origin_path(path).exists():
        into.mkdir(exist_ok=True)
        fetch(spec, path, progress=progress)
    source = _open_snapshot(path, keep_unlabelled, labels)

    def records() -> Iterator[Record]:
        return (replace(record, source=spec) for record in source.records())

    # The hash is of the content, so that a second download counts as the same source.
    known = read_origin(path).sha256
    contents = contents_of([], spec, known, keep_unlabelled, labels)
    return replace(source, path=Path(spec), records=records, contents=contents)


def _open_folder(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a folder of structure files, or the only table of structures in it."""
    tables = tables_in(path)
    if tables and not has_structures(path):
        if len(tables) > 1 and hold_one_each(tables):
            return open_folder(path, keep_unlabelled, labels)
        if len(tables) > 1:
            names = ", ".join(table.name for table in tables[:3])
            raise InputError(
                f"{path}: {len(tables)} tables of structures; give them one by one "
                f"({names}, ...)"
            )
        return open_source(tables[0], keep_unlabelled, labels)
    return open_folder(path, keep_unlabelled, labels)
