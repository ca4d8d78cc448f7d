"""A table of 100,000 crystals as a teacher: time to open it, and cost per step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.datasets import labelled_store
from benchmarks.timing import Row, take_turns
from crysdistill.encoders import CGCNN
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.store.store import Store
from crysdistill.teachers import TeacherAnswers, answers_for, make_teacher
from crysdistill.teachers.tables.writing import Contents, Part, write_table
from crysdistill.transfer.distillation import Distillation

CRYSTALS, WIDTH, BATCH = 100_000, 64, 64


def write(path: Path, store: Store, rng: np.random.Generator) -> None:
    """Write random vectors for many copies of a store's crystals."""
    own = np.diff(store.atom_offsets)
    copies = -(-CRYSTALS // len(store))
    names = list(store.material_ids)
    ids = [name if not k else f"{name}-{k}" for k in range(copies) for name in names]
    ptr = np.concatenate(([0], np.cumsum(np.tile(own, copies)))).astype(np.int64)
    part: Part = {
        "atoms": rng.standard_normal((int(own.sum()), WIDTH)).astype(np.float32),
        "frac_coords": store.frac_coords,
        "atomic_numbers": store.atomic_numbers,
    }
    contents = Contents(ids, ptr, {"atoms": WIDTH}, {})
    write_table(path, contents, (part for _ in range(copies)))


def _step(encoder: CGCNN, batch: CrystalBatch) -> None:
    encoder.zero_grad()
    encoder(batch).crystals.square().mean().backward()


def _teach(answers: TeacherAnswers, loss: Distillation, batch: CrystalBatch) -> None:
    student = torch.zeros(batch.num_nodes, WIDTH, requires_grad=True)
    known = answers.gather_atoms(batch.rows, batch.num_nodes)
    loss(student, known, batch).backward()


def _cost(answers: TeacherAnswers, batch: CrystalBatch) -> Row:
    """Compare the cost of a table with that of a training step."""
    loss = Distillation(WIDTH, WIDTH, loss="standardized_atoms")
    loss.standardize(*answers.statistics("atoms"))
    encoder = CGCNN()
    times = take_turns(
        {
            "step": lambda: _step(encoder, batch),
            "teach": lambda: _teach(answers, loss, batch),
        },
        30,
    )
    return Row(
        f"time that a table adds to a step of {BATCH} crystals (against CGCNN's step)",
        f"{1e3 * times['step']:.1f} ms",
        f"{1e3 * times['teach']:.2f} ms",
        times["teach"] / times["step"],
        "< 0.10x",
    )


def measure() -> Iterator[Row]:
    """Open tables of each kind, and compare the cost of one with a training step."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(labelled_store(Path(folder), 4096))
        rows = np.arange(len(store))
        for ending, goal in (
            (".parquet", ""),
            (".h5", "< 1 s"),
            (".safetensors", "< 1 s"),
        ):
            path = Path(folder) / f"table{ending}"
            write(path, store, rng)

            def opened(path: Path = path) -> TeacherAnswers:
                return answers_for(make_teacher(path, store), store, rows)

            seconds = take_turns({"open": opened}, 3)["open"]
            yield Row(
                f"opening a table of {CRYSTALS:,} crystals ({ending[1:]}), and "
                f"comparing {len(store):,} of them with a store",
                "",
                f"{seconds:.2f} s",
                None,
                goal,
            )
        yield _cost(opened(), store.batch(rng.permutation(rows)[:BATCH]))
