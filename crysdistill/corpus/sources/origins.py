"""Where structures come from and what may be done with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

NON_COMMERCIAL = "non-commercial"


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
    """Whether an SPDX identifier (or several, joined) forbids commercial use."""
    words = licence.upper().replace("-", " ").split()
    return "NC" in words or "NONCOMMERCIAL" in words or NON_COMMERCIAL in licence


def joint_licence(licences: Iterable[str]) -> str:
    """Return the SPDX expression of something made from works under these licences.

    All of them bind. A licence that is not known makes the whole not known, except
    that what forbids commercial use is never lost.
    """
    known = sorted({licence for licence in licences if licence})
    return " AND ".join(known)
