"""What the pretrained weights or the teacher of a run have seen of its crystals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crysdistill.splits import Split
from crysdistill.store.formulas import Formulas, join_formulas
from crysdistill.store.store import Store
from crysdistill.training.across import OtherStore
from crysdistill.transfer.seen import Learned, at_most, of_the_tested, seen


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
        said, bound = seen(before, store)[1], at_most(before, store, split.test)
    else:
        said = other.overlap(seen(before, other.store)[1])
        bound = at_most(before, other.store, other.rows)
    return {"overlap": said, **bound}


def overlap_line(found: Mapping[str, Any]) -> str:
    """Return a line for the terminal, from what `find_seen` returned."""
    return f"overlap: {found['overlap']}{of_the_tested(found)}"


def with_labelled(
    earlier: Formulas | None, store: Store, split: Split
) -> Formulas | None:
    """Return all formulas that a run's weights know; None if they are not known.

    Args:
        earlier: those of the pretrained weights or the teacher.
        store: the store to train on.
        split: of its crystals.
    """
    used = np.concatenate([split.train, split.val])
    return join_formulas([earlier, Formulas.of(store, used)])
