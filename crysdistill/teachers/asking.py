"""Asking a teacher about crystals, once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.graphs.batch import make_batch, replace
from crysdistill.locks import room_for
from crysdistill.ranks import on_first_rank
from crysdistill.store.store import Store
from crysdistill.teachers.answers import TeacherAnswers
from crysdistill.teachers.kept import About, KeptAnswers
from crysdistill.teachers.teacher import Answer, Teacher
from crysdistill.teachers.trust import weighed
from crysdistill.workers import engine

FOLDER = ".teachers"
"""The ending of the folder beside a store."""

_CRYSTALS, _EDGES = 256, 100_000  # at most in a batch
_SLOW_CRYSTALS = 32  # in a batch of a slow teacher, so that the bar moves


def answers_for(
    teacher: Teacher,
    store: Store,
    rows: Tensor | np.ndarray,
    *,
    fallback: Path | None = None,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> TeacherAnswers:
    """Return a teacher's answers for some crystals.

    The teacher is asked once: its answers stay beside the store, and every later run
    with the same teacher reads them there. Answers are stored by atom, so a teacher may
    use another graph than the one in the store. With several ranks, the first one asks.

    Args:
        teacher: the teacher to ask.
        store: the store with the crystals.
        rows: the rows of the crystals in it.
        fallback: a folder for the answers if the store's folder cannot be written to.
        device: the device on which the teacher computes.
        workers: processes that ask a slow teacher; None uses all cores.
        progress: whether to show a progress bar.

    Raises:
        InputError: there are no crystals, the teacher cannot answer for one of them, or
            there is no writable place for the answers.
    """
    chosen = np.unique(np.asarray(rows, dtype=np.int64))
    if not len(chosen):
        raise InputError("there are no crystals to ask the teacher about")

    def ask() -> Path | None:
        teacher.prepare(store, chosen)
        if teacher.at_hand(chosen) is not None:
            return None
        asking = _Asking(teacher, store, torch.device(device), workers, progress)
        return asking.fill(chosen, fallback)

    folder = on_first_rank(ask)
    ready = teacher.at_hand(chosen)
    if ready is not None:
        return ready
    if folder is None:
        raise RuntimeError("a teacher has answers at hand on some ranks only")
    found = KeptAnswers.open(folder).answers(store, torch.from_numpy(chosen))
    return weighed(found) if teacher.spreads else found


class _Asking:
    """One teacher, one store; see `answers_for` for the arguments."""

    def __init__(
        self,
        teacher: Teacher,
        store: Store,
        device: torch.device,
        workers: int | None,
        progress: bool,
    ) -> None:
        self.teacher = teacher
        self.store = store
        self.device = device
        self.workers = workers
        self.progress = progress
        foreign_graph = teacher.graph not in (None, store.graph)
        self.slow = teacher.SLOW or foreign_graph  # neighbours are found one by one

    def fill(self, rows: np.ndarray, fallback: Path | None) -> Path:
        """Return a folder with the answers for these rows; ask for missing ones."""
        about, store = self._about(), self.store
        folders = [Path(f"{store.path}{FOLDER}") / about.key[:16]]
        if fallback is not None:
            folders.append(fallback / "teacher" / about.key[:16])
        for folder in folders:
            kept = KeptAnswers(folder, about)
            if kept.done()[rows].all():  # also where nothing can be written
                return folder
            with room_for(folder, "the answers so far"):
                if kept.can_write():
                    self._complete(kept, rows, fallback)
                    return folder
        raise InputError(
            f"{folders[-1]}: cannot write the answers of {self.teacher.name} there; "
            "give a folder that can be written to"
        )

    def _about(self) -> About:
        """Return what the folder will hold."""
        teacher, store = self.teacher, self.store
        facts = f"1 {teacher.fingerprint()} {teacher.graph} {store.structures_hash}"
        return About(
            teacher=teacher.name,
            key=hashlib.sha256(facts.encode()).hexdigest(),
            crystals=len(store),
            atoms=int(store.atom_offsets[-1]),
            atom_width=teacher.atom_width,
            crystal_width=teacher.kept_width,
        )

    def _complete(
        self, kept: KeptAnswers, rows: np.ndarray, fallback: Path | None
    ) -> None:
        """Ask about the crystals that have no answers yet."""
        with ExitStack() as stack:
            writer = stack.enter_context(kept.writing())
            missing = rows[~writer.done[rows]]
            if not len(missing):  # another run has asked, while this one waited
                return
            ready = self.teacher.ready_for(
                self.store, missing, fallback=fallback,
                device=self.device, workers=self.workers, progress=self.progress,
            )  # fmt: skip
            stack.enter_context(ready)  # its bars end before the next begins
            bar = stack.enter_context(Progress(disable=not self.progress))
            said = f"asking {escape(self.teacher.name)}"
            task = bar.add_task(said, total=len(missing))
            parts = list(self._parts(missing))
            for part, answer in zip(parts, self._answers(parts), strict=True):
                self._check(part, answer)
                writer.write(part, answer, self.store)
                bar.update(task, advance=len(part))

    def _parts(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Divide rows into batches."""
        most = _SLOW_CRYSTALS if self.slow else _CRYSTALS
        edges = self.store.edge_offsets[rows + 1] - self.store.edge_offsets[rows]
        begin, held = 0, 0
        for k, size in enumerate(edges.tolist()):
            if k > begin and (k - begin == most or held + size > _EDGES):
                yield rows[begin:k]
                begin, held = k, 0
            held += size
        if begin < len(rows):
            yield rows[begin:]

    def _answers(self, parts: list[np.ndarray]) -> Iterator[Answer]:
        """Yield the answer for each batch."""
        count = min(self.workers or os.cpu_count() or 1, len(parts))
        if not self.slow or self.device.type != "cpu" or count < 2:
            self.teacher.to(self.device)
            for part in parts:
                yield _ask(self.teacher, self.store, part, self.device)
            self.teacher.to("cpu")
            return
        job = partial(_ask_elsewhere, self.teacher, self.store.path)
        with engine(count, kept="the answers so far are kept; ") as workers:
            for found in workers.map(job, parts):
                tensors = [None if x is None else torch.from_numpy(x) for x in found]
                yield Answer(*tensors)

    def _check(self, rows: np.ndarray, answer: Answer) -> None:
        """Refuse answers of the wrong shape, and answers that are not finite."""
        atoms, teacher = self.store.atom_offsets, self.teacher
        first = np.cumsum([0, *(atoms[rows + 1] - atoms[rows])])
        for x, width, starts in (
            (answer.atoms, teacher.atom_width, first),
            (answer.crystals, teacher.kept_width, np.arange(len(rows) + 1)),
        ):
            found = None if x is None else tuple(x.shape)
            wanted = None if width is None else (int(starts[-1]), width)
            if found != wanted:
                raise RuntimeError(f"{teacher.name} answered {found}, not {wanted}")
            if x is None or torch.isfinite(x).all():
                continue
            bad = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
            row = rows[np.searchsorted(starts, bad, side="right") - 1]
            raise InputError(
                f"{teacher.name} answers for {self.store.material_ids[row]} with a "
                "number that is not finite; leave that crystal out of the store"
            )


@torch.no_grad()
def _ask(
    teacher: Teacher, store: Store, rows: np.ndarray, device: torch.device
) -> Answer:
    """Ask about some crystals, on the graph that the teacher knows."""
    if teacher.graph in (None, store.graph):
        batch = store.batch(rows)
    else:
        batch = make_batch(list(store.crystals(rows.tolist())), teacher.graph)
    names = [store.material_ids[row] for row in rows]  # for messages
    batch = replace(batch, rows=torch.from_numpy(rows), material_ids=names)
    return teacher(batch.to(device))


def _ask_elsewhere(
    teacher: Teacher, path: Path, rows: np.ndarray
) -> tuple[np.ndarray | None, ...]:
    """Ask in another process; return arrays, since a tensor would be only a handle."""
    answer = _ask(teacher, _opened(path), rows, torch.device("cpu"))
    return tuple(
        None if x is None else x.float().numpy()
        for x in (answer.atoms, answer.crystals)
    )


@lru_cache(maxsize=1)
def _opened(path: Path) -> Store:
    return Store.open(path, verify=False)
