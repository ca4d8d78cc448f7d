"""Folders of structure files, the same in a zip, and single files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from crysdistill.errors import BadStructure, InputError
from crysdistill.sources.ase_files import (
    DATABASES,
    frame_records,
    frames,
    frames_format,
    frames_of_zip,
    label_names,
)
from crysdistill.sources.labels import (
    ID_PROP,
    PROPERTIES,
    LabelTable,
    read_labels,
)
from crysdistill.sources.records import (
    Record,
    Source,
    fingerprint,
    parse,
    stamp,
)
from crysdistill.structures.cif import split_cif
from crysdistill.structures.readers import read_bytes

_SUFFIXES = {
    ".cif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".contcar": "poscar",
    ".res": "res",
    ".cssr": "cssr",
    ".gen": "gen",
}
_VASP_NAMES = ("POSCAR", "CONTCAR")
_TABLES = (".jsonl", ".ndjson", ".json")
_UNREAD = (".mcif", ".pdb", ".mol2")


def structure_format(name: str) -> str | None:
    """Return the format of a file of one structure by its name, None for others."""
    path = PurePosixPath(name.removesuffix(".gz"))
    if path.name.startswith(_VASP_NAMES):
        return "poscar"
    return _SUFFIXES.get(path.suffix.lower())


def file_id(name: str) -> str:
    """Return the material id that a file's name stands for.

    The stem of `mp-149.cif`; all of `POSCAR.mp-149`; for a plain `POSCAR` in a folder
    of its own, as programs leave it, the name of that folder.
    """
    path = PurePosixPath(name.removesuffix(".gz"))
    if path.name in _VASP_NAMES and path.parent.name:
        return path.parent.name
    if path.suffix.lower() in (*_SUFFIXES, ".json") or frames_format(name):
        return path.stem
    return path.name


def open_file(path: Path) -> Source:
    """Open a file of one structure, without a label; a CIF may hold several."""
    kind = structure_format(path.name) or "none"
    record = Record(str(path), file_id(path.name), kind, str(path.absolute()))
    found = blocks(record, named=True)
    return Source(path, lambda: iter(found), len(found), (), fingerprint([stamp(path)]))


def blocks(record: Record, named: bool = False) -> list[Record]:
    """Return a record for each structure of a CIF that holds several.

    Args:
        record: of a file, or its content; any that is not such a CIF is returned.
        named: whether the names of its data blocks are ids if no two are the same; else
            `ID-1`, `ID-2`, ...
    """
    if record.format != "cif":
        return [record]
    try:
        payload = record.payload
        data = payload if isinstance(payload, bytes) else read_bytes(str(payload))
        found = split_cif(data)
    except BadStructure:
        return [record]  # told where it is parsed
    if len(found) < 2:  # read once, so not once more where it is parsed
        return [replace(record, payload=data)]
    names = [name for name, _ in found]
    distinct = named and all(names) and len(set(names)) == len(names)
    start = f"{record.place}, " if record.place else ""
    return [
        replace(
            record,
            material_id=name if distinct else f"{record.material_id}-{number}",
            payload=content,
            place=f"{start}data_{name}",
        )
        for number, (name, content) in enumerate(found, start=1)
    ]


@dataclass
class _Tree:
    """The files below a folder, or in a zip, by relative name, sorted."""

    root: Path
    names: list[str]
    is_zip: bool = False

    @classmethod
    def of_folder(cls, root: Path) -> _Tree:
        def stop(error: OSError) -> None:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

        names = []
        for folder, below, files in os.walk(root, onerror=stop):
            below[:] = sorted(name for name in below if not _hidden(name))
            inside = Path(folder).relative_to(root).as_posix()
            start = "" if inside == "." else f"{inside}/"
            names += [start + name for name in files if not _hidden(name)]
        return cls(root, sorted(names))

    @classmethod
    def of_zip(cls, root: Path) -> _Tree:
        try:
            with zipfile.ZipFile(root) as archive:
                names = [i.filename for i in archive.infolist() if not i.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(
                f"{root}: not a readable zip ({error}): get the file again"
            ) from None
        shown = [n for n in names if not any(map(_hidden, n.split("/")))]
        return cls(root, sorted(shown), is_zip=True)

    def read(self, name: str) -> bytes:
        """Return the content of a file, not unpacked."""
        if self.is_zip:
            with zipfile.ZipFile(self.root) as archive:
                return archive.read(name)
        return (self.root / name).read_bytes()

    def records(
        self, names: Sequence[str], ids: Sequence[str], labels: Sequence[str] = ()
    ) -> Iterator[Record]:
        """Yield what structure files hold; those of a zip are read here.

        Args:
            names: of the files.
            ids: of each, or what the ids of its frames begin with.
            labels: to take from frames.
        """
        archive: Any = zipfile.ZipFile(self.root) if self.is_zip else nullcontext()
        source = str(self.root)
        with archive:
            for name, material_id in zip(names, ids, strict=True):
                layout = frames_format(name)
                if layout is not None:
                    found = (
                        frames_of_zip(archive, name, layout)
                        if self.is_zip
                        else frames(self.root / name, layout)
                    )
                    yield from frame_records(
                        found, source, material_id, tuple(labels), name
                    )
                    continue
                kind = structure_format(name) or ("json" if _is_json(name) else None)
                if kind is None:
                    yield _unread(source, name)
                    continue
                payload: str | bytes = str((self.root / name).absolute())
                if self.is_zip:
                    try:
                        payload = archive.read(name)
                    except (zipfile.BadZipFile, OSError, EOFError) as error:
                        reason = f"{name}: damaged in the zip ({error}); get it again"
                        yield Record(source, material_id, problem=reason)
                        continue
                yield from blocks(
                    Record(source, material_id, kind, payload, place=name)
                )

    def label_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the labels that stand beside frames."""
        found: dict[str, None] = {}
        archive: Any = zipfile.ZipFile(self.root) if self.is_zip else nullcontext()
        with archive:
            for name in names:
                layout = frames_format(name)
                if layout is None:
                    continue
                if self.is_zip:
                    those = label_names(frames_of_zip(archive, name, layout))
                else:
                    those = label_names(frames(self.root / name, layout))
                found.update(dict.fromkeys(those))
        return tuple(found)

    def stamps(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        """Return what the fingerprint is made of."""
        if self.is_zip:
            return [stamp(self.root)]
        return [stamp(self.root / name) for name in names]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _unread(source: str, name: str) -> Record:
    """Return the record of a file that holds structures but is not read."""
    suffix = PurePosixPath(name.removesuffix(".gz")).suffix.lower()
    if suffix in _UNREAD:
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


def open_folder(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a folder of structure files, with `id_prop.csv` or `properties.csv` or none.

    Raises:
        InputError: it holds no structure, or two label tables.
    """
    return _open_tree(path, _Tree.of_folder(path), keep_unlabelled, labels)


def open_zip(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a zip of such a folder.

    Raises:
        InputError: it cannot be read, holds no structure, or two label tables.
    """
    return _open_tree(path, _Tree.of_zip(path), keep_unlabelled, labels)


def tables_in(path: Path) -> list[Path]:
    """Return the tables of structures directly in a folder."""
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and _is_table(file.name) and not _hidden(file.name)
    ]


def has_structures(path: Path) -> bool:
    """Whether any file below a folder is called like a file of structures."""
    return any(map(_is_structure_file, _Tree.of_folder(path).names))


def hold_one_each(paths: Sequence[Path]) -> bool:
    """Whether files are JSON of one structure each, by the smallest of them."""
    if not all(_is_json(path.name) for path in paths):
        return False
    smallest = min(paths, key=lambda path: path.stat().st_size)
    try:
        parse(Record(str(smallest), smallest.name, "json", str(smallest)))
    except BadStructure as error:
        return "not one structure" not in str(error)
    return True


def _is_structure_file(name: str) -> bool:
    return bool(structure_format(name) or frames_format(name))


def _is_json(name: str) -> bool:
    return _is_table(name) and name.removesuffix(".gz").lower().endswith(".json")


def _is_table(name: str) -> bool:
    name = name.removesuffix(".gz").lower()
    return name.endswith(_TABLES) and name != "atom_init.json"


def _open_tree(path: Path, tree: _Tree, keep_unlabelled: bool, labels: bool) -> Source:
    """Open the structure files of a folder or zip, joined with their labels."""
    base = _common_folder(tree.names)
    found = [n for n in tree.names if _is_structure_file(n) or _belongs(n, base)]
    if not any(map(_is_structure_file, found)):
        jsons = [n for n in tree.names if _is_json(n)]
        if len(jsons) > 1:  # one file for each structure
            found = sorted({*found, *jsons})
    ids = [file_id(name) for name in found]
    known = set(ids)
    names = [n for n in (ID_PROP, PROPERTIES) if labels and base + n in tree.names]
    if len(names) > 1:
        raise InputError(f"{path}: both {ID_PROP} and {PROPERTIES}; remove one")
    if not found and not names:
        raise InputError(
            f"{path}: no structures in it; it should hold CIF (`*.cif`) or POSCAR files"
        )
    table: LabelTable | None = None
    if names:
        shown = f"{path}/{base}{names[0]}"
        try:
            data = tree.read(base + names[0])
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{shown}: cannot be read ({error}); mend it") from None
        table = read_labels(data, shown, known, _label_id)

    own = tree.label_names(found) if labels and table is None else ()

    def records() -> Iterator[Record]:
        entries = tree.records(found, ids, own)
        if table is None:
            return entries
        return table.join(entries, str(path), keep_unlabelled)

    count = len(found)
    if table is not None:
        count += table.orphans(known) + len(table.strays)
    files = tree.stamps([*found, *(base + name for name in names)])
    marks = fingerprint(files, keep_unlabelled, labels)
    return Source(path, records, count, table.properties if table else own, marks)


def _common_folder(names: Sequence[str]) -> str:
    """Return the folder, with its slash, that everything lies in; "" if none does."""
    common = []
    for level in zip(*(name.split("/")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return "/".join([*common, ""])


def _belongs(name: str, base: str) -> bool:
    """Whether a file is no structure file, but must not be passed over in silence."""
    lower = name.removesuffix(".gz").lower()
    in_base = name.startswith(base) and "/" not in name[len(base) :]
    if lower.endswith((ID_PROP, PROPERTIES)):
        return not in_base
    if lower.endswith("thumbs.db"):  # Windows leaves it in folders of pictures
        return False
    return lower.endswith((*_UNREAD, *DATABASES, ".jsonl", ".ndjson"))


def _label_id(text: str) -> str:
    """Return the id that a row means: `mp-149.cif` means `mp-149`."""
    return file_id(text) if structure_format(text) else text
