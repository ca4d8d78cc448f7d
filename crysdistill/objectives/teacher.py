"""Objective: predict teachers' answers for the crystals of the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import rich
import torch
from rich.markup import escape
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.explained import explained, sums_of
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    full_precision,
    mean_over_ranks,
)
from crysdistill.objectives.views import masked_or_clean
from crysdistill.ranks import on_first_rank
from crysdistill.store.store import Store
from crysdistill.teachers import Teacher, TeacherAnswers, answers_for, make_teacher
from crysdistill.transfer.distillation import Level

__all__ = ["FromTeachers"]


class FromTeachers(Objective):
    """Regress teachers' answers for atoms or crystals, on the corpus itself.

    Each column of a teacher's answers is standardised to mean 0 and variance 1 over the
    training crystals. The loss is the mean squared error, averaged over teachers and
    levels: 1 if the student always answers the mean, 1 - R2 if it knows more. A decoder
    with one hidden layer stands between the two, so that any student can learn from any
    teacher. The decoder is not part of the encoder.

    Where a teacher says how uncertain it is, as an ensemble of predictors does, each
    squared error has a weight (`crysdistill.teachers.trust`); R2 has none.

    A teacher may know only a part of the corpus: a table may cover some crystals, and
    for a slow model `max_atoms` and `max_crystals` limit the number of answers. Means
    are then over the known crystals, and decoders see no others. Batches leave out
    crystals that no objective of the run can use (`speaks_of`). So an epoch of this
    objective alone costs no more than the known crystals, while other objectives can
    use the whole store.

    A teacher is asked once, before the first step. Its answers are kept beside the
    store, and an interrupted run continues where it stopped.

    Numbers: `teacher_r2_atoms` and `teacher_r2_crystals`, the explained share of the
    variance of the answers for held-out crystals, over atoms or crystals; for the
    second teacher `teacher2_r2_atoms`, and so on. The chance level, 0, answers the
    mean; R2 is below 0 if the student is worse than that. NaN if the teacher knows
    none.

    Source: regressing a teacher's features through a part that is thrown away later,
    A. Romero et al., ICLR 2015, arXiv:1412.6550.

    Differs from the paper: features are standardised, the decoder has a hidden layer,
    and only the teacher's final output is learned.

    Args:
        encoder_width: F, the width of the embeddings of atoms.
        crystal_width: F', the width of the embeddings of crystals.
        teachers: each as in `crysdistill distill`: a weights file, a checkpoint of the
            published CGCNN, a table of embeddings, `chgnet`, `dftd4` (charges and
            dispersion), `ewald` (potentials of formal charges), `ensemble:FOLDER` (the
            predictions of trained predictors), or `random`.
        levels: `atoms`, `crystals` or both; None takes atoms, or crystals if a teacher
            does not answer for atoms.
        max_atoms: skip crystals with more atoms; None skips none.
        max_crystals: ask about so many training crystals, drawn at random, and about
            the same share of the held-out crystals; None asks about all. CHGNet takes
            some 50 ms for a crystal on one core.
        mask_fraction: the chance that an atom is hidden from the student; 0 hides none.
        seed: of the random draws, and of the weights of a `random` teacher.
        teacher_encoder: `name` and the settings of a `random` teacher.

    Raises:
        InputError: there is no teacher, one is listed twice, or a value is out of
            range.
    """

    name: ClassVar[str] = "teacher"

    def __init__(
        self,
        encoder_width: int,
        crystal_width: int,
        *,
        teachers: Sequence[str],
        levels: Sequence[Level] | None = None,
        max_atoms: int | None = None,
        max_crystals: int | None = None,
        mask_fraction: float = 0.0,
        seed: int = 1,
        teacher_encoder: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not teachers:
            raise InputError("`teachers` is empty; name at least one")
        for spec in teachers:
            if list(teachers).count(spec) > 1:
                raise InputError(f"`teachers` has {spec} twice; leave one out")
        if levels is not None and not levels:
            raise InputError("`levels` is empty; give atoms, crystals or both")
        for name, value in (("max_atoms", max_atoms), ("max_crystals", max_crystals)):
            if value is not None and value < 1:
                raise InputError(f"`{name}` is {value} but must be at least 1")
        self.views = (masked_or_clean(mask_fraction),)
        self.widths: Mapping[Level, int] = {
            "atoms": encoder_width,
            "crystals": crystal_width,
        }
        self.specs, self.levels = tuple(teachers), levels
        self.max_atoms, self.max_crystals = max_atoms, max_crystals
        self.seed, self.teacher_encoder = seed, teacher_encoder
        self.teachers: list[Teacher] = []
        self.known: list[np.ndarray] = []  # (R,) bool for each teacher
        self.lessons = nn.ModuleList()

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Find the teachers and the crystals to ask them about; make the decoders.

        Raises:
            InputError: there is no such teacher, its file cannot be used, it does not
                answer at a level, or it knows none of the crystals.
        """
        sizes = np.diff(store.atom_offsets)
        small = np.flatnonzero(sizes <= (self.max_atoms or sizes.max()))
        order = np.random.default_rng(self.seed).permutation(len(store))  # (R,)
        for number, spec in enumerate(self.specs):
            teacher = make_teacher(
                spec, store, seed=self.seed, encoder=self.teacher_encoder
            )
            known = np.zeros(len(store), dtype=bool)
            known[small] = on_first_rank(lambda t=teacher: t.knows(store, small))  # type: ignore[misc]
            places = np.sort(order[rows[known[rows]]])
            if not len(places):
                raise InputError(
                    f"{teacher.name} knows none of the {len(rows):,} crystals of "
                    f"{store.path} to learn from"
                    + (f" that have at most {self.max_atoms} atoms" if self.max_atoms
                       else "")
                    + "; name another teacher, or raise `max_atoms`"
                )  # fmt: skip
            if self.max_crystals is not None and len(places) > self.max_crystals:
                # One order draws training and held-out crystals, so the share is equal.
                known &= order <= places[self.max_crystals - 1]
            self.teachers.append(teacher)
            self.known.append(known)
            for level in self._levels(teacher):
                width = _width(teacher, level)
                called = "teacher" if number == 0 else f"teacher{number + 1}"
                lesson = Lesson(number, f"{called}_r2_{level}", level,
                                self.widths[level], cast(int, width))  # fmt: skip
                self.lessons.append(lesson)
        self.learned = tuple(t.learned for t in self.teachers if t.learned is not None)

    def _levels(self, teacher: Teacher) -> Sequence[Level]:
        """Return the levels at which to learn from a teacher."""
        if self.levels is None:
            return ("crystals",) if teacher.atom_width is None else ("atoms",)
        for level in self.levels:
            if _width(teacher, level) is None:
                raise InputError(
                    f"`levels` has {level}, but {teacher.name} does not answer for "
                    f"{level}; leave it out"
                )
        return self.levels

    def speaks_of(self, rows: np.ndarray) -> np.ndarray:
        """Return which crystals any teacher is asked about."""
        return np.any([known[rows] for known in self.known], axis=0)

    def begin(
        self,
        store: Store,
        train: np.ndarray,
        held_out: np.ndarray,
        *,
        folder: Path,
        device: torch.device,
        progress: bool,
    ) -> None:
        """Ask the teachers, unless they were asked before."""
        for number, (teacher, known) in enumerate(
            zip(self.teachers, self.known, strict=True)
        ):
            mine, others = train[known[train]], held_out[known[held_out]]
            rich.print(
                escape(
                    f"{teacher.name} teaches {len(mine):,} of {len(train):,} crystals; "
                    f"judged on {len(others):,}"
                )
            )
            on_first_rank(lambda t=teacher, rows=mine: t.prepare(store, rows))  # type: ignore[misc]
            answers = answers_for(
                teacher,
                store,
                np.union1d(mine, others),
                fallback=folder / f"answers{number}",
                device=device,
                progress=progress,
            )
            for lesson in cast(Sequence[Lesson], self.lessons):
                if lesson.teacher == number:
                    lesson.begin(answers, mine)

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return this rank's share of the mean over teachers and levels."""
        losses = []
        for lesson in cast(Sequence[Lesson], self.lessons):
            said, wanted, weight = lesson(seen[0], batch)
            errors = (said - wanted).square()
            total = (errors if weight is None else weight * errors).sum()
            count = torch.full((), float(wanted.numel()), device=said.device)
            losses.append(mean_over_ranks(total, count))
        return torch.stack(losses).mean()

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        for lesson in cast(Sequence[Lesson], self.lessons):
            said, wanted, _ = lesson(seen[0], batch)  # an R2 has no weights
            lesson.totals.update(**sums_of(said, wanted))

    def compute(self) -> dict[str, float]:
        """Return the explained share of the variance for each lesson."""
        numbers: dict[str, float] = {}
        for lesson in cast(Sequence[Lesson], self.lessons):
            sums = lesson.totals.compute()
            r2 = explained(sums, sums["count"])
            numbers |= {lesson.number: r2, f"{lesson.number}_chance": 0.0}
        return numbers


def _width(teacher: Teacher, level: Level) -> int | None:
    return teacher.atom_width if level == "atoms" else teacher.crystal_width


class Lesson(nn.Module):
    """One teacher's answers at one level, and the decoder that predicts them.

    Args:
        teacher: the index of the teacher.
        number: the name of its R2.
        level: `atoms` or `crystals`.
        width: of the student's embeddings at that level.
        answers: the width of the teacher's answers.
    """

    asked: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self, teacher: int, number: str, level: Level, width: int, answers: int
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.number = number
        self.level = level
        self.decoder = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, answers)
        )
        self.totals = Totals(count=1, wrong=1, total=answers, squares=1)
        self.answers: TeacherAnswers | None = None
        self._device = torch.device("cpu")

    def begin(self, answers: TeacherAnswers, train: np.ndarray) -> None:
        """Take the answers, and their scale over the training crystals."""
        self.answers = answers
        mean, variance = answers.about(train).statistics(self.level)
        block = answers.atoms if self.level == "atoms" else answers.crystals
        assert block is not None  # noqa: S101 - for the type checker
        asked = torch.zeros(len(block.first), dtype=torch.bool)
        asked[answers.rows] = True
        # A constant column is not scaled; only its mean is subtracted.
        scale = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
        # Not saved: they follow from the answers, which every run reads anyway.
        self.register_buffer("asked", asked, persistent=False)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(
        self, seen: Embedded, batch: CrystalBatch
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the student's and the teacher's answers where the teacher has any.

        The third is how much each answer counts, None if all count alike.
        """
        answers = self.answers
        if answers is None:
            raise RuntimeError("call `begin` before the first batch")
        rows = batch.rows
        if rows.device != self._device:
            self.answers = answers = answers.near(rows.device)
            self._device = rows.device
        known = self.asked[rows]  # (B,)
        weight = None
        if self.level == "atoms":
            mine = seen.atoms[known[batch.batch]]  # (n, F)
            theirs = answers.gather_atoms(rows[known], len(mine))
        else:
            mine = seen.crystals[known]  # (b, F')
            theirs = answers.gather_crystals(rows[known])
            weight = answers.gather_weights(rows[known])
        theirs = theirs.to(mine.device, non_blocking=True)
        wanted = (theirs - self.mean) * self.scale
        if weight is not None:
            weight = weight.to(mine.device, non_blocking=True)
        return full_precision(self.decoder(mine)), wanted, weight
