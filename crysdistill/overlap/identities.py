"""Telling apart the names that sources gave and those that the program made up."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from crysdistill.overlap.facts import Collection


def told_apart(corpus: Collection, dataset: Collection) -> tuple[Any, Any]:
    """Return both sides with names that only ids of their sources can share.

    What the program calls `data-0` in one file is nothing to `data-0` in another.

    Args:
        corpus: one side.
        dataset: the other; the same object stays the same.
    """
    first = _marked(corpus, "corpus")
    return first, first if dataset is corpus else _marked(dataset, "dataset")


def _marked(crystals: Collection, side: str) -> Collection:
    """Return a collection in which names that were made up belong to its side."""
    made_up = getattr(crystals, "made_up", None)
    if made_up is None or not made_up.any():
        return crystals
    names = list(crystals.material_ids)
    for row in np.flatnonzero(made_up).tolist():
        names[row] += f"\0{side}"  # at the end, so that their order stays
    marked = copy.copy(crystals)
    # Beside a cached property as well as in place of an attribute.
    vars(marked)["material_ids"] = names
    return marked
