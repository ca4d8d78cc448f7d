"""Compiled functions, also where nothing can be kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_without_a_folder_to_keep_it_in(monkeypatch):
    def nowhere(*_):
        return None

    for locator in caching.CacheImpl._locator_classes:
        monkeypatch.setattr(locator, "from_function", nowhere)
    with pytest.raises(RuntimeError, match="no locator available"):
        caching.FunctionCache(total)
    assert machine_code(total)(np.arange(7.0)) == 21.0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a home that is no folder")
def test_an_installation_that_cannot_be_written(tmp_path):
    """Its folder is not writable, nor is there a home."""
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
