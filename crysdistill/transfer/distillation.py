"""Knowledge of a frozen teacher as an extra loss for a student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch, mean_over_atoms
from crysdistill.ranks import sum_over_ranks

Level = Literal["atoms", "crystals"]
"""What is compared; the names are those of the fields of `Embeddings`."""


# ---------------------------------------------------------------------- the losses


def atom_loss(
    student_atoms: Tensor, teacher_atoms: Tensor, batch: CrystalBatch
) -> Tensor:
    """Return the distance of directions, atom by atom.

    Embeddings are brought to length one; the squared difference is averaged over the
    atoms and the width of a crystal, then over crystals. For an atom it is
    2 (1 - cos) / F, cos being the cosine between student and teacher.

    Source: K. Das et al., CrysGNN, AAAI 37, 7323 (2023),
    doi:10.1609/aaai.v37i6.25892, and the code published with it.

    Args:
        student_atoms: (N, F), projected where the widths differ.
        teacher_atoms: (N, F).
        batch: says which atoms make a crystal.

    Returns:
        A scalar; with several ranks this rank's share of it.
    """
    student = F.normalize(student_atoms.float(), dim=1)  # (N, F)
    teacher = F.normalize(teacher_atoms.float(), dim=1)  # (N, F)
    return squared_error_of_atoms(student, teacher, batch)


def squared_error_of_atoms(
    student_atoms: Tensor, teacher_atoms: Tensor, batch: CrystalBatch
) -> Tensor:
    """Return the squared error, averaged over width, atoms, and then crystals.

    The arguments and the result are those of `atom_loss`.
    """
    error = student_atoms.float() - teacher_atoms.float()  # (N, F)
    per_atom = error.square().mean(dim=1, keepdim=True)  # (N, 1)
    return _mean_over_crystals(mean_over_atoms(per_atom, batch), batch)


def squared_error_of_crystals(
    student_crystals: Tensor, teacher_crystals: Tensor, batch: CrystalBatch
) -> Tensor:
    """Return the squared error, averaged over width and crystals.

    Args:
        student_crystals: (B, F'), projected where the widths differ.
        teacher_crystals: (B, F').
        batch: says how many crystals there are.

    Returns:
        A scalar; with several ranks this rank's share of it.
    """
    error = student_crystals.float() - teacher_crystals.float()  # (B, F')
    return _mean_over_crystals(error.square().mean(dim=1, keepdim=True), batch)


def _mean_over_crystals(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Return this rank's share of the mean over the crystals of all ranks."""
    crystals = sum_over_ranks(torch.full_like(batch.ptr[0], batch.num_graphs))
    return x.sum() / crystals


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """One way to compare a student with its teacher.

    Args:
        level: whether atoms or crystals are compared.
        standardized: whether the teacher's answers are first brought to mean 0 and
            variance 1, each of their numbers by itself.
        distance: from student, teacher and batch to this rank's share of the loss.
    """

    level: Level
    standardized: bool
    distance: Callable[[Tensor, Tensor, CrystalBatch], Tensor]


DISTILLATION_LOSSES = {
    "published": DistillationLoss("atoms", False, atom_loss),
    "standardized_atoms": DistillationLoss("atoms", True, squared_error_of_atoms),
    "standardized_crystals": DistillationLoss(
        "crystals", True, squared_error_of_crystals
    ),
}
"""Distillation losses by the name that configurations use.

The standardised ones are about 1 for a student that knows the means alone, and 1 - R2
for one that knows more. The published one is at most 4 / F, some 0.06 at a width of 64,
whatever the student says: beside the loss of a property it weighs little.
"""


def find_loss(name: str) -> DistillationLoss:
    """Return the loss of that name.

    Raises:
        InputError: `name` is not one of `DISTILLATION_LOSSES`.
    """
    if name not in DISTILLATION_LOSSES:
        raise InputError(
            f"unknown distillation loss {name!r}; choose one of "
            f"{', '.join(DISTILLATION_LOSSES)}"
            f"{did_you_mean(name, DISTILLATION_LOSSES)}"
        )
    return DISTILLATION_LOSSES[name]


# ------------------------------------------------------------- the part of a student


class Distillation(nn.Module):
    """The embedding loss of a student, its weight, and a projector where one is needed.

    The projector, Linear from the student's width to the teacher's, is trained with
    the student and is no part of it.

    Args:
        student_width: F of the student, at the level of the loss.
        teacher_width: F of the teacher, at that level.
        alpha: the share of the embedding loss: 0 ignores the teacher, 1 the labels.
        loss: one of `DISTILLATION_LOSSES`.
        projector: whether to project; None projects where the widths differ.

    Attributes:
        level: whether `forward` wants atoms or crystals.
        standardizes: whether it has to know the teacher's mean and variance.

    Raises:
        InputError: `alpha` is out of range, `loss` unknown, or the widths differ and
            `projector` is false.
    """

    mean: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        alpha: float = 0.5,
        loss: str = "published",
        projector: bool | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise InputError(f"`alpha` is {alpha} but must be in [0, 1]")
        found = find_loss(loss)
        differ = student_width != teacher_width
        if projector is False and differ:
            raise InputError(
                f"the teacher gives {teacher_width} numbers for {found.level} but the "
                f"student has {student_width}; set `projector=true`"
            )
        self.alpha = alpha
        self.level: Level = found.level
        self.standardizes = found.standardized
        self._distance = found.distance
        self.projector: nn.Module = (
            nn.Linear(student_width, teacher_width)
            if projector or differ
            else nn.Identity()
        )
        # They follow from the teacher, which every run asks anew: nothing to save.
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)

    @classmethod
    def between(
        cls,
        student: tuple[int, int],
        teacher: tuple[int | None, int | None],
        loss: str = "published",
        **settings: Any,
    ) -> Distillation:
        """Return the distillation for the widths that the level of the loss asks for.

        Args:
            student: the widths of its atoms and of its crystals.
            teacher: the same; None where it does not answer.
            loss: one of `DISTILLATION_LOSSES`.
            settings: see the class.

        Raises:
            InputError: as the class, or the teacher does not answer at that level.
        """
        level = find_loss(loss).level
        place = ("atoms", "crystals").index(level)
        width = teacher[place]
        if width is None:
            others = [n for n, x in DISTILLATION_LOSSES.items() if x.level != level]
            raise InputError(
                f"`loss` is {loss}, which compares {level}, but the teacher does not "
                f"answer for {level}; choose {' or '.join(others)}"
            )
        return cls(student[place], width, loss=loss, **settings)

    def standardize(self, mean: Tensor, variance: Tensor) -> None:
        """Take the mean and the variance of the teacher's answers, (F,) each.

        A number that is the same for all stays as it is, less its mean.
        """
        scale = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
        device = next(self.parameters(), mean).device
        self.mean, self.scale = mean.float().to(device), scale.float().to(device)

    def forward(self, student: Tensor, teacher: Tensor, batch: CrystalBatch) -> Tensor:
        """Return the embedding loss; with several ranks this rank's share of it.

        Args:
            student: (N, student width), or (B, ...) at the level `crystals`.
            teacher: (N, teacher width), of the same atoms in the same order.
            batch: the student's batch.

        Raises:
            InputError: the teacher answered for other atoms.
        """
        projected = self.projector(student)  # (N, F)
        if projected.shape != teacher.shape:
            raise InputError(
                f"teacher embeddings are {tuple(teacher.shape)} but this batch "
                f"needs {tuple(projected.shape)}; they belong to other crystals or to "
                "another teacher"
            )
        if self.standardizes:
            if self.mean is None or self.scale is None:
                raise RuntimeError("call `standardize` before the first batch")
            teacher = (teacher.float() - self.mean) * self.scale
        return self._distance(projected, teacher, batch)

    def total(self, property_loss: Tensor, embedding_loss: Tensor) -> Tensor:
        """Return (1 - alpha) * property loss + alpha * embedding loss."""
        return (1 - self.alpha) * property_loss + self.alpha * embedding_loss
