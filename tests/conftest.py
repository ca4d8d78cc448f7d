"""Crystals that many tests use, and the real data if it is present."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

# Tests run in parallel, so each has one thread. Torch reads this on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pymatgen.core import Lattice, Structure
from pymatgen.core.operations import SymmOp

from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import atomic_numbers_by_symbol

LONGEST_FIRST = (
    *("ranks", "resume", "recipes", "overlap_compiled", "readme", "build", "cluster"),
    *("firewall", "conformance", "averaging", "study_report", "study", "overlap_real"),
    *("arms", "training", "optimade", "fuzz_tables", "second_reader", "overlap"),
    *("full_disk", "objectives", "alloys", "engine", "objectives_learn"),
    *("keeping_pretrained", "resume_ranks", "freeze_study", "duplicates", "edits"),
    "ase_files",
)
"""Files with the longest tests. They start first, so none runs alone at the end."""


def _same_operation(one: SymmOp, other: object) -> bool:
    """Compare two operations of a group as pymatgen does, 30 times as fast.

    pymatgen compares 18,000 pairs whenever it makes a cubic group, which takes seconds.
    """
    if not isinstance(other, type(one)):
        return NotImplemented
    a, b = one.affine_matrix, other.affine_matrix
    return bool((abs(a - b) <= one.tol + 1e-5 * abs(b)).all())  # as np.allclose


SymmOp.__eq__ = _same_operation


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector away from imports, since they live to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Work in the test's own process unless the test sets a number of workers.

    A fresh process takes seconds to import. Tests of workers set the number, and
    commands in fresh processes use all cores.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        yield


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the worker processes, which saves seconds of imports.

    Like fresh processes, they get pickled work and inherit nothing from this process.
    `test_engine.py` tests fresh processes.
    """
    from crysdistill.workers import workers
    from tests.forks import CONTEXT

    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: CONTEXT)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real structures and labels; skips if it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CRYSDISTILL_DATA", beside))
    if not folder.is_dir():
        pytest.skip(
            "real data absent: put it in ../shared/data or set CRYSDISTILL_DATA"
        )
    return folder


@pytest.fixture
def each_epoch_is_saved(monkeypatch) -> None:
    """Save each epoch of a run, however short it is."""
    monkeypatch.setattr("crysdistill.training.resume.keeping.SHARE", 1e9)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A store of small crystals with labels; some test files make their own."""
    from tests.toy_stores import labelled, write_store

    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    return write_store(path, labelled(40), symmetry="fast")


@pytest.fixture
def config(dataset, tmp_path):
    """A short training run on `dataset`."""
    from tests.toy_runs import training_config

    return training_config(dataset, tmp_path / "run")


@pytest.fixture(scope="module")
def pretrained(dataset, tmp_path_factory) -> Path:
    """Weights of an encoder that is briefly pretrained on `dataset`."""
    from crysdistill.training.pretrain import pretrain
    from tests.toy_runs import pretraining_config

    return pretrain(pretraining_config(dataset, tmp_path_factory.mktemp("p") / "run"))


def crystal(name: str, cell: np.ndarray, species: list[str], frac: list) -> Crystal:
    numbers = atomic_numbers_by_symbol()
    coords = np.array(frac, float)
    return Crystal(
        material_id=name,
        atomic_numbers=np.array([numbers[s] for s in species], np.uint8),
        frac_coords=coords - np.floor(coords),
        cell=np.array(cell, float),
    )


def from_structure(name: str, structure: Structure) -> Crystal:
    return crystal(
        name,
        structure.lattice.matrix,
        [site.specie.symbol for site in structure],
        structure.frac_coords,
    )


@cache
def structures() -> dict[str, Structure]:
    """Structure types with textbook neighbours; copy one before you change it."""
    make = Structure.from_spacegroup
    return {
        "fcc-Cu": make("Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0, 0, 0]]),
        "bcc-Fe": make("Im-3m", Lattice.cubic(2.87), ["Fe"], [[0, 0, 0]]),
        "NaCl": make(
            "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
        ),
        "CsCl": make(
            "Pm-3m", Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5] * 3]
        ),
        "diamond": make("Fd-3m", Lattice.cubic(3.567), ["C"], [[0, 0, 0]]),
        "SrTiO3": make(
            "Pm-3m",
            Lattice.cubic(3.905),
            ["Sr", "Ti", "O"],
            [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]],
        ),
        "TiO2": make(
            "P4_2/mnm",
            Lattice.tetragonal(4.594, 2.959),
            ["Ti", "O"],
            [[0, 0, 0], [0.305, 0.305, 0]],
        ),
        "hcp-Mg": make(
            "P6_3/mmc", Lattice.hexagonal(3.21, 5.21), ["Mg"], [[1 / 3, 2 / 3, 0.25]]
        ),
    }


@pytest.fixture(scope="session")
def crystals() -> list[Crystal]:
    return [from_structure(name, s) for name, s in structures().items()]


def random_crystal(seed: int, atoms: int = 6, elements: tuple[int, ...] = (8, 14, 26)):
    """A low-symmetry crystal without equal distances or close atoms."""
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(4.0, 6.0, 3)) + rng.uniform(-0.8, 0.8, (3, 3))
    frac: list[np.ndarray] = []
    while len(frac) < atoms:
        new = rng.random(3)
        delta = np.array([new - f for f in frac]).reshape(-1, 3)
        delta -= np.round(delta)
        if not len(delta) or np.linalg.norm(delta @ cell, axis=1).min() > 1.0:
            frac.append(new)
    return Crystal(
        material_id=f"random-{seed}",
        atomic_numbers=rng.choice(np.array(elements, np.uint8), atoms),
        frac_coords=np.array(frac),
        cell=cell,
    )


def agree(found, expected, atol: float = 2e-4) -> None:
    """Compare a tensor with numbers to a relative error of a thousandth."""
    np.testing.assert_allclose(found.double(), expected, atol=atol, rtol=1e-3)
