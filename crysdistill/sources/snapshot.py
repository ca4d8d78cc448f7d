"""Snapshots: a database, or a part of it, downloaded into one file.

A download is a step of its own, because compute nodes have no network and a build must
give the same store twice. It goes page by page and keeps each page that arrived.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from crysdistill.errors import InputError
from crysdistill.files import whole, writable, write_whole
from crysdistill.locks import only_one, room_for
from crysdistill.sources.services import Page
from crysdistill.sources.specs import open_service
from crysdistill.store.origins import Origin

SUFFIX = ".jsonl.gz"

_MANIFEST = "fetch.json"
_COMPRESSION = 6  # fixed, like the header's time, so that equal pages give equal bytes


def fetch(
    spec: str,
    out: str | Path,
    *,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Download a spec's structures into `OUT.jsonl.gz`, and write its origin beside it.

    Pages that arrived stay in `OUT.jsonl.gz.parts/` until the file is whole. After an
    interruption the same command continues after the last of them. The file then equals
    that of an uninterrupted download, byte for byte. Once it is whole, the same command
    does nothing.

    Args:
        spec: `SCHEME:REST`, such as `optimade:mp?filter=nelements=2`.
        out: the file to write; `OUT.origin.json` names its origin.
        limit: stop after this many entries.
        overwrite: whether an existing file may be replaced.
        progress: whether to show a progress bar.

    Returns:
        The file.

    Raises:
        InputError: the file exists and holds something else, another process writes
            it, the interrupted download had another spec, or the service cannot be
            used.
    """
    out = Path(out)
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        raise InputError(f"{out}: must end in `{SUFFIX}`, such as `corpus{SUFFIX}`")
    if limit is not None and limit < 1:
        raise InputError(f"`limit` is {limit} but must be at least 1")
    writable(out)
    parts = out.with_name(out.name + ".parts")
    # If its pages are still there, its download did not finish.
    if out.exists() and not overwrite and not (parts / _MANIFEST).exists():
        if is_fetched(spec, out, limit):
            return out
        raise InputError(f"{out} exists; give another name or `--overwrite`")
    busy = f"{out} is being fetched by another process; wait for it, or name another"
    with only_one(parts, busy), room_for(parts, "pages that arrived"):
        pages = _Pages(parts, spec)
        if not pages.assembled(out, limit):
            if not pages.whole(limit):
                _download(pages, limit, progress)
            _assemble(pages, out, limit)
            # From here on pages are deleted; the rest must not look like a download.
            pages.note(assembled=[limit])
        # The manifest goes last: as long as it is there, the command can continue.
        for path in parts.iterdir():
            if path.name != _MANIFEST:
                path.unlink()
        shutil.rmtree(parts)
    return out


def is_fetched(spec: str, out: Path, limit: int | None) -> bool:
    """Return whether a file is whole and was fetched by the same spec and limit."""
    try:
        known = orjson.loads(origin_path(out).read_bytes())
        asked = {"spec": spec, "limit": limit, "bytes": out.stat().st_size}
    except (OSError, ValueError):
        return False
    return isinstance(known, dict) and asked.items() <= known.items()


def origin_path(snapshot: Path) -> Path:
    """Return the file with the origin of `NAME.jsonl.gz`: `NAME.origin.json`."""
    name = snapshot.name.removesuffix(".gz").rpartition(".")[0]
    return snapshot.with_name(f"{name}.origin.json")


@dataclass(frozen=True)
class Provenance:
    """The facts in the file beside a snapshot.

    Args:
        origin: the origin of the structures.
        count: the number of entries, if known.
        sha256: the hash of the file, if known.
    """

    origin: Origin
    count: int | None
    sha256: str | None


def read_origin(snapshot: Path) -> Provenance:
    """Return the facts in the file beside a snapshot.

    Raises:
        InputError: the file beside it cannot be read, or belongs to another snapshot.
    """
    path = origin_path(snapshot)
    try:
        content = orjson.loads(path.read_bytes())
        origin = Origin(**content["origin"])
        size = content.get("bytes")
        found = Provenance(origin, content.get("count"), content.get("sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: names no origin ({type(error).__name__}: {error}); fetch again, "
            "or remove it"
        ) from None
    if size is not None and size != snapshot.stat().st_size:
        raise InputError(
            f"{snapshot}: has {snapshot.stat().st_size:,} bytes but {path.name} says "
            f"{size:,}; fetch again, or remove {path.name}"
        )
    return found


# ------------------------------------------------------------------------------- pages


@dataclass
class _Pages:
    """The pages of a download that arrived; each is a complete file.

    The first line of a file holds the number of its entries and the cursor.
    """

    folder: Path
    spec: str

    def __post_init__(self) -> None:
        self.files = sorted(self.folder.glob("*.page"))
        heads = [self._head(path) for path in self.files]
        self.count = sum(head["count"] for head in heads)
        self.cursor: Any = heads[-1]["cursor"] if heads else None
        self.total: int | None = heads[-1]["total"] if heads else None
        self.origin: Origin | None = None
        self._noted: dict[str, Any] = {}
        manifest = self.folder / _MANIFEST
        if manifest.exists():
            self._noted = json.loads(manifest.read_text("utf-8"))
            if self._noted["spec"] != self.spec:
                raise InputError(
                    f"{self.folder} holds an interrupted download of "
                    f"{self._noted['spec']}; delete it to start anew"
                )
            self.origin = Origin(**self._noted["origin"])

    def _head(self, path: Path) -> dict[str, Any]:
        try:
            with path.open("rb") as file:
                return orjson.loads(file.readline())
        except ValueError:
            raise InputError(
                f"{path}: damaged; delete {self.folder} to start anew"
            ) from None

    def assembled(self, out: Path, limit: int | None) -> bool:
        """Whether the file was written from these pages, some of which are deleted.

        Raises:
            InputError: it was, but with another limit, or the file no longer exists.
        """
        if "assembled" not in self._noted:
            return False
        if self._noted["assembled"] != [limit] or not out.exists():
            raise InputError(
                f"{self.folder} remains from a finished download, with another limit "
                "or to a file that no longer exists; delete it"
            )
        return True

    def whole(self, limit: int | None) -> bool:
        """Whether nothing is missing."""
        at_end = bool(self.files) and self.cursor is None
        return at_end or (limit is not None and self.count >= limit)

    def begin(self, origin: Origin) -> None:
        """Note the origin of the download, with the day on which it began."""
        if self.origin is None:
            day = datetime.now(UTC).date().isoformat()
            self.origin = replace(origin, retrieved=origin.retrieved or day)
            self.note(spec=self.spec, origin=self.origin.to_dict())

    def note(self, **facts: Any) -> None:
        """Add facts about this download."""
        self._noted.update(facts)
        write_whole(self.folder / _MANIFEST, json.dumps(self._noted).encode())

    def add(self, page: Page, total: int | None) -> None:
        """Keep one more page."""
        head = {"count": len(page.entries), "cursor": page.cursor, "total": total}
        lines = b"".join(
            orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
            for line in (head, *page.entries)
        )
        path = self.folder / f"{len(self.files):08d}.page"
        write_whole(path, lines)
        self.files.append(path)
        self.count += len(page.entries)
        self.cursor, self.total = page.cursor, total

    def lines(self) -> Iterator[bytes]:
        """Yield the entries as lines."""
        for path in self.files:
            with path.open("rb") as file:
                yield from islice(file, 1, None)


class _Rate(ProgressColumn):
    """Entries per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


def _download(pages: _Pages, limit: int | None, progress: bool) -> None:
    """Get the pages that are missing."""
    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("fetching"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]

    def expected() -> int | None:
        known = [n for n in (pages.total, limit) if n is not None]
        return min(known, default=None)

    try:
        service = open_service(pages.spec)
        pages.begin(service.origin)
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("fetch", total=expected(), completed=pages.count)
            for page in service.pages(pages.cursor):
                pages.add(page, service.total if pages.total is None else pages.total)
                bar.update(task, total=expected(), completed=pages.count)
                if pages.whole(limit):
                    return
    except InputError as error:
        if not pages.files:  # nothing to go on with
            shutil.rmtree(pages.folder)
            raise
        raise InputError(
            f"{error}; {pages.count:,} entries are kept in {pages.folder}, the same "
            "command goes on from there"
        ) from None
    if not pages.whole(limit):
        raise RuntimeError(f"{pages.spec}: pages end, but the last one has a cursor")


def _assemble(pages: _Pages, out: Path, limit: int | None) -> None:
    """Write all pages as one file, and its origin beside it."""
    if pages.origin is None:
        raise RuntimeError(f"{pages.folder}: pages without {_MANIFEST}")
    with whole(out) as partial:
        count = 0
        with (
            partial.open("wb") as raw,
            gzip.GzipFile("", "wb", _COMPRESSION, raw, mtime=0) as file,
        ):
            for line in islice(pages.lines(), limit):
                file.write(line)
                count += 1
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        content = {
            "origin": pages.origin.to_dict(),
            "spec": pages.spec,
            "limit": limit,
            "count": count,
            "total": pages.total,
            "bytes": partial.stat().st_size,
            "sha256": digest,
        }
        # A snapshot never exists without its origin.
        text = json.dumps(content, indent=2) + "\n"
        write_whole(origin_path(out), text.encode())
