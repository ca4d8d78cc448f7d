"""Teachers: models and tables that answer for the atoms or crystals of a batch.

A student learns from its labels and from a teacher's answers for the same crystals. A
new kind of teacher is one file with a subclass of `Teacher`, and one line in `live`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crysdistill.errors import InputError, did_you_mean
from crysdistill.store.store import Store
from crysdistill.teachers.answers import TeacherAnswers
from crysdistill.teachers.asking import answers_for
from crysdistill.teachers.encoder import EncoderTeacher, encoder_teacher
from crysdistill.teachers.named import NAMED
from crysdistill.teachers.published import published_teacher
from crysdistill.teachers.random import RandomTeacher
from crysdistill.teachers.table import TableTeacher
from crysdistill.teachers.tables.mapped import is_safetensors_table
from crysdistill.teachers.teacher import Answer, Teacher
from crysdistill.transfer.shipped import located, shipped

__all__ = [
    "NAMED",
    "Answer",
    "EncoderTeacher",
    "RandomTeacher",
    "TableTeacher",
    "Teacher",
    "TeacherAnswers",
    "answers_for",
    "make_teacher",
]


def make_teacher(
    spec: str | Path,
    store: Store,
    *,
    seed: int = 0,
    encoder: Mapping[str, Any] | None = None,
) -> Teacher:
    """Return the teacher that a configuration names.

    The kind of a file is recognised by its content, not by its name.

    Args:
        spec: `random`; one of `NAMED`, optionally with a model, as in `chgnet:r2scan`,
            or with its files, as in `ensemble:runs/members`; a weights file, or one of
            the package by name; a checkpoint of the published CGCNN code; or a table
            of embeddings, optionally with one of its layers, as in `table.h5:2`.
        store: the store with the crystals that the teacher will answer for.
        seed: of the weights of a `random` teacher.
        encoder: `name` and the settings of a `random` teacher.

    Raises:
        InputError: there is no such teacher, or its file cannot be used.
    """
    text = str(spec)
    name, _, rest = text.rpartition(":")
    if text == "random":
        return RandomTeacher(encoder or {"name": "cgcnn"}, seed, store.graph)
    if text in NAMED:
        return NAMED[text]("")
    path = located(text)
    if not path.exists():
        named, _, given = text.partition(":")
        if named in NAMED:
            return NAMED[named](given)
        if rest.isdecimal() and Path(name).is_file():
            return TableTeacher(Path(name), store, int(rest))
        known = ("random", *NAMED, *shipped())
        near = [str(file) for file in path.parent.glob("*") if file.is_file()]
        raise InputError(
            f"no teacher {text!r}: there is no such file, and it is none of "
            f"{', '.join(known)}{did_you_mean(text, (*known, *near))}"
        )
    return _from_file(path, store)


def _from_file(path: Path, store: Store) -> Teacher:
    """Return the teacher that a file holds."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the file in it")
    if path.suffix.lower() == ".csv":
        raise InputError(
            f"{path}: a CSV cannot teach; write the table as .safetensors, .h5 or "
            ".parquet (`crysdistill embed ... --level atoms`)"
        )
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PAR1" or start[:8] == b"\x89HDF\r\n\x1a\n":
        return TableTeacher(path, store)
    # A pickle starts with 0x80, but so may the length of a safetensors header.
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:] != b"{"):
        return published_teacher(path)
    if is_safetensors_table(path):
        return TableTeacher(path, store)
    return encoder_teacher(path)
