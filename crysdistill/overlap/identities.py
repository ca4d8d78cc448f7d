"""Tell names that a source gave from names that the program made up."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from crysdistill.overlap.facts import Collection


def told_apart(corpus: Collection, dataset: Collection) -> tuple[Any, Any]:
    """Return both sides, renamed so that only ids from their sources can be equal.

    A made-up name `data-0` in one file has nothing to do with `data-0` in another.

    Args:
        corpus: one side.
        dataset: the other; if it is the corpus, one object is returned for both.
    """
    first = _marked(corpus, "corpus")
    return first, first if dataset is corpus else _marked(dataset, "dataset")


def _marked(crystals: Collection, side: str) -> Collection:
    """Return a collection whose made-up names are marked with its side."""
    made_up = getattr(crystals, "made_up", None)
    if made_up is None or not made_up.any():
        return crystals
    names = list(crystals.material_ids)
    for row in np.flatnonzero(made_up).tolist():
        names[row] += f"\0{side}"  # at the end, to keep their order
    marked = copy.copy(crystals)
    # Works whether `material_ids` is a cached property or an attribute.
    vars(marked)["material_ids"] = names
    return marked
