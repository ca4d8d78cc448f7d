"""Folders and zips of structure files, and single files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from crysdistill.errors import BadStructure, InputError, first_line
from crysdistill.sources.ase_files import (
    DATABASES,
    frame_records,
    frames,
    frames_format,
    frames_of_zip,
    label_names,
)
from crysdistill.sources.contents import contents_of
from crysdistill.sources.files import (
    is_hidden,
    locked_members,
    unpacked,
    walk,
)
from crysdistill.sources.records import Record, Source, parse
from crysdistill.structures.cif import split_cif
from crysdistill.structures.readers import read_bytes
from crysdistill.structures.text import format_of

_SUFFIXES = {
    ".cif": "cif",
    ".mcif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".contcar": "poscar",
    ".res": "res",
    ".cssr": "cssr",
    ".gen": "gen",
}
_VASP_NAMES = ("POSCAR", "CONTCAR")
_TABLES = (".jsonl", ".ndjson", ".json")
UNREAD = (".pdb", ".mol2")


def structure_format(name: str) -> str | None:
    """Return the format of a file of one structure by its name, None for others."""
    path = PurePosixPath(name.removesuffix(".gz"))
    known = _SUFFIXES.get(path.suffix.lower())
    if known is None and path.name.startswith(_VASP_NAMES):
        return None if frames_format(name) or _is_table(name) else "poscar"
    return known


def file_id(name: str) -> str:
    """Return the material id in a file's name.

    The id is the stem of `mp-149.cif`, the whole name `POSCAR.mp-149`, or the name of
    the folder of a plain `POSCAR`, because programs write each in its own folder.
    """
    path = PurePosixPath(name.removesuffix(".gz"))
    if path.name in _VASP_NAMES and path.parent.name not in ("", ".."):
        return path.parent.name
    if path.suffix.lower() in (*_SUFFIXES, ".json") or frames_format(name):
        return path.stem
    return path.name


def open_file(path: Path) -> Source:
    """Open a file of one structure, without a label; a CIF may hold several."""
    kind = structure_format(path.name) or "none"
    name = file_id(path.name)
    record = Record(
        str(path), name, kind, str(path.absolute()), made_up=name in _VASP_NAMES
    )
    found = blocks(record, named=True)
    contents = contents_of([(path.name, path)])
    return Source(path, lambda: iter(found), len(found), (), contents)


def blocks(record: Record, named: bool = False) -> list[Record]:
    """Return a record for each structure of a CIF that holds several.

    The content decides: a `POSCAR_NaCl` that holds a CIF counts as one.

    Args:
        record: a file or its content; it is returned unless it is such a CIF.
        named: whether the names of the data blocks become ids if all differ; otherwise
            the ids are `ID-1`, `ID-2`, ...
    """
    if record.format not in ("cif", "poscar"):
        return [record]
    try:
        payload = record.payload
        data = payload if isinstance(payload, bytes) else read_bytes(str(payload))
        # Read once, so not once more where it is parsed.
        record = replace(record, payload=data, format=format_of(data, record.format))
        parts = split_cif(data) if record.format == "cif" else []
    except BadStructure:
        return [record]  # told where it is parsed
    if not parts:
        return [record]
    crystals = [part for part in parts if not part.problem]
    names = [part.name for part in parts]
    single = len(crystals) == 1  # the other blocks lack atoms; it has the file's id
    distinct = named and all(names) and len(set(names)) == len(names)
    start = f"{record.place}, " if record.place else ""
    records = []
    for number, part in enumerate(parts, start=1):
        name = part.name if distinct else f"{record.material_id}-{number}"
        if single and not part.problem:
            name = record.material_id
        found = replace(
            record,
            material_id=name,
            payload=part.content,
            place=f"{start}data_{part.name}",
        )
        records.append(found.refuse(part.problem) if part.problem else found)
    return records


@dataclass
class Tree:
    """The files below a folder, or in a zip, by relative name, sorted.

    Args:
        root: the folder or the zip.
        names: the names of the files.
        problems: reasons why some of them cannot be read, by name.
        packed: the names in the zip, where they differ.
    """

    root: Path
    names: list[str]
    problems: dict[str, str] = field(default_factory=dict)
    packed: dict[str, str] = field(default_factory=dict)
    is_zip: bool = False

    @classmethod
    def of_folder(cls, root: Path) -> Tree:
        """Return the tree of a folder.

        Raises:
            InputError: the folder, or a folder in it, cannot be read.
        """
        names, problems = walk(root)
        return cls(root, sorted(names), problems)

    @classmethod
    def of_zip(cls, root: Path) -> Tree:
        """Return the tree of a zip.

        Raises:
            InputError: the file is not a zip.
        """
        try:
            with zipfile.ZipFile(root) as archive:
                members = [i for i in archive.infolist() if not i.is_dir()]
                problems = locked_members(archive, members)
        except Exception as error:  # a damaged directory raises nearly anything
            raise InputError(
                f"{root}: not a readable zip ({first_line(error)}): get the file again"
            ) from None
        # Some Windows programs write backslashes.
        shown = {i.filename.replace("\\", "/"): i.filename for i in members}
        names = [n for n in shown if not any(map(is_hidden, n.split("/")))]
        why = {n: problems[i] for n, i in shown.items() if i in problems}
        return cls(root, sorted(names), why, shown, is_zip=True)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            BadStructure: it cannot be read.
        """
        if name in self.problems:
            raise BadStructure(self.problems[name])
        if not self.is_zip:
            try:
                return (self.root / name).read_bytes()
            except OSError as error:
                raise BadStructure(f"cannot be read ({error.strerror})") from None
        with zipfile.ZipFile(self.root) as archive:
            return unpacked(archive, self.packed[name])

    def records(
        self, names: Sequence[str], ids: Sequence[str], labels: Sequence[str] = ()
    ) -> Iterator[Record]:
        """Yield the records of structure files; zipped files are read here.

        Args:
            names: the names of the files.
            ids: the id of each file, or the stem of the ids of its frames.
            labels: the labels to read from frames.
        """
        archive: Any = zipfile.ZipFile(self.root) if self.is_zip else nullcontext()
        source = str(self.root)
        with archive:
            for name, material_id in zip(names, ids, strict=True):
                if name in self.problems:
                    reason = f"{name}: {self.problems[name]}"
                    yield Record(source, material_id, problem=reason)
                    continue
                layout = frames_format(name)
                if layout is not None:
                    found = (
                        frames_of_zip(archive, self.packed[name], layout)
                        if self.is_zip
                        else frames(self.root / name, layout)
                    )
                    yield from frame_records(
                        found, source, material_id, tuple(labels), name
                    )
                    continue
                kind = structure_format(name) or ("json" if is_json(name) else None)
                if kind is None:
                    yield _unread(source, name)
                    continue
                payload: str | bytes = str((self.root / name).absolute())
                if self.is_zip:
                    try:
                        payload = unpacked(archive, self.packed[name])
                    except BadStructure as error:
                        yield Record(source, material_id, problem=f"{name}: {error}")
                        continue
                yield from blocks(
                    Record(
                        source,
                        material_id,
                        kind,
                        payload,
                        place=name,
                        made_up=material_id in _VASP_NAMES,
                    )
                )

    def label_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the labels beside frames."""
        found: dict[str, None] = {}
        archive: Any = zipfile.ZipFile(self.root) if self.is_zip else nullcontext()
        with archive:
            for name in names:
                layout = frames_format(name)
                if layout is None or name in self.problems:
                    continue
                if self.is_zip:
                    packed = self.packed[name]
                    those = label_names(frames_of_zip(archive, packed, layout))
                else:
                    those = label_names(frames(self.root / name, layout))
                found.update(dict.fromkeys(those))
        return tuple(found)

    def files(self, names: Sequence[str]) -> list[tuple[str, Path]]:
        """Return files with their names, for a hash of their content."""
        if self.is_zip:
            return [("", self.root)]
        return [(name, self.root / name) for name in names]


def _unread(source: str, name: str) -> Record:
    """Return the record of a file that holds structures but is not read."""
    suffix = PurePosixPath(name.removesuffix(".gz")).suffix.lower()
    if suffix in UNREAD:
        reason = f"{name}: `{suffix}` is not read; write it as CIF or POSCAR"
    elif suffix in DATABASES:
        reason = f"{name}: an ASE database; give it as a source of its own"
    elif suffix == ".csv":
        reason = (
            f"{name}: labels in a sub-folder are not read; give that folder as a "
            "source of its own"
        )
    else:
        reason = f"{name}: not one structure; give it as a source of its own"
    return Record(source, PurePosixPath(name).name, problem=reason)


def tables_in(path: Path) -> list[Path]:
    """Return the tables of structures directly in a folder."""
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and _is_table(file.name) and not is_hidden(file.name)
    ]


def has_structures(path: Path) -> bool:
    """Whether any file below a folder has the name of a structure file."""
    return any(map(is_structure_file, Tree.of_folder(path).names))


def hold_one_each(paths: Sequence[Path]) -> bool:
    """Whether JSON files hold one structure each, judged by the smallest file."""
    if not all(is_json(path.name) for path in paths):
        return False
    smallest = min(paths, key=lambda path: path.stat().st_size)
    try:
        parse(Record(str(smallest), smallest.name, "json", str(smallest)))
    except BadStructure as error:
        return "not one structure" not in str(error)
    return True


def is_structure_file(name: str) -> bool:
    """Whether a file has the name of a structure file."""
    return bool(structure_format(name) or frames_format(name))


def is_json(name: str) -> bool:
    """Whether a file has the name of a JSON file that may hold structures."""
    return _is_table(name) and name.removesuffix(".gz").lower().endswith(".json")


def _is_table(name: str) -> bool:
    name = name.removesuffix(".gz").lower()
    return name.endswith(_TABLES) and name != "atom_init.json"
