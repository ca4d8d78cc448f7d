"""The settings of a split, and the function that makes the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from crysdistill.errors import InputError, did_you_mean
from crysdistill.overlap.facts import Collection
from crysdistill.splits.draws import (
    grouped_split,
    ordered_split,
    random_split,
    split_beside,
    stratified_split,
)
from crysdistill.splits.folds import (
    MATBENCH_FOLDS,
    folds_in_order,
    folds_of_groups,
    folds_of_rows,
    matbench_folds,
)
from crysdistill.splits.groups import (
    CLUSTERS,
    GROUPINGS,
    Groups,
    find_groups,
    with_elements,
)
from crysdistill.splits.split import Split, read_split

By = Literal[
    "random",
    "formula",
    "prototype",
    "cluster",
    "crystal_system",
    "space_group",
    "element",
    "id",
    "matbench",
]


@dataclass
class SplitSettings:
    """The split of labelled crystals into train, validation and test sets.

    Args:
        train: a fraction (up to 1) or a number of crystals.
        val: the same.
        test: the same; drawn first, so that it does not depend on the others. Not used
            if `by`, `folds` or `file` defines the test set.
        train_subset: use only this many training crystals.
        seed: the seed of the draw.
        file: a CSV of `material_id, subset` to use instead; with `folds`, `split.csv`
            stands for `split-0.csv`, `split-1.csv`, ... If `by` is a kind of group, a
            file that divides a group is refused.
        by: `random`; `formula`, `prototype`, `cluster`, `crystal_system` or
            `space_group`, which are never divided; `element`, which tests crystals with
            `elements`; `id`, which tests the last ids; or `matbench`, the official
            folds.
        elements: symbols; crystals with one of them form the test set.
        clusters: the number of clusters of composition and density.
        folds: divide the crystals into this many parts; one part is the test set.
        fold: the number of the test part, from 0 on. If None, the seeds of a study are
            the folds.
        stratify: give each subset its share of every class.
    """

    train: float = 0.8
    val: float = 0.1
    test: float = 0.1
    train_subset: int | None = None
    seed: int = 0
    file: str | None = None
    by: By = "random"
    elements: tuple[str, ...] = ()
    clusters: int = CLUSTERS
    folds: int | None = None
    fold: int | None = None
    stratify: bool = False

    def __post_init__(self) -> None:
        # 24 and 24.0 mean the same number and the same configuration.
        for name in ("train", "val", "test"):
            share = getattr(self, name)
            if share > 1 and share == int(share):
                setattr(self, name, int(share))
        if self.by == "matbench" and self.folds is None:
            self.folds = MATBENCH_FOLDS
        self._check()

    def _check(self) -> None:
        """Refuse settings that contradict each other."""
        kinds = get_args(By)
        if self.by not in kinds:
            raise InputError(
                f"`split.by` is {self.by!r} but must be one of {', '.join(kinds)}"
                f"{did_you_mean(self.by, kinds)}"
            )
        if self.seed < 0:
            raise InputError(f"`split.seed` is {self.seed} but must not be negative")
        if self.by == "element" and not self.elements and self.file is None:
            raise InputError("`split.by=element` needs `split.elements`, such as [F]")
        if self.elements and self.by != "element":
            raise InputError("`split.elements` needs `split.by=element`")
        if self.stratify and self.by not in ("random", "matbench"):
            raise InputError(
                f"`split.stratify` cannot go with `split.by={self.by}`; leave one out"
            )
        if self.folds is None:
            if self.fold is not None:
                raise InputError("`split.fold` needs `split.folds`")
            return
        if self.folds < 2:
            raise InputError(f"`split.folds` is {self.folds} but must be at least 2")
        if self.by == "element":
            raise InputError(
                "`split.by=element` defines the test set; leave out `split.folds`"
            )
        if self.by == "matbench" and self.folds != MATBENCH_FOLDS:
            raise InputError(
                f"`split.folds` is {self.folds}, but Matbench has {MATBENCH_FOLDS}; "
                "leave it out"
            )
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise InputError(
                f"`split.fold` is {self.fold} but must be 0 to {self.folds - 1}"
            )

    @property
    def draws_test(self) -> bool:
        """Whether the test set is drawn, with the size `test`."""
        given = self.file is not None or self.by == "element"
        return not given and self.folds is None

    def for_seed(self, seed: int, train_subset: int | None = None) -> SplitSettings:
        """Return the settings of one seed of a study.

        If there are folds and none is chosen, the seed is the fold.

        Args:
            seed: the seed of the study.
            train_subset: the number of training crystals.

        Raises:
            InputError: there is no fold of that number.
        """
        if self.folds is None or self.fold is not None:
            return replace(self, seed=seed, train_subset=train_subset)
        if not 0 <= seed < self.folds:
            raise InputError(
                f"seed {seed} has no fold: `split.folds` is {self.folds}, so seeds are "
                f"0 to {self.folds - 1}"
            )
        return replace(self, fold=seed, train_subset=train_subset)


def make_split(
    crystals: Collection, settings: SplitSettings, labels: np.ndarray | None = None
) -> Split:
    """Split the crystals that have a label.

    Args:
        crystals: a store.
        settings: the settings of the split.
        labels: (B,) of all its crystals, NaN if not known; None takes all crystals.

    Raises:
        InputError: the settings cannot be met, or divide a group.
    """
    if settings.folds is not None and settings.fold is None:
        raise InputError(f"`split.folds` needs `split.fold`, 0 to {settings.folds - 1}")
    if settings.file is not None:
        return _from_file(crystals, settings, _labelled(crystals, labels))
    if settings.folds is None:
        return _one(crystals, settings, labels)
    return make_folds(crystals, settings, labels, only=settings.fold)[0]


def make_folds(
    crystals: Collection,
    settings: SplitSettings,
    labels: np.ndarray | None = None,
    only: int | None = None,
) -> list[Split]:
    """Return the splits of all folds, or of one; arguments are those of `make_split`.

    Their test sets hold every crystal once. Validation crystals are drawn from the
    others, as whole groups or within classes like the folds.
    """
    rows, names = _labelled(crystals, labels), crystals.material_ids
    folds, seed = settings.folds or 0, settings.seed
    by, groups, classes = settings.by, None, None
    if settings.stratify:
        classes = _classes(labels)
    if by == "matbench":
        if labels is None:
            raise InputError("Matbench's folds need the target of the task")
        tests = matbench_folds(rows, labels, names)
    elif by == "id":
        tests = folds_in_order(rows, names, folds)
    elif by in GROUPINGS:
        groups = find_groups(crystals, rows, by, settings.clusters)
        tests = folds_of_groups(groups, folds, seed)
    else:
        tests = folds_of_rows(rows, folds, seed, classes)
    kind = {"id": "the order of ids", "matbench": "Matbench"}.get(by, by)
    if groups is not None:
        kind = f"whole {groups.plural}"
    elif settings.stratify:
        kind += " within classes"
    splits = [
        split_beside(
            test,
            rows,
            names,
            settings.train,
            settings.val,
            seed,
            f"{kind}, fold {number} of {folds} (from 0), seed {seed}",
            train_subset=settings.train_subset,
            groups=groups,
            labels=classes,
        )
        for number, test in enumerate(tests)
        if only in (None, number)
    ]
    return [_checked(split, groups, names) for split in splits]


def fold_file(file: str | Path, fold: int) -> Path:
    """Return the file of a fold: `split-2.csv` for `split.csv` and 2."""
    path = Path(file)
    return path.with_name(f"{path.stem}-{fold}{path.suffix}")


def _one(
    crystals: Collection, settings: SplitSettings, labels: np.ndarray | None
) -> Split:
    """Make a split without folds."""
    rows, names = _labelled(crystals, labels), crystals.material_ids
    by, seed, subset = settings.by, settings.seed, settings.train_subset
    sizes = settings.train, settings.val, settings.test
    if by == "element":
        test = with_elements(crystals, rows, settings.elements)
        made_by = f"{', '.join(settings.elements)} left out, seed {seed}"
        return split_beside(
            test, rows, names, *sizes[:2], seed, made_by, train_subset=subset
        )
    if by == "id":
        return ordered_split(rows, names, *sizes, seed, subset)
    if by in GROUPINGS:
        groups = find_groups(crystals, rows, by, settings.clusters)
        split = grouped_split(groups, names, *sizes, seed, subset)
        return _checked(split, groups, names)
    if settings.stratify:
        classes = _classes(labels)
        return stratified_split(rows, classes, names, *sizes, seed, subset)
    return random_split(rows, *sizes, seed, subset)


def _from_file(
    crystals: Collection, settings: SplitSettings, rows: np.ndarray
) -> Split:
    """Read a split, and check that it agrees with the settings."""
    path = Path(settings.file or "")
    if settings.fold is not None:
        path = fold_file(path, settings.fold)
    names = crystals.material_ids
    split = read_split(path, names, rows)
    used = np.concatenate([split.train, split.val, split.test])
    if settings.by in GROUPINGS:
        groups = find_groups(crystals, used, settings.by, settings.clusters)
        split.check_groups(groups, names)
    if settings.by == "element" and settings.elements:
        left_out = with_elements(crystals, used, settings.elements)
        stray = np.setdiff1d(left_out, split.test)
        if len(stray):
            raise InputError(
                f"{path}: {names[stray[0]]} holds one of {', '.join(settings.elements)}"
                ", but is not in `test`; split again with `split.by=element`"
            )
    order = np.random.default_rng(settings.seed).permutation(split.train)
    return replace(split, train=order[: settings.train_subset])


def _labelled(crystals: Collection, labels: np.ndarray | None) -> np.ndarray:
    """Return the rows with a label."""
    if labels is None:
        return np.arange(len(crystals))
    return np.flatnonzero(~np.isnan(labels))


def _classes(labels: np.ndarray | None) -> np.ndarray:
    if labels is None:
        raise InputError("`split.stratify` needs a target whose values are classes")
    return labels


def _checked(split: Split, groups: Groups | None, material_ids: Sequence[str]) -> Split:
    """Return the split after checking that it keeps groups whole."""
    if groups is not None:
        split.check_groups(groups, material_ids)
    return split
