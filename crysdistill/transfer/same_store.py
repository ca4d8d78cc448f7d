"""Which test crystals of a store weights have seen in that very store.

A run records the rows of the store that it learned from. No crystals have to be
compared if a later run tests on rows of the same store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import numpy as np

from crysdistill.store.used import UNKNOWN, Used
from crysdistill.transfer.weights import Provenance


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
    used: tuple[Used, ...], store: str, tested: np.ndarray
) -> tuple[Literal["clean", "transductive", "leaked"], str] | None:
    """Return what weights have seen of the test crystals of a store.

    Args:
        used: what they have learned from.
        store: the `structures_hash` of the store.
        tested: the rows of its test crystals.

    Returns:
        `leaked` if the weights, or their teachers, learned from labels of test
        crystals; `transductive` if they learned from test crystals, but provably not
        from labels of them; `clean` if they learned from other crystals of the store
        and from nothing else; each with a sentence. None if none of it is known.
    """

    def count(entries: list[Used]) -> int:
        found = np.zeros(len(tested), bool)
        for one in entries:
            found |= one.has(tested)
        return int(found.sum())

    here = [one for one in used if one.store == store]
    total = f"of the {len(tested):,} test crystals"
    if labels := count([one for one in here if one.labels]):
        return "leaked", (
            f"leaked (the weights or their teachers learned from the labels of "
            f"{labels:,} {total})"
        )
    if not here or not labels_known(used, store):
        return None
    if crystals := count(here):
        return "transductive", (
            f"transductive (the corpus holds {crystals:,} {total}, without their "
            "labels)"
        )
    if len(here) < len(used):  # corpora, which may hold the same crystals
        return None
    return "clean", (
        f"clean (the weights and their teachers learned from other crystals of the "
        f"dataset than {total.removeprefix('of ')})"
    )
