"""What the pretrained weights or the teacher of a run have seen of its crystals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crysdistill.splits import Split
from crysdistill.store.formulas import Formulas, join_formulas
from crysdistill.store.store import Store
from crysdistill.store.used import join_used, used_rows
from crysdistill.training.across import OtherStore
from crysdistill.transfer.same_store import Judges, used_by
from crysdistill.transfer.seen import Learned, Word, at_most, of_the_tested, seen
from crysdistill.transfer.weights import Provenance


def find_seen(
    before: Learned | None,
    store: Store,
    split: Split,
    targets: Sequence[str],
    other: OtherStore | None,
) -> dict[str, Any]:
    """Return the entries for `results.json`: `overlap`, and `overlap_at_most` if known.

    Args:
        before: the pretrained weights or the teacher; None if there is neither.
        store: the store to train on.
        split: of its crystals.
        targets: the names of the properties to predict.
        other: the crystals to test on in another store.
    """
    judge = store if other is None else other.store
    tested = (
        Judges.of(store, split.test, targets)
        if other is None
        else Judges.of(judge, other.rows, other.names)
    )
    said = seen(before, judge, tested)[1]
    bound = at_most(before, judge, tested)
    return {"overlap": other.overlap(said) if other else said, **bound}


def word_of(found: Mapping[str, Any]) -> Word:
    """Return the word with which the sentence of `find_seen` begins."""
    word: Word = found["overlap"].partition(" ")[0]
    return word


def overlap_line(found: Mapping[str, Any]) -> str:
    """Return a line for the terminal, from what `find_seen` returned."""
    return f"overlap: {found['overlap']}{of_the_tested(found)}"


def with_labelled(
    earlier: Provenance, kind: str, store: Store, split: Split, targets: Sequence[str]
) -> Provenance:
    """Return a provenance with the crystals whose labels a run learned.

    Args:
        earlier: that of the pretrained weights or the teacher.
        kind: of these weights, as in `Learned`.
        store: the store to train on.
        split: of its crystals.
        targets: the names of the properties to learn.
    """
    rows = np.concatenate([split.train, split.val])
    before = used_by(kind, earlier, [store.structures_hash])
    return replace(
        earlier,
        formulas=join_formulas([earlier.formulas, Formulas.of(store, rows)]),
        used=join_used([before, used_rows(store, rows, targets, False)]),
    )
