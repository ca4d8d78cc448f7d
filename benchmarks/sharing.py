"""Memory of several processes that read one store: the file once, and little more."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reading import STORE
from benchmarks.timing import Row, data
from crysdistill.corpus.build import build

READERS = 8


def measure() -> Iterator[Row]:
    """Compare one reader of the whole corpus with eight at once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(os.environ.get(STORE, Path(folder) / "corpus.h5"))
        if not path.exists():
            print("building a store of the corpus, without symmetry", flush=True)
            source = data() / "mp_corpus" / "structures.jsonl.gz"
            build([source], path, symmetry=None, progress=False)
        one, many = readers(path, 1), readers(path, READERS)
        size = path.stat().st_size / 1e6
    code = one.whole - one.beside
    yield Row(
        f"memory of {READERS} processes that read a store of {size:.0f} MB (without "
        f"{code:.0f} MB of Python and libraries in each)",
        f"one: {one.beside:.0f} MB",
        f"{READERS}: {many.beside:.0f} MB",
        many.beside / one.beside,
        "< 1.2x",
    )


@dataclass(frozen=True)
class Held:
    """Total memory of some processes, MB.

    Args:
        whole: all of it.
        beside: the memory added after the code was loaded.
    """

    whole: float
    beside: float


def readers(path: Path, count: int) -> Held:
    """Let processes read all of a store at random, and return their memory."""
    context = multiprocessing.get_context("spawn")
    gate, answer = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_read, args=(path, gate, answer)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    answers = [answer.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    whole, before = np.array(answers).sum(axis=0)
    return Held(whole, whole - before)


def _read(path: Path, gate: Any, answer: multiprocessing.Queue) -> None:
    """Read everything at random, and report the memory after and before."""
    from crysdistill.store.store import Store

    # The first batch loads code, above all Numba's compiler.
    Store.open(path, verify=False).batch([0])
    gate.wait()
    before = _memory()
    gate.wait()
    store = Store.open(path)
    rows = np.random.default_rng(0).permutation(len(store))
    for start in range(0, len(rows), 512):
        store.batch(rows[start : start + 512])
    gate.wait()
    answer.put((_memory(), before))
    gate.wait()


def _memory() -> float:
    """Return the proportional set size: a page shared by n processes counts 1/n."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
    if found is None:
        raise SystemExit("this system does not report shared and private memory")
    return int(found[1]) / 1024
