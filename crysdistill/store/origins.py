"""Origins of structures: databases, publications, and their licences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from crysdistill.errors import InputError


@dataclass(frozen=True)
class Origin:
    """One database or publication that structures were taken from.

    Args:
        name: its usual name, such as `Materials Project`.
        url: its address.
        licence: its SPDX identifier, such as `CC-BY-4.0`; "" if not known.
        query: the query; "" for the whole database.
        retrieved: the day of the download, as `2026-11-24`; "" if not known.
        citation: a DOI or a reference.
    """

    name: str
    url: str = ""
    licence: str = ""
    query: str = ""
    retrieved: str = ""
    citation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def is_non_commercial(licence: str) -> bool:
    """Whether an SPDX expression, or a part of it, forbids commercial use."""
    words = licence.upper().replace("-", " ").split()
    return "NC" in words or "NONCOMMERCIAL" in "".join(words)


def check_licence(licence: str) -> None:
    """Refuse text that does not have the form of an SPDX expression.

    Raises:
        InputError: it holds a character that no identifier has, such as a blank.
    """
    if licence and not re.fullmatch(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*", licence):
        meant = "-".join(licence.split())
        raise InputError(
            f"`licence` is {licence!r} but must be an SPDX identifier; did you mean "
            f"`{meant}`?"
        )


def joint_licence(licences: Iterable[str]) -> str:
    """Return the SPDX expression for something made from works under these licences.

    All known licences bind, so a ban on commercial use is never lost.
    """
    parts = (part for licence in licences for part in licence.split(" AND "))
    return " AND ".join(sorted({part for part in parts if part}))


def licence_remark(licence: str) -> str:
    """Return a licence as readable text, with a remark on commercial use."""
    if not licence:
        return "not known"
    return (
        f"{licence} (not for commercial use)" if is_non_commercial(licence) else licence
    )
