"""What the pretrained weights or the teacher of a run have seen of its crystals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from crysdistill.splits import Split
from crysdistill.store.formulas import Formulas, join_formulas
from crysdistill.store.store import Store
from crysdistill.store.used import Used, join_used
from crysdistill.training.across import OtherStore
from crysdistill.transfer.same_store import used_by
from crysdistill.transfer.seen import Learned, at_most, of_the_tested, seen
from crysdistill.transfer.weights import Provenance


def find_seen(
    before: Learned | None, store: Store, split: Split, other: OtherStore | None
) -> dict[str, Any]:
    """Return the entries for `results.json`: `overlap`, and `overlap_at_most` if known.

    Args:
        before: the pretrained weights or the teacher; None if there is neither.
        store: the store to train on.
        split: of its crystals.
        other: the crystals to test on in another store.
    """
    if other is None:
        said = seen(before, store, split.test)[1]
        bound = at_most(before, store, split.test)
    else:
        said = other.overlap(seen(before, other.store, other.rows)[1])
        bound = at_most(before, other.store, other.rows)
    return {"overlap": said, **bound}


def overlap_line(found: Mapping[str, Any]) -> str:
    """Return a line for the terminal, from what `find_seen` returned."""
    return f"overlap: {found['overlap']}{of_the_tested(found)}"


def with_labelled(
    earlier: Provenance, kind: str, store: Store, split: Split
) -> Provenance:
    """Return a provenance with the crystals whose labels a run learned.

    Args:
        earlier: that of the pretrained weights or the teacher.
        kind: of these weights, as in `Learned`.
        store: the store to train on.
        split: of its crystals.
    """
    rows = np.concatenate([split.train, split.val])
    before = used_by(kind, earlier, [store.structures_hash])
    return replace(
        earlier,
        formulas=join_formulas([earlier.formulas, Formulas.of(store, rows)]),
        used=join_used([before, (Used.of(store, rows, labels=True),)]),
    )
