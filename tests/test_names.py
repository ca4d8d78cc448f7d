"""Names that stay in the file behave like a list."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from crysdistill.store import names as names_module
from crysdistill.store.names import Names

LIST = ["mp-1", "", "日本", "é 💎", "mp-149"]


def names_of(names: list[str]) -> Names:
    encoded = [name.encode() for name in names]
    return Names(
        np.frombuffer(b"".join(encoded), np.uint8),
        np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    )


@pytest.mark.parametrize("at_once", [1, 2, 5, 4096])
def test_all_of_them(monkeypatch, at_once):
    monkeypatch.setattr(names_module, "_AT_ONCE", at_once)
    assert list(names_of(LIST)) == LIST
    assert list(names_of([])) == []
    assert list(reversed(names_of(LIST))) == LIST[::-1]


@pytest.mark.parametrize("row", [0, 1, 4, -1, -5, np.int64(2), True])
def test_one_of_them(row):
    assert names_of(LIST)[row] == LIST[row]


@pytest.mark.parametrize("row", [5, -6])
def test_none_of_them(row):
    with pytest.raises(IndexError, match=f"no name {row}: there are 5"):
        names_of(LIST)[row]


def test_some_of_them():
    names = names_of(LIST)
    for some in (slice(1, 3), slice(None), slice(None, None, -2), slice(9, 12)):
        assert names[some] == LIST[some]
    assert names.index("日本") == 2
    assert "mp-1" in names
    assert "mp-2" not in names


def test_what_they_equal():
    names = names_of(LIST)
    assert names == LIST
    assert names == LIST
    assert names == names_of(LIST)
    assert names != LIST[1:]
    assert names != [*LIST[:-1], "mp-150"]
    assert names != "mp-1"
    assert repr(names) == "Names(['mp-1', '', '日本', ...], 5 in all)"


def test_arrays_and_tables_take_them():
    names = names_of(LIST)
    assert np.array(names).tolist() == LIST
    assert pd.DataFrame({"name": names, "n": range(5)})["name"].tolist() == LIST
