"""Arrays kept beside a store: computed once, and failures do no harm."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from crysdistill.store.kept import kept


@pytest.fixture
def store(tmp_path):
    return SimpleNamespace(path=tmp_path / "corpus.h5", hash="abc")


def folder(store):
    return store.path.with_name("corpus.h5.kept")


def never():
    raise AssertionError("was computed again")


ARRAYS = {
    "counts": np.arange(6).reshape(2, 3).T,  # not contiguous
    "means": np.array([0.5, np.nan], np.float32),
    "none": np.empty((0, 4), np.int8),
}


def test_what_was_computed_once_is_read(store):
    first = kept(store, {"what": "x"}, lambda: ARRAYS)
    again = kept(store, {"what": "x"}, never)
    for arrays in (first, again):
        assert arrays.keys() == ARRAYS.keys()
        for name, expected in ARRAYS.items():
            assert arrays[name].dtype == expected.dtype
            np.testing.assert_array_equal(arrays[name], expected)
    assert len(list(folder(store).iterdir())) == 1


def test_another_key_or_store_is_computed_anew(store):
    rows = np.arange(5)
    keys = [
        {"what": "x", "rows": rows},
        {"what": "y", "rows": rows},
        {"what": "x", "rows": rows[:4]},
        {"what": "x", "rows": rows.astype(np.int32)},
        {"what": "x", "rows": rows[::-1]},
        {"what": "x", "size": np.int64(5)},
        {"what": "x", "size": 6},
    ]
    stores = [store, SimpleNamespace(path=store.path, hash="other")]
    for number, (where, key) in enumerate((s, k) for s in stores for k in keys):
        made = kept(where, key, lambda number=number: {"n": np.array([number])})
        assert made["n"] == number
    for number, (where, key) in enumerate((s, k) for s in stores for k in keys):
        assert kept(where, key, never)["n"] == number
    # Equal values give equal keys: NumPy or Python numbers, in any order.
    same = {"size": 5, "what": "x"}
    assert kept(store, same, never)["n"] == 5


@pytest.mark.parametrize("damage", [b"", b"no such thing", None])
def test_a_damaged_file_is_written_anew(store, damage):
    kept(store, {}, lambda: ARRAYS)
    (path,) = folder(store).iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] if damage is None else damage)
    made = kept(store, {}, lambda: ARRAYS)
    np.testing.assert_array_equal(made["counts"], ARRAYS["counts"])
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(store):
    folder(store).write_text("a file where the folder should be")
    for _ in range(2):
        made = kept(store, {}, lambda: ARRAYS)
        np.testing.assert_array_equal(made["counts"], ARRAYS["counts"])
    assert folder(store).is_file()


def test_a_full_disk_leaves_nothing_behind(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    made = kept(store, {}, lambda: ARRAYS)
    np.testing.assert_array_equal(made["counts"], ARRAYS["counts"])
    assert list(folder(store).iterdir()) == []


def test_two_runs_may_compute_the_same_at_once(store):
    """The second begins and ends while the first computes."""

    def slowly():
        inner = kept(store, {}, lambda: ARRAYS)
        return {name: array.copy() for name, array in inner.items()}

    made = kept(store, {}, slowly)
    np.testing.assert_array_equal(made["counts"], ARRAYS["counts"])
    assert len(list(folder(store).iterdir())) == 1
    kept(store, {}, never)


def test_an_error_of_the_computation_is_its_own(store):
    with pytest.raises(OSError, match="unreadable"):
        kept(store, {}, lambda: (_ for _ in ()).throw(OSError("unreadable")))
