"""What the stores of a study's tasks say about its test crystals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy.spatial.distance import cdist

from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.structures.symmetry import CRYSTAL_SYSTEMS, crystal_system
from crysdistill.studies.run_files import with_most_labels

_ELEMENTS = 119


def tested_crystals(
    table: pd.DataFrame, predictions: pd.DataFrame
) -> pd.DataFrame | None:
    """Return elements and crystal systems of test crystals, if their store is at hand.

    Args:
        table: the table from `check_results`; `run` is a path.
        predictions: the table from `judged_predictions`.

    Returns:
        Columns `task, material_id, elements, system`; None without any store.
    """
    tables = []
    for task, part in with_most_labels(table).groupby("task"):
        store = _store(part["run"])
        wanted = set(predictions.loc[predictions["task"] == task, "material_id"])
        if store is None or not wanted:
            continue
        rows = [row for row, name in enumerate(store.material_ids) if name in wanted]
        if len(rows) < len(wanted):
            continue  # another dataset of the same name
        systems = crystal_system(store.space_groups[rows, 0])
        start, numbers = store.atom_offsets, store.atomic_numbers
        tables.append(
            pd.DataFrame(
                {
                    "task": task,
                    "material_id": [store.material_ids[row] for row in rows],
                    "elements": [
                        np.unique(numbers[start[r] : start[r + 1]]).tolist()
                        for r in rows
                    ],
                    "system": [
                        CRYSTAL_SYSTEMS[s] if s >= 0 else "" for s in systems.tolist()
                    ],
                }
            )
        )
    return pd.concat(tables, ignore_index=True) if tables else None


def _store(runs: pd.Series) -> Store | None:
    """Return the dataset of the runs, if its file is where the configuration says."""
    for run in runs.unique():
        path = Path(run) / "config.yaml"
        if not path.exists():
            continue
        dataset = (yaml.safe_load(path.read_text("utf-8")) or {}).get("dataset")
        if not dataset or not Path(dataset).is_file():
            return None
        try:
            return Store.open(dataset, verify=False)
        except InputError:
            return None
    return None


def training_distances(table: pd.DataFrame, predictions: pd.DataFrame) -> pd.Series:
    """Return how far each test crystal is from the training crystals of its run.

    The distance is the share of atoms that must be exchanged to get the composition of
    the nearest training crystal: 0 for the same composition, 1 for no common element.

    Args:
        table: the table from `check_results`; `run` is a path.
        predictions: the table from `judged_predictions`.

    Returns:
        A distance for each prediction; NaN where the store or the split is not known.
    """
    found = pd.Series(np.nan, index=predictions.index)
    for task, part in with_most_labels(table).groupby("task"):
        store = _store(part["run"])
        if store is None:
            continue
        row_of = {name: row for row, name in enumerate(store.material_ids)}
        for (seed, fold), runs in part.groupby(["seed", "fold"]):
            mask = (predictions["task"] == task) & (predictions["seed"] == seed)
            mask &= predictions["fold"] == fold
            path = Path(runs["run"].iloc[0]) / "split.csv"
            if not mask.any() or not path.exists():
                continue
            split = pd.read_csv(path, dtype=str)
            train = split.loc[split["subset"] == "train", "material_id"]
            tested = predictions.loc[mask, "material_id"]
            if not ({*train, *tested} <= row_of.keys()) or train.empty:
                continue
            names = tested.unique()
            far = cdist(
                _fractions(store, [row_of[name] for name in names]),
                _fractions(store, [row_of[name] for name in train]),
                "cityblock",
            ).min(axis=1)  # (names,)
            found[mask] = tested.map(dict(zip(names, far / 2, strict=True)))
    return found


def _fractions(store: Store, rows: list[int]) -> np.ndarray:
    """Return the fraction of each element, (B, elements)."""
    start, numbers = store.atom_offsets, store.atomic_numbers
    counts = np.stack(
        [
            np.bincount(numbers[start[r] : start[r + 1]], minlength=_ELEMENTS)
            for r in rows
        ]
    )
    return counts / counts.sum(axis=1, keepdims=True)
