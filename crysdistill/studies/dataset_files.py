"""What the stores of a study's tasks say about its test crystals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.structures.symmetry import CRYSTAL_SYSTEMS, crystal_system
from crysdistill.studies.run_files import config_of, with_most_labels


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
        store = store_of(part["run"])
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


def store_of(runs: pd.Series) -> Store | None:
    """Return the dataset of runs, if its file is where their configuration says.

    Args:
        runs: their folders.
    """
    for run in runs.unique():
        config = config_of(Path(run))
        if not config:
            continue
        dataset = config.get("dataset")
        if not dataset or not Path(dataset).is_file():
            return None
        try:
            return Store.open(dataset, verify=False)
        except InputError:
            return None
    return None
