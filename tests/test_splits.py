"""Splits: sizes, no overlap, nesting, files, hashes, errors."""

from __future__ import annotations

import numpy as np
import pytest

from crysdistill.corpus.splits import Split, random_split, read_split
from crysdistill.errors import InputError

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
