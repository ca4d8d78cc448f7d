"""Predictors without a graph, against which a gain must also be measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from crysdistill.splits import Split
from crysdistill.store.store import Store
from crysdistill.structures.elements import element_table
from crysdistill.transfer.targets import Target


def composition_features(store: Store, rows: np.ndarray) -> np.ndarray:
    """Return fractions of the elements and mean element vectors, (B, 101 + 92).

    Args:
        store: the store of the crystals.
        rows: the rows of the crystals.
    """
    table = np.concatenate([element_table("onehot"), element_table("cgcnn92")], axis=1)
    start = store.atom_offsets
    numbers = store.atomic_numbers
    return np.stack(
        [table[numbers[start[r] : start[r + 1]]].mean(axis=0) for r in rows]
    )


def mean_baseline(store: Store, split: Split, target: Target, seed: int) -> np.ndarray:
    """Predict the mean of the training labels for all test crystals, (B,)."""
    labels = store.property(target.name)
    return np.full(len(split.test), labels[split.train].mean())


def forest_baseline(
    store: Store, split: Split, target: Target, seed: int
) -> np.ndarray:
    """Predict test crystals with a random forest on their composition, (B,)."""
    labels = store.property(target.name)[split.train]
    known = composition_features(store, split.train)
    asked = composition_features(store, split.test)
    if target.task == "classification":
        forest = RandomForestClassifier(300, random_state=seed, n_jobs=1)
        return forest.fit(known, labels).predict_proba(asked)[:, 1]
    learned = np.log10(labels) if target.transform == "log10" else labels
    regressor = RandomForestRegressor(300, random_state=seed, n_jobs=1)
    predicted = regressor.fit(known, learned).predict(asked)
    return 10**predicted if target.transform == "log10" else predicted


BASELINES: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "mean": ("predicts the mean of the training labels", mean_baseline),
    "forest": ("a random forest on the composition", forest_baseline),
}
"""Baselines by name, each with a description in one line."""
