"""Where structures come from and what may be done with them."""

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
        name: as its users call it, such as `Materials Project`.
        url: where it is.
        licence: its SPDX identifier, such as `CC-BY-4.0`; "" where not known.
        query: what was asked for; "" for all of it.
        retrieved: the day, as `2026-11-24`; "" where not known.
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
    """Whether an SPDX identifier, or one of several, forbids commercial use."""
    words = licence.upper().replace("-", " ").split()
    return "NC" in words or "NONCOMMERCIAL" in "".join(words)


def check_licence(licence: str) -> None:
    """Refuse what is no SPDX expression by its form.

    Raises:
        InputError: it holds what no identifier does, such as a blank.
    """
    if licence and not re.fullmatch(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*", licence):
        meant = "-".join(licence.split())
        raise InputError(
            f"`licence` is {licence!r} but must be an SPDX identifier; did you mean "
            f"`{meant}`?"
        )


def joint_licence(licences: Iterable[str]) -> str:
    """Return the SPDX expression of something made from works under these licences.

    All that are known bind; so what forbids commercial use is never lost.
    """
    parts = (part for licence in licences for part in licence.split(" AND "))
    return " AND ".join(sorted({part for part in parts if part}))


def licence_remark(licence: str) -> str:
    """Return a licence for people to read, with what it means for them."""
    if not licence:
        return "not known"
    return (
        f"{licence} (not for commercial use)" if is_non_commercial(licence) else licence
    )
