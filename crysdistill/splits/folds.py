"""Folds: every crystal is tested once."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from crysdistill.errors import InputError
from crysdistill.splits.groups import Groups
from crysdistill.splits.order import by_name, hashed_order


def folds_of_rows(
    rows: np.ndarray, folds: int, seed: int, labels: np.ndarray | None = None
) -> list[np.ndarray]:
    """Divide rows at random.

    The folds are those of scikit-learn's `KFold` (with labels, `StratifiedKFold`),
    shuffled by `seed`, over the rows in their order.

    Args:
        rows: the rows to divide.
        folds: the number of parts.
        seed: the seed of the shuffling.
        labels: the class of each row of the store, to give each fold its share.

    Returns:
        The test rows of each fold.

    Raises:
        InputError: there are fewer rows, or fewer of a class, than folds.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    rows = np.sort(rows)
    _check(len(rows), folds, "crystals")
    if labels is None:
        parts = KFold(folds, shuffle=True, random_state=seed).split(rows)
    else:
        values, counts = np.unique(labels[rows], return_counts=True)
        few = int(counts.argmin())
        _check(int(counts[few]), folds, f"crystals of the class {values[few]:g}")
        kinds = np.searchsorted(values, labels[rows])
        chooser = StratifiedKFold(folds, shuffle=True, random_state=seed)
        parts = chooser.split(rows, kinds)
    return [rows[test] for _, test in parts]


def folds_of_groups(groups: Groups, folds: int, seed: int) -> list[np.ndarray]:
    """Divide whole groups into folds of nearly equal size.

    scikit-learn's `GroupKFold` deals out the groups, the largest first. The seed and
    the names of the groups, not the order of the rows, decide among equal sizes.

    Args:
        groups: the rows to divide, and the group of each.
        folds: the number of parts.
        seed: decides among groups of equal size.

    Returns:
        The test rows of each fold.

    Raises:
        InputError: there are fewer groups than folds.
    """
    from sklearn.model_selection import GroupKFold

    names, number = np.unique(groups.names, return_inverse=True)
    _check(len(names), folds, groups.plural)
    rank = np.empty(len(names), np.int64)
    rank[hashed_order(names.tolist(), seed)] = np.arange(len(names))
    parts = GroupKFold(folds).split(groups.rows, groups=rank[number])
    return [groups.rows[test] for _, test in parts]


def folds_in_order(
    rows: np.ndarray, material_ids: Sequence[str], folds: int
) -> list[np.ndarray]:
    """Divide rows into runs of consecutive names.

    Raises:
        InputError: there are fewer rows than folds.
    """
    _check(len(rows), folds, "crystals")
    return np.array_split(by_name(rows, material_ids), folds)


def _check(count: int, folds: int, what: str) -> None:
    if folds > count:
        raise InputError(
            f"`split.folds` is {folds}, but there are only {count} {what}; lower it"
        )


# --------------------------------------------------------------------------- Matbench

MATBENCH_FOLDS = 5
MATBENCH_SEED = 18012019
MATBENCH_TASKS = {
    "steels": 312,
    "jdft2d": 636,
    "phonons": 1265,
    "expt_gap": 4604,
    "dielectric": 4764,
    "expt_is_metal": 4921,
    "glass": 5680,
    "log_gvrh": 10987,
    "log_kvrh": 10987,
    "perovskites": 18928,
    "mp_gap": 106113,
    "mp_is_metal": 106113,
    "mp_e_form": 132752,
}
"""The tasks of Matbench v0.1, and the number of entries of each."""


def matbench_folds(
    rows: np.ndarray, labels: np.ndarray, material_ids: Sequence[str]
) -> list[np.ndarray]:
    """Return the official folds of a Matbench task.

    They are `KFold(5, shuffle=True, random_state=18012019)` over the entries of the
    task in their official order, or `StratifiedKFold` with the same seed if the target
    is a class. They are defined for whole tasks only: if one entry is missing, all
    folds differ.

    Source: A. Dunn, Q. Wang, A. Ganose, D. Dopp and A. Jain (2020), npj Comput. Mater.
    6, 138, doi:10.1038/s41524-020-00406-3.

    Args:
        rows: the rows with a label.
        labels: (store,) labels of all rows; labels that are all 0 or 1 are classes.
        material_ids: the names of all crystals of the store.

    Returns:
        The test rows of each fold.

    Raises:
        InputError: no task has this number of entries, or they are out of order.
    """
    if len(rows) not in MATBENCH_TASKS.values():
        nearest = min(MATBENCH_TASKS, key=lambda n: abs(MATBENCH_TASKS[n] - len(rows)))
        raise InputError(
            f"{len(rows):,} crystals have a label, but no Matbench task has so many "
            f"(the nearest, `matbench_{nearest}`, has {MATBENCH_TASKS[nearest]:,}); "
            "its folds are those of the whole task: build a store of all its entries"
        )
    rows = np.sort(rows)
    names = [material_ids[row] for row in rows.tolist()]
    if all(re.match(r"mb-.*\d$", name) for name in names):
        moved = by_name(rows, material_ids) != rows
        if moved.any():
            raise InputError(
                f"{names[int(moved.argmax())]} is not at its place, but Matbench's "
                "folds go by the order of the task; build the store from its entries "
                "in order"
            )
    classes = bool(np.isin(labels[rows], (0, 1)).all())
    return folds_of_rows(
        rows, MATBENCH_FOLDS, MATBENCH_SEED, labels if classes else None
    )
