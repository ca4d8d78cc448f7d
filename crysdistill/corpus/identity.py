"""The identity of a build: its sources and settings, to continue it or skip it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import xxhash

from crysdistill import __version__
from crysdistill.corpus.shards import BuildSettings
from crysdistill.errors import InputError
from crysdistill.sources.records import Source

_FEW = 50
"""Up to this many sources are noted one by one; more are noted as one hash."""

Identity = Mapping[str, Any]
"""Plain values by name; `sources` holds pairs of a name and a hash of the content."""


def identity_of(
    sources: Sequence[Source | str],
    settings: BuildSettings,
    others: Mapping[str, Any],
) -> Identity:
    """Return everything that decides the content of a store.

    The identity of a source is the content of its files, not their place or time.

    Args:
        sources: the sources in order; a spec of a database counts by its download.
        settings: the treatment of each crystal.
        others: further settings, by the name of their option.
    """
    held = [
        [source, None]
        if isinstance(source, str)
        else [source.path.name or str(source.path), source.fingerprint]
        for source in sources
    ]
    if len(held) > _FEW:
        text = json.dumps([content for _, content in held])
        held = [[f"{len(held):,} sources", xxhash.xxh3_128_hexdigest(text.encode())]]
    found = {
        "crysdistill": __version__,
        "sources": held,
        **settings.graph.to_dict(),
        "symmetry": settings.symmetry,
        **asdict(settings.filters),
        **others,
    }
    return json.loads(json.dumps(found, sort_keys=True))


def differences(before: Identity, now: Identity) -> list[str]:
    """Return the differences between a build and an earlier one, in words."""
    said = [
        f"`{key}` was {_shown(before.get(key))} and is {_shown(now.get(key))}"
        for key in {**now, **before}
        if key not in ("sources", "exclude") and before.get(key) != now.get(key)
    ]
    reads_alike = not any("label" in text for text in said)
    if reads_alike:  # otherwise the same files give other hashes
        said += _changed("sources", before, now)
    return said + _changed("exclude", before, now)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "not given"
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _changed(key: str, before: Identity, now: Identity) -> list[str]:
    """Return which sources have changed, in words."""
    old, new = before.get(key) or [], now.get(key) or []
    if len(old) != len(new):
        return [f"`{key}` were {len(old)} and are {len(new)}"]
    return [
        f"{name} holds other content than {was} did"
        if name != was
        else f"{name} has changed"
        for (was, content), (name, held) in zip(old, new, strict=True)
        if (content != held and held is not None) or (held is None and name != was)
    ]


def made_from(store: Path) -> Identity | None:
    """Return the identity that a finished store notes; None if it notes none."""
    try:
        with h5py.File(store, "r") as file:
            return json.loads(file.attrs["facts"]).get("made_from")
    except (OSError, KeyError, ValueError, AttributeError, TypeError):
        return None


def read_manifest(path: Path) -> Identity | None:
    """Return the identity of an interrupted build; None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        return dict(found)
    except (ValueError, TypeError):
        raise InputError(
            f"{path} is damaged; delete {path.parent} to start anew"
        ) from None
