"""Hashes of a run's input files: two spellings of one path count as equal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py

from crysdistill.errors import InputError
from crysdistill.sources.contents import tree_hash
from crysdistill.teachers.ensemble import ENSEMBLE, members
from crysdistill.transfer.shipped import located

PATHS = (
    "corpus",
    "dataset",
    "exclude",
    "objectives.teacher.teachers",
    "split.file",
    "teacher",
    "test.dataset",
    "weights",
)
"""Settings that name files. Any other text may be the name of a folder by chance."""

Inputs = Mapping[str, list[str]]
"""The hashes of all files and folders that a setting names, by key."""


def find_inputs(settings: Mapping[str, Any]) -> Inputs:
    """Return the hashes of the paths among some settings.

    Args:
        settings: plain values by key; those of `PATHS` are a text or a list of texts.
    """
    found: dict[str, list[str]] = {}
    for key, value in settings.items():
        if key not in PATHS:
            continue
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text for text in texts) or not texts:
            continue
        hashes = [_of_text(text) for text in texts]
        if any(hashes):  # a teacher by name has no file; its name stands for it
            found[key] = [h or text for h, text in zip(hashes, texts, strict=True)]
    return found


def _of_text(text: str) -> str:
    """Return a hash of what a text names; "" if it names no file."""
    kind, _, where = text.partition(":")
    if kind == ENSEMBLE:
        try:
            return " ".join(tree_hash(file) for file in members(where))
        except InputError:
            return ""
    return _content(located(text))


def _content(path: Path) -> str:
    """Return a hash of the file or folder at a path; "" if there is none."""
    try:
        if not path.exists():
            return ""
    except OSError:  # a text too long for a name
        return ""
    return _of_store(path) or tree_hash(path)


def _of_store(path: Path) -> str:
    """Return the hash recorded in a store, with the names of its labels."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return ""
    try:
        with h5py.File(path, "r") as file:
            facts = json.loads(file.attrs["facts"])
            return f"{facts['hash']} {' '.join(facts['properties'])}"
    except (OSError, KeyError, ValueError, TypeError):
        return ""
