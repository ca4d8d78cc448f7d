"""Folders and zips of structure files, joined with the table of labels beside them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crysdistill.errors import BadStructure, InputError
from crysdistill.sources.ase_files import DATABASES, frames_format
from crysdistill.sources.cells import read_rows
from crysdistill.sources.contents import contents_of
from crysdistill.sources.folders import (
    UNREAD,
    Tree,
    file_id,
    is_json,
    is_structure_file,
    structure_format,
)
from crysdistill.sources.identity import same_name
from crysdistill.sources.label_files import read_labels
from crysdistill.sources.labels import ID_PROP, PROPERTIES, LabelTable
from crysdistill.sources.records import Record, Source

_TEXT = (".csv", ".tsv")
_SPREADSHEETS = (".xlsx", ".xls", ".ods")
_OWN = (".quarantine.csv", "atom_init.json")
_MOST_TABLES = 20  # the most tables to look at


def open_folder(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a folder of structure files, with `id_prop.csv`, `properties.csv` or none.

    A table of another name is read if it is the only one and names every structure.

    Raises:
        InputError: the folder holds no structure, or two label tables.
    """
    return _open_tree(path, Tree.of_folder(path), keep_unlabelled, labels)


def open_zip(path: Path, keep_unlabelled: bool, labels: bool) -> Source:
    """Open a zip of such a folder.

    Raises:
        InputError: it cannot be read, holds no structure, or two label tables.
    """
    return _open_tree(path, Tree.of_zip(path), keep_unlabelled, labels)


def _open_tree(path: Path, tree: Tree, keep_unlabelled: bool, labels: bool) -> Source:
    """Open the structure files of a folder or zip, joined with their labels."""
    base = _common_folder(tree.names)
    found = [n for n in tree.names if is_structure_file(n) or _belongs(n, base, tree)]
    if not any(map(is_structure_file, found)):
        jsons = [n for n in tree.names if is_json(n)]
        if len(jsons) > 1:  # one file for each structure
            found = sorted({*found, *jsons})
    ids = [file_id(name) for name in found]
    known = {same_name(name) for name in ids}
    names = [n for n in (ID_PROP, PROPERTIES) if labels and base + n in tree.names]
    if len(names) > 1:
        raise InputError(f"{path}: both {ID_PROP} and {PROPERTIES}; remove one")
    if not found and not names:
        raise InputError(
            f"{path}: no structures in it; it should hold CIF (`*.cif`) or POSCAR files"
        )
    locked = [n for n in found if n in tree.problems]
    if locked and len(locked) == len(found) and tree.is_zip:
        raise InputError(f"{path}: {locked[0]}: {tree.problems[locked[0]]}")
    beside = _Beside.look(tree, base, found, known) if labels else _Beside((), ())
    if not names and beside.complete:
        names = [beside.complete[len(base) :]]
    table: LabelTable | None = None
    remarks = list(beside.remarks(path, base + names[0] if names else ""))
    if names:
        shown = f"{path}/{base}{names[0]}"
        try:
            data = tree.read(base + names[0])
        except BadStructure as error:
            raise InputError(f"{shown}: {error}") from None
        table = read_labels(data, shown, known, _label_id)
        remarks += table.remarks

    own = tree.label_names(found) if labels and table is None else ()

    def records() -> Iterator[Record]:
        entries = tree.records(found, ids, own)
        if table is None:
            return entries
        return table.join(entries, str(path), keep_unlabelled)

    count = len(found)
    if table is not None:
        count += table.orphans(known) + len(table.strays)
    files = tree.files([*found, *(base + name for name in names)])
    contents = contents_of(files, keep_unlabelled, labels)
    properties = table.properties if table else own
    return Source(path, records, count, properties, contents, remarks=tuple(remarks))


@dataclass(frozen=True)
class _Beside:
    """Tables beside structures that do not have the name of a label table.

    Args:
        hits: the number of structures that each table names, by table.
        spreadsheets: spreadsheet files, which are not read.
        count: the number of structures.
        top: the folder of the label table, with its slash.
    """

    hits: Sequence[tuple[str, int]]
    spreadsheets: Sequence[str]
    count: int = 0
    top: str = ""

    @classmethod
    def look(
        cls, tree: Tree, base: str, found: Sequence[str], known: Container[str]
    ) -> _Beside:
        """Look at the tables of a folder.

        Args:
            tree: the files of the folder.
            base: the common folder of all files.
            found: the files that are read.
            known: the ids of structures.
        """
        free = [n for n in tree.names if n not in found and not n.endswith(_OWN)]
        tables = [n for n in free if n.lower().endswith(_TEXT)]
        tables = [n for n in tables if n not in (base + ID_PROP, base + PROPERTIES)]
        sheets = [n for n in free if n.lower().endswith(_SPREADSHEETS)]
        hits = [(name, _named(tree, name, known)) for name in tables[:_MOST_TABLES]]
        count = len({same_name(file_id(name)) for name in found})
        return cls(hits, sheets, count, base)

    @property
    def complete(self) -> str:
        """The only table with a row for each structure; "" if there is none."""
        full = [name for name, hits in self.hits if hits == self.count > 0]
        some = [name for name, hits in self.hits if hits]
        above = len(full) == len(some) == 1 and "/" not in full[0][len(self.top) :]
        return full[0] if above else ""

    def remarks(self, path: Path, read: str) -> Iterator[str]:
        """Yield remarks for the user.

        Args:
            path: the folder.
            read: the name of the label table that is read; "" for none.
        """
        for name, hits in self.hits:
            if name == read:
                yield f"{path}/{name}: read as the table of labels of all {hits:,}"
            elif hits and read:
                yield f"{path}/{name}: not read; labels come from {read}"
            elif hits:
                yield (
                    f"{path}/{name}: holds labels of {hits:,} of {self.count:,} "
                    f"structures and is not read; call it {self.top}{ID_PROP} (with "
                    f"names of columns: {PROPERTIES})"
                )
            elif not read:
                yield f"{path}/{name}: not read, since it names none of the structures"
        for name in self.spreadsheets if not read else ():
            yield f"{path}/{name}: not read; if it holds labels, save it as {ID_PROP}"


def _named(tree: Tree, name: str, known: Container[str]) -> int:
    """Return the number of structures that a table names."""
    try:
        rows, _ = read_rows(tree.read(name), name)
    except InputError:  # unreadable, or no table
        return 0
    width = max((len(cells) for _, cells in rows), default=0)
    columns = ({_label_name(cells, c) for _, cells in rows} for c in range(width))
    return max((sum(n in known for n in names) for names in columns), default=0)


def _label_name(cells: Sequence[str], column: int) -> str:
    cell = cells[column] if column < len(cells) else ""
    return same_name(_label_id(cell)) if cell else ""


def _common_folder(names: Sequence[str]) -> str:
    """Return the common folder of all files, with its slash; "" if there is none."""
    common = []
    for level in zip(*(name.split("/")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return "/".join([*common, ""])


def _belongs(name: str, base: str, tree: Tree) -> bool:
    """Whether a file is no structure file but must still be reported."""
    lower = name.removesuffix(".gz").lower()
    in_base = name.startswith(base) and "/" not in name[len(base) :]
    if lower.endswith((ID_PROP, PROPERTIES)):
        return not in_base
    if name in tree.problems and not tree.is_zip:  # a link to nowhere, or a circle
        return "link" in tree.problems[name] or "cannot" in tree.problems[name]
    if lower.endswith("thumbs.db"):  # Windows leaves it in folders of pictures
        return False
    return lower.endswith((*UNREAD, *DATABASES, ".jsonl", ".ndjson"))


def _label_id(text: str) -> str:
    """Return the id that a row means: `mp-149.cif` means `mp-149`."""
    text = text.replace("\\", "/")
    if structure_format(text) or frames_format(text) or is_json(text):
        return file_id(text)
    return text
