"""Crystals that a program already has, as a source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from crysdistill.sources.records import Record, Source
from crysdistill.structures.crystal import Crystal

NAME = "crystals"
"""The name of the source in quarantine tables."""


def open_crystals(crystals: Sequence[Crystal], labels: bool = True) -> Source:
    """Return crystals as a source; their properties are the labels.

    Args:
        crystals: the crystals; each is checked as if it came from a file.
        labels: whether to read their properties.
    """

    def records() -> Iterator[Record]:
        for crystal in crystals:
            properties = crystal.properties if labels else {}
            yield Record(NAME, crystal.material_id, "crystal", crystal, properties)

    names = dict.fromkeys(name for c in crystals for name in c.properties)
    return Source(
        Path(NAME),
        records,
        len(crystals),
        tuple(names) if labels else (),
        lambda: _content(crystals, labels),
    )


def _content(crystals: Sequence[Crystal], labels: bool) -> str:
    """Return a hash of everything that a build reads."""
    digest = hashlib.sha256(repr(labels).encode())
    for crystal in crystals:
        digest.update(crystal.material_id.encode())
        for array in (crystal.atomic_numbers, crystal.frac_coords, crystal.cell):
            digest.update(array.tobytes())
        digest.update(repr(sorted(crystal.properties.items())).encode())
    return digest.hexdigest()
