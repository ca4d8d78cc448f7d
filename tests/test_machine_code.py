"""Compiled functions, even where no cache can be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import caching

from crysdistill.machine_code import machine_code


def total(x: np.ndarray) -> float:
    sum_ = 0.0
    for value in x:
        sum_ += value
    return sum_


def test_a_compiled_function_does_the_same():
    x = np.arange(7.0)
    assert machine_code(total)(x) == 21.0
    assert machine_code(total).stats.cache_path


def test_nobody_may_be_at_home(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("~nobody-of-that-name").expanduser())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    assert "__pycache__" in machine_code(total).stats.cache_path


def test_without_a_folder_to_keep_it_in(monkeypatch):
    def nowhere(*_):
        return None

    for locator in caching.CacheImpl._locator_classes:
        monkeypatch.setattr(locator, "from_function", nowhere)
    with pytest.raises(RuntimeError, match="no locator available"):
        caching.FunctionCache(total)
    assert machine_code(total)(np.arange(7.0)) == 21.0


def test_an_installation_that_cannot_be_written(tmp_path):
    """The package folder is read-only, and there is no home folder."""
    package = tmp_path / "only_read"
    package.mkdir()
    source = Path(machine_code.__code__.co_filename).read_text()
    (package / "machine_code.py").write_text(source)
    (package / "loop.py").write_text(
        "from machine_code import machine_code\n"
        "@machine_code\ndef double(x):\n    return 2 * x\nprint(double(21))\n"
    )
    (package / "__pycache__").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-B", package / "loop.py"],
        env={"HOME": "/proc/nowhere", "PATH": "/usr/bin", "XDG_CACHE_HOME": "/proc/x"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "42\n", done.stderr


PACKAGE = {
    "constant.py": "FACTOR = 2\n",
    "helper.py": "from numba import njit\n\n@njit\ndef change(x):\n    return x + 1\n",
    "pair.py": "from typing import NamedTuple\n\nclass Pair(NamedTuple):\n"
    "    left: int\n    right: int\n",
    "loop.py": """from __future__ import annotations

from tiny.constant import FACTOR
from tiny.helper import change
from tiny.machine_code import machine_code
from tiny.pair import Pair

@machine_code
def total(n: int, pair: Pair) -> int:
    sum_ = 0
    for i in range(n):
        sum_ += FACTOR * change(i) + pair.left
    return sum_

if __name__ == "__main__":
    print(total(3, Pair(10, 100)), sum(total.stats.cache_hits.values()))
""",
}


@pytest.fixture
def tiny(tmp_path):
    package = tmp_path / "tiny"
    package.mkdir()
    source = Path(machine_code.__code__.co_filename).read_text()
    for name, text in {**PACKAGE, "machine_code.py": source}.items():
        (package / name).write_text(text)
    return package


def run(package: Path, **environment: str) -> tuple[int, int]:
    """Return a new process's result, and how many cached functions it found."""
    done = subprocess.run(
        [sys.executable, "-m", "tiny.loop"],
        env={"PATH": "/usr/bin", "HOME": str(package.parent), **environment},
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found, hits = map(int, done.stdout.split())
    return found, hits


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_a_change_in_another_file_is_noticed(tiny):
    assert run(tiny) == (2 * (1 + 2 + 3) + 30, 0)
    assert run(tiny) == (42, 1)
    assert len(list((tiny.parent / ".cache").rglob("*.nbc"))) == 1
    assert not list(tiny.rglob("*.nbc"))
    edit(tiny / "helper.py", "x + 1", "x + 5")
    assert run(tiny) == (2 * (5 + 6 + 7) + 30, 0)
    edit(tiny / "constant.py", "= 2", "= 3")
    assert run(tiny) == (3 * (5 + 6 + 7) + 30, 0)
    edit(tiny / "pair.py", "left: int\n    right: int", "right: int\n    left: int")
    assert run(tiny) == (3 * (5 + 6 + 7) + 300, 0)
    edit(tiny / "helper.py", "x + 5", "x + 1")
    edit(tiny / "constant.py", "= 3", "= 2")
    edit(tiny / "pair.py", "right: int\n    left: int", "left: int\n    right: int")
    assert run(tiny) == (42, 1)


@pytest.mark.slow
def test_without_a_home_it_is_kept_beside_the_source(tiny):
    nowhere = {"HOME": "/proc/nowhere"}
    assert run(tiny, **nowhere) == (42, 0)
    assert list((tiny / "__pycache__").rglob("*.nbc"))
    assert run(tiny, **nowhere) == (42, 1)


@pytest.mark.slow
def test_the_folder_of_numba_is_heeded(tiny, tmp_path):
    chosen = {"NUMBA_CACHE_DIR": str(tmp_path / "chosen")}
    assert run(tiny, **chosen) == (42, 0)
    assert list((tmp_path / "chosen").rglob("*.nbc"))
    assert not (tmp_path / ".cache").exists()
