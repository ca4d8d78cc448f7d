"""Splits: sizes, no overlap, nesting, classes, groups, folds, files, hashes, errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from crysdistill.errors import InputError
from crysdistill.splits import (
    Groups,
    Split,
    folds_of_groups,
    folds_of_rows,
    grouped_split,
    ordered_split,
    random_split,
    read_split,
    split_beside,
    stratified_split,
)
from crysdistill.splits.dealing import nearest_sum

ROWS = np.arange(100, 200)
NAMES = [f"m{i}" for i in range(300)]


def test_fractions_and_numbers():
    split = random_split(ROWS, 0.8, 0.1, 0.1, seed=0)
    assert [len(s) for s in (split.train, split.val, split.test)] == [80, 10, 10]
    every = np.concatenate([split.train, split.val, split.test])
    assert sorted(every) == ROWS.tolist()
    split = random_split(ROWS, 30, 20, 0.25, seed=0)
    assert [len(s) for s in (split.train, split.val, split.test)] == [30, 20, 25]


def test_the_test_set_does_not_depend_on_the_rest():
    one = random_split(ROWS, 10, 20, 30, seed=3)
    other = random_split(ROWS, 50, 10, 30, seed=3)
    assert np.array_equal(one.test, other.test)
    assert not np.array_equal(one.test, random_split(ROWS, 10, 20, 30, seed=4).test)


def test_smaller_training_sets_are_part_of_larger_ones():
    large = random_split(ROWS, 0.8, 0.1, 0.1, seed=1)
    small = random_split(ROWS, 0.8, 0.1, 0.1, seed=1, train_subset=15)
    assert small.train.tolist() == large.train[:15].tolist()
    assert np.array_equal(small.val, large.val)


def test_a_written_split_comes_back(tmp_path):
    split = random_split(ROWS, 0.6, 0.2, 0.2, seed=0)
    split.write(tmp_path / "split.csv", NAMES)
    again = read_split(tmp_path / "split.csv", NAMES, ROWS)
    assert again.hash(NAMES) == split.hash(NAMES)
    assert again.train.tolist() == split.train.tolist()
    other = random_split(ROWS, 0.6, 0.2, 0.2, seed=1)
    assert other.hash(NAMES) != split.hash(NAMES)


def test_rows_without_a_label_are_left_out_of_a_file_split(tmp_path):
    path = tmp_path / "split.csv"
    path.write_text("material_id,subset\nm1,train\nm2,train\nm3,val\n")
    split = read_split(path, NAMES, np.array([2, 3]))
    assert split.train.tolist() == [2]
    assert split.test.tolist() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,subset\nm1,train\n", "needs the columns material_id and subset"),
        ("material_id,subset\nm999,train\n", "m999 is not in the dataset"),
        ("material_id,subset\nm1,dev\n", "m1 has subset 'dev', which must be one of"),
        ("material_id,subset\nm1,train\nm1,val\n", "puts a crystal into two subsets"),
        ("material_id,subset\nm1,train\n", "leaves no crystal for `val`"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_split(path, NAMES, np.arange(300))


def test_bad_sizes(tmp_path):
    with pytest.raises(InputError, match="only 100 crystals have a label"):
        random_split(ROWS, 90, 20, 0.1, seed=0)
    with pytest.raises(InputError, match=r"`split.val` is 1\.5 but must be a fraction"):
        random_split(ROWS, 0.5, 1.5, 0.1, seed=0)
    with pytest.raises(InputError, match="no such split file"):
        read_split(tmp_path / "none.csv", NAMES, ROWS)
    with pytest.raises(InputError, match="two subsets"):
        Split(np.array([1, 2]), np.array([2]), np.array([3]))


# ------------------------------------------------------------------- classes and order


def classes(rare: int, seed: int) -> np.ndarray:
    """Labels of 300 rows: NaN outside `ROWS`, and class 1 for `rare` rows."""
    labels = np.full(300, np.nan)
    labels[ROWS] = 0.0
    labels[np.random.default_rng(seed).choice(ROWS, rare, replace=False)] = 1.0
    return labels


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rare", [3, 10, 37, 50])
def test_every_subset_has_its_share_of_every_class(rare, seed):
    labels = classes(rare, seed)
    split = stratified_split(ROWS, labels, NAMES, 0.8, 0.1, 0.1, seed)
    for rows, size in ((split.train, 80), (split.val, 10), (split.test, 10)):
        assert len(rows) == size
        ones = labels[rows].sum()
        assert 1 <= ones <= size - 1
        if rare >= 10:
            assert abs(ones - rare * size / 100) <= 1.01
    # For learning curves, the first training crystals have both classes.
    start = labels[split.train[:20]].sum()
    assert abs(start - 20 * labels[split.train].mean()) <= 1


def test_a_class_of_every_size_fills_the_subsets_exactly():
    labels = classes(50, seed=1)
    split = stratified_split(ROWS, labels, NAMES, 60, 30, 10, seed=0)
    assert [labels[r].sum() for r in (split.train, split.val, split.test)] == [
        30, 15, 5,
    ]  # fmt: skip
    short = stratified_split(ROWS, labels, NAMES, 60, 30, 10, 0, train_subset=7)
    assert short.train.tolist() == split.train[:7].tolist()


def test_classes_that_cannot_be_shared_are_refused():
    message = (
        r"only 2 of 100 crystals have the class 1, too few for 3 subsets; "
        r"leave out `split\.stratify`"
    )
    with pytest.raises(InputError, match=message):
        stratified_split(ROWS, classes(2, 0), NAMES, 0.8, 0.1, 0.1, seed=0)
    with pytest.raises(InputError, match=r"`test` with 1 crystals cannot share 2 "
                       r"classes .*; change `split\.test`"):  # fmt: skip
        stratified_split(ROWS, classes(20, 0), NAMES, 0.8, 0.1, 0.01, seed=0)


def test_the_order_of_names_counts_numbers_as_numbers():
    names = ["mp-10", "mp-9", "mp-100", "mp-2"]
    split = ordered_split(np.arange(4), names, 2, 0.25, 0.25, seed=0)
    assert {names[r] for r in split.train} == {"mp-2", "mp-9"}
    assert [names[r] for r in split.val] == ["mp-10"]
    assert [names[r] for r in split.test] == ["mp-100"]


# ---------------------------------------------------------------- with a given test set


def test_fractions_shrink_where_the_test_set_leaves_too_few():
    test = ROWS[:40]
    split = split_beside(test, ROWS, NAMES, 0.8, 0.1, 0, "a test")
    assert [len(r) for r in (split.train, split.val, split.test)] == [54, 6, 40]
    split = split_beside(test, ROWS, NAMES, 0.4, 0.1, 0, "a test")
    assert [len(r) for r in (split.train, split.val)] == [40, 10]
    split = split_beside(test, ROWS, NAMES, 0.8, 20, 0, "a test")
    assert [len(r) for r in (split.train, split.val)] == [40, 20]
    assert split.made_by == "a test"
    with pytest.raises(InputError, match="asks for val 20, train 50, but the test set "
                       r"leaves only 60 crystals; lower `split\.train`"):  # fmt: skip
        split_beside(test, ROWS, NAMES, 50, 20, 0, "a test")


# ------------------------------------------------------------------------ whole groups


def made_up(seed: int, sizes: list[int] | None = None) -> tuple[Groups, list[str]]:
    """Rows in random order, in groups of random sizes, with names."""
    rng = np.random.default_rng(seed)
    if sizes is None:
        sizes = [*rng.integers(1, 12, 30).tolist(), *[1] * 20]
    names = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    order = rng.permutation(len(names))
    ids = [f"m{i}" for i in range(len(names))]
    return (
        Groups("formula", np.arange(len(names)), [names[i] for i in order]),
        [ids[i] for i in order],
    )


def members(split: Split, ids: list[str]) -> list[list[str]]:
    return [sorted(ids[r] for r in s) for s in (split.train, split.val, split.test)]


@pytest.mark.parametrize("seed", range(12))
def test_groups_stay_whole_and_sizes_are_exact_where_they_can_be(seed):
    groups, ids = made_up(seed)
    total = len(ids)
    split = grouped_split(groups, ids, 0.7, 0.2, 0.1, seed)
    split.check_groups(groups, ids)
    sets = [set(groups.of(s).names) for s in (split.train, split.val, split.test)]
    assert len(set.union(*sets)) == sum(len(names) for names in sets)
    assert len(split.test) == int(0.1 * total + 1e-9)
    assert len(split.val) == int(0.2 * total + 1e-9)
    assert len(split.train) + len(split.val) + len(split.test) == total


def test_another_seed_is_another_split_of_groups():
    groups, ids = made_up(0)
    found = {
        grouped_split(groups, ids, 0.7, 0.2, 0.1, seed).hash(ids) for seed in range(10)
    }
    assert len(found) == 10


def test_few_groups_leave_the_seed_a_choice():
    groups, ids = made_up(0, sizes=[100, 104, 97, 103, 98, 99, 101, 298])
    tests = {
        frozenset(groups.of(grouped_split(groups, ids, 0.8, 0.1, 0.1, s).test).names)
        for s in range(20)
    }
    assert len(tests) > 3


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_rows_changes_no_grouped_split(seed):
    groups, ids = made_up(seed)
    order = np.random.default_rng(seed + 100).permutation(len(ids))
    moved = Groups("formula", groups.rows, [groups.names[i] for i in order])
    moved_ids = [ids[i] for i in order]
    one = grouped_split(groups, ids, 0.6, 0.2, 0.2, seed, train_subset=40)
    two = grouped_split(moved, moved_ids, 0.6, 0.2, 0.2, seed, train_subset=40)
    assert members(one, ids) == members(two, moved_ids)
    # The order is also the same, and so are batches.
    assert [ids[r] for r in one.train] == [moved_ids[r] for r in two.train]
    folds = folds_of_groups(groups, 4, seed), folds_of_groups(moved, 4, seed)
    for first, second in zip(*folds, strict=True):
        assert sorted(ids[r] for r in first) == sorted(moved_ids[r] for r in second)


@pytest.mark.parametrize("seed", range(25))
def test_no_other_choice_of_few_groups_is_much_nearer(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 200, 9)
    wanted = int(rng.integers(1, sizes.sum()))
    found = int(sizes[nearest_sum(sizes, wanted)].sum())
    sums = {
        int(sizes[np.array(mask, bool)].sum())
        for mask in itertools.product([0, 1], repeat=9)
    }
    best = min(abs(s - wanted) for s in sums)
    assert best <= abs(found - wanted) <= max(best, 0.1 * wanted)


def test_many_groups_are_dealt_exactly_and_fast():
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.zipf(1.7, 60_000), 3000)
    wanted = int(sizes.sum()) // 3
    assert int(sizes[nearest_sum(sizes, wanted)].sum()) == wanted


def test_a_subset_does_not_take_what_another_needs():
    for seed in range(10):
        groups, ids = made_up(seed, sizes=[90, 5, 5])
        split = grouped_split(groups, ids, 0.8, 0.1, 0.1, seed)
        assert [len(s) for s in (split.train, split.val, split.test)] == [90, 5, 5]


def test_a_group_that_is_too_large_is_named():
    groups, ids = made_up(0, sizes=[95, 5])
    message = (
        r"no whole formula is left for `test`, which asks for 10 crystals: the largest "
        r"of 2, g0, holds 95 of 100; ask for sizes that whole formulas can give, or "
        r"choose another `split\.by`"
    )
    with pytest.raises(InputError, match=message):
        grouped_split(groups, ids, 0.8, 0.1, 0.1, seed=0)
    split = grouped_split(groups, ids, 0.95, 0.05, 0, seed=0)
    assert [len(s) for s in (split.train, split.val, split.test)] == [95, 5, 0]


def test_a_divided_group_is_named():
    groups = Groups("formula", np.arange(4), ["NaCl", "NaCl", "MgO", "Si"])
    split = Split(np.array([0]), np.array([2]), np.array([3, 1]))
    message = (
        r"`train` and `test` share the formula NaCl \(m0 and m1\); split again with "
        r"`split\.by=formula`"
    )
    with pytest.raises(InputError, match=message):
        split.check_groups(groups, NAMES)


def test_validation_of_grouped_folds_keeps_groups_whole():
    groups, ids = made_up(3)
    for test in folds_of_groups(groups, 4, 0):
        split = split_beside(test, groups.rows, ids, 0.6, 0.15, 0, "", groups=groups)
        split.check_groups(groups, ids)
        assert abs(len(split.val) - 0.15 * len(ids)) <= 1


# ------------------------------------------------------------------------------- folds


def test_folds_hold_every_row_once():
    for parts in (
        folds_of_rows(ROWS, 7, seed=3),
        folds_of_rows(ROWS, 7, seed=3, labels=classes(20, 0)),
        folds_of_groups(made_up(1)[0], 7, 0),
    ):
        every = np.concatenate(parts)
        assert len(parts) == 7
        assert len(np.unique(every)) == len(every)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 2


def test_stratified_folds_share_the_classes():
    labels = classes(21, 0)
    for part in folds_of_rows(ROWS, 7, seed=0, labels=labels):
        assert labels[part].sum() == 3


def test_too_many_folds():
    with pytest.raises(InputError, match=r"`split\.folds` is 101, but there are only "
                       "100 crystals; lower it"):  # fmt: skip
        folds_of_rows(ROWS, 101, 0)
    with pytest.raises(InputError, match="only 3 crystals of the class 1; lower it"):
        folds_of_rows(ROWS, 4, 0, classes(3, 0))
    with pytest.raises(InputError, match="only 2 formulas; lower it"):
        folds_of_groups(made_up(0, sizes=[4, 4])[0], 3, 0)
