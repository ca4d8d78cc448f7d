"""A teacher as a frozen encoder: its answers are the embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from crysdistill.encoders import Blocks, Embeddings, Encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch, mean_over_atoms
from crysdistill.store.store import Store
from crysdistill.teachers.answers import TeacherAnswers
from crysdistill.teachers.asking import answers_for
from crysdistill.teachers.live import LIVE
from crysdistill.teachers.teacher import Answer
from crysdistill.transfer.composed import BUILDERS


class FrozenTeacher(Encoder):
    """The answers of a live teacher in place of embeddings.

    A readout on them is the shortest way from a strong foreign model to a property:
    nothing is distilled, so the predictor needs the model for every new crystal.

    An atom has the teacher's numbers for atoms, and after them those for its crystal.
    There is one layer and no weight.

    Args:
        teacher: one of `LIVE`, optionally with a model, as in `chgnet:r2scan`.
        fingerprint: that of the teacher to which a readout was fitted; "" takes any.

    Raises:
        InputError: there is no such teacher, its package is not installed, or it is not
            the one with this fingerprint.
    """

    name: ClassVar[str] = "teacher"

    def __init__(self, teacher: str, fingerprint: str = "") -> None:
        super().__init__()
        named, _, model = teacher.partition(":")
        if named not in LIVE:
            raise InputError(
                f"{teacher!r} cannot be frozen as it is; choose from "
                f"{', '.join(LIVE)}{did_you_mean(named, LIVE)}"
            )
        self.teacher = LIVE[named](model)
        found = self.teacher.fingerprint()
        if fingerprint not in ("", found):
            raise InputError(
                f"this predictor was fitted to another release of {self.teacher.name}; "
                f"install the one of {named} with which it was made"
            )
        widths = (self.teacher.atom_width, self.teacher.crystal_width)
        self.width = sum(width or 0 for width in widths)
        self.crystal_width = self.width
        self.settings: dict[str, Any] = {"teacher": teacher, "fingerprint": found}
        self.answers: TeacherAnswers | None = None

    @torch.no_grad()
    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch, from answers at hand (see `asked`) or by asking now."""
        answer = self._answer(batch)
        device = batch.cell.device
        parts: list[Tensor] = []
        if answer.atoms is not None:
            parts.append(answer.atoms.to(device))  # (N, F)
        if answer.crystals is not None:
            parts.append(answer.crystals.to(device)[batch.batch])
        atoms = torch.cat(parts, dim=1)
        crystals = mean_over_atoms(atoms, batch)
        return Embeddings(atoms, crystals, layers=(atoms,) if layers else ())

    def _answer(self, batch: CrystalBatch) -> Answer:
        if self.answers is None:
            return self.teacher.to(batch.cell.device)(batch)
        atoms = crystals = None
        if self.teacher.atom_width is not None:
            atoms = self.answers.gather_atoms(batch.rows, batch.num_nodes)
        if self.teacher.crystal_width is not None:
            crystals = self.answers.gather_crystals(batch.rows)
        return Answer(atoms, crystals)

    def blocks(self) -> Blocks:
        """Return blocks without weights."""
        return Blocks(nn.Identity(), [])


BUILDERS[FrozenTeacher.name] = FrozenTeacher


@contextmanager
def asked(
    models: Iterable[nn.Module],
    store: Store,
    rows: np.ndarray,
    *,
    fallback: Path | None = None,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> Iterator[None]:
    """Ask all frozen teachers in some models about crystals, and hold the answers.

    While this is open, the models may see batches of these crystals only, with their
    rows in the store. Without it, a frozen teacher computes every answer anew.

    Args:
        models: predictors or encoders.
        store: the store with the crystals.
        rows: their rows.
        fallback: a folder for the answers if the store's folder cannot be written to.
        device: where to compute.
        workers: processes that ask a slow teacher; None uses all cores.
        progress: whether to show a progress bar.

    Raises:
        InputError: a teacher does not know some of the crystals.
    """
    teachers = frozen_teachers(models)
    before = [one.answers for one in teachers]
    try:
        for one in teachers:
            _all_known(one, store, rows)
            one.answers = answers_for(
                one.teacher, store, rows,
                fallback=fallback, device=device, workers=workers, progress=progress,
            )  # fmt: skip
        yield
    finally:
        for one, answers in zip(teachers, before, strict=True):
            one.answers = answers


def frozen_teachers(models: Iterable[nn.Module]) -> list[FrozenTeacher]:
    """Return every frozen teacher in some predictors or encoders."""
    return [
        one
        for model in models
        for one in model.modules()
        if isinstance(one, FrozenTeacher)
    ]


def _all_known(one: FrozenTeacher, store: Store, rows: np.ndarray) -> None:
    """Refuse crystals that a teacher does not know."""
    known = one.teacher.knows(store, rows)
    if known.all():
        return
    unknown = [store.material_ids[row] for row in rows[~known]]
    more = ", ..." if len(unknown) > 3 else ""
    raise InputError(
        f"{one.teacher.name} does not know {len(unknown):,} of {len(rows):,} crystals "
        f"({', '.join(unknown[:3])}{more}); leave them out of {store.path}, or do "
        "without this teacher"
    )
