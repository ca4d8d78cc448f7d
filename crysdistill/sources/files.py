"""Files below a folder or in a zip, and why some of them cannot be read."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from crysdistill.errors import BadStructure, InputError, first_line
from crysdistill.sources.contents import not_a_file


def is_hidden(name: str) -> bool:
    """Whether a part of a path is hidden, or is a folder that macOS adds to a zip."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def walk(root: Path) -> tuple[list[str], dict[str, str]]:
    """Return the relative names of the files below a folder, and problems by name.

    A link to a folder elsewhere is followed. A link to a folder within `root` is not,
    because that folder is read anyway.

    Raises:
        InputError: a folder cannot be read.
    """
    names: list[str] = []
    problems: dict[str, str] = {}
    top = Path(os.path.realpath(root))
    left: list[tuple[Path, str, tuple[Path, ...]]] = [(root, "", (top,))]
    while left:
        folder, start, above = left.pop()
        for entry in _listed(folder):
            name, path = start + entry.name, Path(entry.path)
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                left.append((path, f"{name}/", above))
            elif entry.is_file(follow_symlinks=False):
                names.append(name)
            elif reason := not_a_file(path):
                if reason != "a folder":
                    names.append(name)
                    problems[name] = f"{reason}; mend or remove it"
                    continue
                real = Path(os.path.realpath(path))
                if any(one.is_relative_to(real) for one in above):
                    if real != top:
                        names.append(name)
                        problems[name] = "a link to a folder above it; remove it"
                elif not real.is_relative_to(top):
                    left.append((path, f"{name}/", (*above, real)))
            else:
                names.append(name)
    return names, problems


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror})"
        ) from None


def locked_members(
    archive: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo]
) -> dict[str, str]:
    """Return reasons why files of a zip cannot be unpacked, by name, except damage."""
    found: dict[str, str] = {}
    known: dict[tuple[int, int], bool] = {}
    for member in members:
        kind = member.flag_bits & 1, member.compress_type
        if kind not in known:
            known[kind] = _can_open(archive, member)
        if not known[kind]:
            found[member.filename] = (
                "it needs a password; unpack the zip and give the folder"
                if kind[0]
                else f"it is packed by method {kind[1]}, which Python cannot unpack; "
                "unpack the zip and give the folder"
            )
    return found


def _can_open(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    try:
        archive.open(member).close()
    except RuntimeError:  # encrypted; NotImplementedError is one, too
        return False
    except Exception:  # damaged; reported when the file is read
        return True
    return True


def unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the content of a file in a zip.

    Raises:
        BadStructure: it is damaged, or packed by an unknown method.
    """
    try:
        return archive.read(name)
    except Exception as error:  # each way of packing has its own
        raise BadStructure(
            f"damaged in the zip ({first_line(error)}); get it again"
        ) from None
