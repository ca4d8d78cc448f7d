"""Which test crystals of a store weights have seen in that very store.

A run records the rows of the store that it learned from. No crystals have to be
compared if a later run tests on rows of the same store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from crysdistill.store.used import UNKNOWN, Used
from crysdistill.transfer.weights import Provenance


class WithProperties(Protocol):
    """A store with labels."""

    @property
    def property_names(self) -> tuple[str, ...]:
        """The names of all properties."""


@dataclass(frozen=True)
class Judges:
    """The crystals of a store that judge a run.

    Args:
        rows: their rows.
        targets: the properties that are predicted.
        others: the other properties in the store. Elsewhere the targets may have other
            names, but what is beside them in one store is another property.
    """

    rows: np.ndarray
    targets: Collection[str] = ()
    others: Collection[str] = ()

    @classmethod
    def of(
        cls, store: WithProperties, rows: np.ndarray, targets: Collection[str]
    ) -> Judges:
        """Return the crystals in some rows of a store."""
        others = [name for name in store.property_names if name not in targets]
        return cls(rows, tuple(targets), tuple(others))


def used_by(
    kind: str, provenance: Provenance, stores: Collection[str]
) -> tuple[Used, ...]:
    """Return what weights have learned from, as far as it concerns some stores.

    Weights of earlier versions do not record it. But if they are an encoder that no
    stranger taught, and their corpus is clean of all these stores, they used nothing
    of them.

    Args:
        kind: as in `Learned`.
        provenance: of the weights.
        stores: the `structures_hash` of each store.
    """
    clean = bool(stores) and set(stores) <= set(provenance.excluded)
    if clean and kind == "encoder" and not provenance.taught_by:
        return tuple(one for one in provenance.used if one != UNKNOWN)
    return provenance.used


def labels_known(used: Iterable[Used], store: str) -> bool:
    """Return whether all labels that weights have learned are of crystals of a store.

    Labels in another store, or not recorded, may be of the same crystals.
    """
    return all(one.store == store for one in used if one.labels)


def seen_in_it(
    used: tuple[Used, ...], store: str, tested: Judges
) -> tuple[Literal["clean", "transductive", "unknown", "leaked"], str] | None:
    """Return what weights have seen of the test crystals of a store.

    Args:
        used: what they have learned from.
        store: the `structures_hash` of the store.
        tested: its test crystals.

    Returns:
        `leaked` if the weights, or their teachers, learned from labels of test
        crystals; `unknown` if these are perhaps labels of another property;
        `transductive` if they learned from test crystals, but provably not from their
        labels of the targets; `clean` if they learned from other crystals of the store
        and from nothing else; each with a sentence. None if none of it is known.
    """

    def count(entries: list[Used]) -> int:
        found = np.zeros(len(tested.rows), bool)
        for one in entries:
            found |= one.has(tested.rows)
        return int(found.sum())

    here = [one for one in used if one.store == store]
    labelled = [one for one in here if one.labels]
    apart = [one for one in labelled if one.target in tested.others]
    rest = [one for one in labelled if one.target not in tested.others]
    total = f"of the {len(tested.rows):,} test crystals"
    if labels := count([one for one in rest if one.target in tested.targets]):
        return "leaked", (
            f"leaked (the weights or their teachers learned from the labels of "
            f"{labels:,} {total})"
        )
    if labels := count(rest):
        return "unknown", (
            f"unknown (the weights or their teachers learned from labels of "
            f"{labels:,} {total}, perhaps of the same property{_named(rest)})"
        )
    if not here or not labels_known(used, store):
        return None
    if crystals := count(here):
        apart = [one for one in apart if count([one])]
        if apart:
            return "transductive", (
                "transductive (the weights or their teachers learned from "
                f"{crystals:,} {total}, with labels of another property{_named(apart)})"
            )
        return "transductive", (
            f"transductive (the corpus holds {crystals:,} {total}, without their "
            "labels)"
        )
    if len(here) < len(used):  # corpora, which may hold the same crystals
        return None
    return "clean", (
        f"clean (by row, none {total} is among those that the weights and their "
        "teachers learned from)"
    )


def _named(entries: Iterable[Used]) -> str:
    """Return the properties of labels, after a colon; "" if none is known."""
    names = dict.fromkeys(one.target for one in entries if one.target)
    return f": {', '.join(names)}" if names else ""
