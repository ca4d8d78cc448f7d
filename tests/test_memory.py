"""A process holds only pages of a store's file, which all processes share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.toy_stores import labelled, write_store

COPIES = 12_500
"""Copies of 12 crystals, which make a store of 150,000."""

READ = """
import re, sys
import numpy as np
from crysdistill.store.store import Store

def private():  # in MB; what is mapped from a file is not counted
    text = open("/proc/self/smaps_rollup").read()
    return int(re.search(r"^Anonymous:\\s+(\\d+)", text, re.M)[1]) / 1024

Store.open(sys.argv[1], verify=False).batch([0])  # loads the compiled code
before = private()
store = Store.open(sys.argv[1], verify=False)
rows = np.random.default_rng(0).permutation(len(store))
for start in range(0, len(rows), 512):
    store.batch(rows[start : start + 512])
assert sum(map(len, store.material_ids)) > 1e6
print(len(store), private() - before)
"""


def tiled(path: Path, copies: int) -> Path:
    """Return a store that repeats the crystals of another store many times."""
    out = path.with_name("tiled.h5")
    with h5py.File(path) as one, h5py.File(out, "w") as many:
        for key, value in one.attrs.items():
            many.attrs[key] = value
        for group in one:
            for name, dataset in one[group].items():
                values = dataset[()]
                if "offsets" in name:
                    steps = np.tile(np.diff(values), copies)
                    values = np.concatenate(([0], np.cumsum(steps)))
                elif name == "values" and group == "properties":
                    values = np.tile(values, (1, copies))
                else:
                    values = np.tile(values, (copies,) + (1,) * (values.ndim - 1))
                many[f"{group}/{name}"] = values.astype(dataset.dtype)
    return out


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux to tell memory"
)
def test_reading_a_large_store_makes_nothing_private(tmp_path):
    store = tiled(write_store(tmp_path / "s.h5", labelled(12)), COPIES)
    megabytes = store.stat().st_size / 1e6
    done = subprocess.run(
        [sys.executable, "-c", READ, str(store)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    crystals, private = map(float, done.stdout.split())
    assert crystals == 12 * COPIES
    assert megabytes > 50
    assert private < 8, f"{private:.1f} MB of a store of {megabytes:.0f} MB"
