"""The pairs of an overlap by name: sorted, as a table, and as a digest.

Tens of millions of pairs share few names. Names are sorted once; pairs are sorted by
the ranks of their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

_LINES_AT_ONCE = 200_000


def pair_table(
    pairs: np.ndarray,
    corpus_ids: Sequence[str],
    dataset_ids: Sequence[str],
    kinds: Sequence[str],
) -> pd.DataFrame:
    """Return one row per pair of names: `corpus_id`, `dataset_id`, strongest `kind`.

    Args:
        pairs: (P, 3) corpus row, dataset row and number of the kind.
        corpus_ids: names of the corpus.
        dataset_ids: names of the dataset.
        kinds: names of the kinds.
    """
    (corpus_names, corpus), (dataset_names, dataset) = (
        _ranked(rows, names)
        for rows, names in ((pairs[:, 0], corpus_ids), (pairs[:, 1], dataset_ids))
    )
    kind = pairs[:, 2]
    order = np.lexsort((corpus, kind, dataset))
    corpus, dataset, kind = corpus[order], dataset[order], kind[order]
    # If a collection has a name twice, the strongest kind counts.
    both = dataset * max(len(corpus_names), 1) + corpus
    _, first = np.unique(both, return_index=True)
    first.sort()
    return pd.DataFrame(
        {
            "corpus_id": corpus_names[corpus[first]],
            "dataset_id": dataset_names[dataset[first]],
            "kind": np.array(kinds, dtype=object)[kind[first]],
        }
    )


def _ranked(rows: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted names of some rows, and the rank of each row's name."""
    unique, inverse = np.unique(rows, return_inverse=True)
    own = [names[row] for row in unique.tolist()]
    ordered = sorted(set(own))
    rank = {name: place for place, name in enumerate(ordered)}
    ranks = np.array([rank[name] for name in own], np.int64)
    return np.array(ordered, dtype=object), ranks[inverse]


def pair_digest(head: dict[str, Any], table: pd.DataFrame) -> str:
    """Return a SHA-256 of some facts and of the sorted pairs.

    Args:
        head: plain values.
        table: from `pair_table`.
    """
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    # Each name is quoted once.
    quoted: dict[str, str] = {}
    for column in ("corpus_id", "dataset_id"):
        quoted |= {name: json.dumps(name) for name in table[column].unique()}
    for start in range(0, len(table), _LINES_AT_ONCE):
        part = table.iloc[start : start + _LINES_AT_ONCE]
        lines = [
            f'\n[{quoted[corpus]}, {quoted[dataset]}, "{kind}"]'
            for corpus, dataset, kind in zip(
                *(
                    part[name].to_numpy()
                    for name in ("corpus_id", "dataset_id", "kind")
                ),
                strict=True,
            )
        ]
        digest.update("".join(lines).encode())
    return digest.hexdigest()
