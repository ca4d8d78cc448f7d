"""Folders of CIF and POSCAR files, the same in a zip, and single files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from crysdistill.corpus.sources.labels import (
    ID_PROP,
    PROPERTIES,
    LabelTable,
    read_labels,
)
from crysdistill.corpus.sources.records import Record, Source, fingerprint, stamp
from crysdistill.errors import InputError

_SUFFIXES = {
    ".cif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".contcar": "poscar",
}
_VASP_NAMES = ("POSCAR", "CONTCAR")
_TABLES = (".jsonl", ".ndjson", ".json")
_UNREAD = (
    ".mcif",
    ".xyz",
    ".extxyz",
    ".res",
    ".pdb",
    ".xsf",
    ".cssr",
    ".traj",
    ".mol2",
)


def structure_format(name: str) -> str | None:
    """Return `cif` or `poscar` for the name of a structure file, None for others."""
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
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


def open_file(path: Path) -> Source:
    """Open one CIF or POSCAR file, without a label."""
    kind = structure_format(path.name) or "none"
    record = Record(str(path), file_id(path.name), kind, str(path.absolute()))
    return Source(path, lambda: iter([record]), 1, (), fingerprint([stamp(path)]))


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

    def records(self, names: Sequence[str], ids: Sequence[str]) -> Iterator[Record]:
        """Yield the structure files; those of a zip are read here, one at a time."""
        archive: Any = zipfile.ZipFile(self.root) if self.is_zip else nullcontext()
        with archive:
            for name, material_id in zip(names, ids, strict=True):
                kind = structure_format(name)
                if kind is None:
                    yield _unread(str(self.root), name)
                    continue
                payload: str | bytes = str((self.root / name).absolute())
                if self.is_zip:
                    try:
                        payload = archive.read(name)
                    except (zipfile.BadZipFile, OSError, EOFError) as error:
                        reason = f"{name}: damaged in the zip ({error}); get it again"
                        yield Record(str(self.root), material_id, problem=reason)
                        continue
                yield Record(str(self.root), material_id, kind, payload, place=name)

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
    """Whether any file below a folder is called like a CIF or POSCAR."""
    return any(map(structure_format, _Tree.of_folder(path).names))


def _is_table(name: str) -> bool:
    name = name.removesuffix(".gz").lower()
    return name.endswith(_TABLES) and name != "atom_init.json"


def _open_tree(path: Path, tree: _Tree, keep_unlabelled: bool, labels: bool) -> Source:
    """Open the structure files of a folder or zip, joined with their labels."""
    base = _common_folder(tree.names)
    found = [n for n in tree.names if structure_format(n) or _belongs(n, base)]
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

    def records() -> Iterator[Record]:
        entries = tree.records(found, ids)
        if table is None:
            return entries
        return table.join(entries, str(path), keep_unlabelled)

    count = len(found)
    if table is not None:
        count += table.orphans(known) + len(table.strays)
    files = tree.stamps([*found, *(base + name for name in names)])
    marks = fingerprint(files, keep_unlabelled, labels)
    return Source(path, records, count, table.properties if table else (), marks)


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
    return lower.endswith((*_UNREAD, ".jsonl", ".ndjson"))


def _label_id(text: str) -> str:
    """Return the id that a row means: `mp-149.cif` means `mp-149`."""
    return file_id(text) if structure_format(text) else text
