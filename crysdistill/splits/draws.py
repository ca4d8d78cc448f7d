"""Drawing subsets: of rows, of classes, of whole groups.

All draws except `random_split` use a hash of names, so they do not depend on the order
of the rows in a store.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crysdistill.errors import InputError
from crysdistill.splits.classes import draw_within_classes
from crysdistill.splits.dealing import draw_whole_groups
from crysdistill.splits.groups import Groups
from crysdistill.splits.order import by_name, shuffled
from crysdistill.splits.split import Split


def random_split(
    rows: np.ndarray,
    train: float,
    val: float,
    test: float,
    seed: int,
    train_subset: int | None = None,
) -> Split:
    """Split rows at random.

    Args:
        rows: the rows to split.
        train: a fraction (at most 1) or a number of crystals.
        val: the same; drawn after the test set.
        test: the same; drawn first, so that it stays when the others change.
        seed: the seed of the draw.
        train_subset: keep only this many training rows, for learning curves: each
            smaller set is part of every larger one.

    Raises:
        InputError: the sizes exceed the number of rows.
    """
    order = np.random.default_rng(seed).permutation(np.sort(rows))
    sizes = _sizes(train, val, test, len(rows))
    ends = np.cumsum(list(sizes.values()))
    tests, vals, trains = np.split(order[: ends[-1]], ends[:-1])
    return Split(trains[:train_subset], vals, tests, f"random, seed {seed}")


def ordered_split(
    rows: np.ndarray,
    material_ids: Sequence[str],
    train: float,
    val: float,
    test: float,
    seed: int,
    train_subset: int | None = None,
) -> Split:
    """Split rows by their names: the first train, the last test.

    Databases number their entries as they arrive, so this tests whether a predictor
    predicts later discoveries. Numbers in names count as numbers: `mp-9` is before
    `mp-10`.

    Args:
        rows: the rows to split.
        material_ids: the names of all crystals of the store.
        train: as in `random_split`; the crystals just before the validation set.
        val: as in `random_split`; the crystals just before the test set.
        test: as in `random_split`.
        seed: the seed that chooses a `train_subset`.
        train_subset: as in `random_split`.

    Raises:
        InputError: the sizes exceed the number of rows.
    """
    order = by_name(rows, material_ids)[::-1]
    sizes = _sizes(train, val, test, len(rows))
    ends = np.cumsum(list(sizes.values()))
    tests, vals, trains = np.split(order[: ends[-1]], ends[:-1])
    trains = shuffled(trains, material_ids, seed)
    return Split(trains[:train_subset], vals, tests, "the order of ids")


def stratified_split(
    rows: np.ndarray,
    labels: np.ndarray,
    material_ids: Sequence[str],
    train: float,
    val: float,
    test: float,
    seed: int,
    train_subset: int | None = None,
) -> Split:
    """Split rows at random; every subset has a proportional share of every class.

    Each requested subset has at least one crystal of each class. The first
    `train_subset` training rows have a proportional share, too.

    Args:
        rows: the rows to split.
        labels: the class of each row of the store.
        material_ids: the names of all crystals of the store.
        train: as in `random_split`.
        val: as in `random_split`.
        test: as in `random_split`.
        seed: the seed of the draw.
        train_subset: as in `random_split`.

    Raises:
        InputError: the sizes exceed the number of rows, or a class is too small.
    """
    wanted = _sizes(train, val, test, len(rows))
    chosen = draw_within_classes(rows, labels, material_ids, wanted, seed)
    return Split(
        chosen["train"][:train_subset],
        chosen["val"],
        chosen["test"],
        f"random within classes, seed {seed}",
    )


def grouped_split(
    groups: Groups,
    material_ids: Sequence[str],
    train: float,
    val: float,
    test: float,
    seed: int,
    train_subset: int | None = None,
) -> Split:
    """Split whole groups at random: no two subsets share one.

    The sizes are as close to the wanted sizes as whole groups in random order allow:
    exact if groups are many; within a tenth, or the nearest possible, if they are few.
    The test set is drawn first. If the three fractions add up to 1, all remaining
    groups train.

    Args:
        groups: the rows to split, and the group of each.
        material_ids: the names of all crystals of the store.
        train: as in `random_split`.
        val: as in `random_split`.
        test: as in `random_split`.
        seed: the seed of the draw.
        train_subset: as in `random_split`; may divide a group within the training set.

    Raises:
        InputError: the sizes exceed the number of rows, or a group is so large that a
            subset would be empty.
    """
    total = len(groups.rows)
    wanted = _sizes(train, val, test, total)
    whole = max(train, val, test) <= 1 and train + val + test > 1 - 1e-9
    whole |= sum(wanted.values()) == total
    chosen = draw_whole_groups(groups, material_ids, wanted, seed, whole)
    made_by = f"whole {groups.plural} at random, seed {seed}"
    return Split(chosen["train"][:train_subset], chosen["val"], chosen["test"], made_by)


def split_beside(
    test: np.ndarray,
    rows: np.ndarray,
    material_ids: Sequence[str],
    train: float,
    val: float,
    seed: int,
    made_by: str,
    *,
    train_subset: int | None = None,
    groups: Groups | None = None,
    labels: np.ndarray | None = None,
) -> Split:
    """Draw training and validation sets beside a given test set.

    Fractions are of all rows, as everywhere. They shrink in proportion if the test set
    leaves too few rows.

    Args:
        test: the rows of the test set.
        rows: all usable rows, with or without the test set.
        material_ids: the names of all crystals of the store.
        train: a fraction (at most 1) or a number of crystals.
        val: the same.
        seed: the seed of the draw.
        made_by: the text for `Split.made_by`.
        train_subset: as in `random_split`.
        groups: groups to keep whole.
        labels: the class of each row of the store, to draw within classes.

    Raises:
        InputError: the sizes exceed the remaining rows, or a group or class is in the
            way.
    """
    rest = np.setdiff1d(rows, test)
    wanted = _rest_sizes(train, val, len(rows), len(rest))
    whole = sum(wanted.values()) == len(rest)
    if groups is not None:
        left = groups.of(rest)
        chosen = draw_whole_groups(left, material_ids, wanted, seed, whole)
    elif labels is not None:
        chosen = draw_within_classes(rest, labels, material_ids, wanted, seed)
    else:
        order = shuffled(rest, material_ids, seed)
        vals, trains, _ = np.split(order, np.cumsum(list(wanted.values())))
        chosen = {"val": vals, "train": trains}
    return Split(chosen["train"][:train_subset], chosen["val"], test, made_by)


# ------------------------------------------------------------------------------- sizes


def _sizes(train: float, val: float, test: float, total: int) -> dict[str, int]:
    """Return the wanted size of each subset, in the order of drawing."""
    sizes = {
        name: _count(name, share, total)
        for name, share in (("test", test), ("val", val), ("train", train))
    }
    if sum(sizes.values()) > total:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"the split asks for {asked}, but only {total} crystals have a label; "
            "lower `split.train`, `split.val` or `split.test`"
        )
    return sizes


def _rest_sizes(train: float, val: float, total: int, rest: int) -> dict[str, int]:
    """Return the sizes beside a given test set, in the order of drawing."""
    shares = {"val": val, "train": train}
    sizes = {name: _count(name, share, total) for name, share in shares.items()}
    if sum(sizes.values()) <= rest:
        return sizes
    fractions = [name for name in sizes if 0 < shares[name] <= 1]
    room = rest - sum(n for name, n in sizes.items() if name not in fractions)
    if room < len(fractions) or not fractions:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"the split asks for {asked}, but the test set leaves only {rest} "
            "crystals; lower `split.train` or `split.val`"
        )
    whole = sum(shares[name] for name in fractions)
    for name in fractions:
        sizes[name] = int(room * shares[name] / whole + 1e-9)
    if "train" in fractions:  # the remainder of rounding
        sizes["train"] = rest - sizes["val"]
    return sizes


def _count(name: str, share: float, total: int) -> int:
    """Return the number of crystals that a fraction of `total`, or a number, means."""
    if share < 0 or (share > 1 and share != int(share)):
        raise InputError(
            f"`split.{name}` is {share} but must be a fraction up to 1 or a whole "
            "number"
        )
    return int(share) if share > 1 else int(share * total + 1e-9)
