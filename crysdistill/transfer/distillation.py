"""A frozen teacher's knowledge as an extra loss for a student."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch, mean_over_atoms
from crysdistill.ranks import sum_over_ranks
from crysdistill.transfer.balance import geometric_mean
from crysdistill.transfer.relations import (
    atom_relations,
    compared_atoms,
    compared_crystals,
    crystal_relations,
)

Level = Literal["atoms", "crystals"]
"""The level at which embeddings are compared; named as in `Embeddings`."""

Weighting = Literal["fixed", "fading", "balanced"]
"""How the teacher's loss is weighted against that of the labels; see `Distillation`."""


# ---------------------------------------------------------------------- the losses


def atom_loss(
    student_atoms: Tensor, teacher_atoms: Tensor, batch: CrystalBatch
) -> Tensor:
    """Return the distance between the directions of student and teacher, by atom.

    Embeddings are scaled to length one. The squared difference is averaged over the
    width and the atoms of a crystal, then over crystals. For one atom it is
    2 (1 - cos) / F, where cos is the cosine between student and teacher.

    Source: K. Das et al., CrysGNN, AAAI 37, 7323 (2023),
    doi:10.1609/aaai.v37i6.25892, and the code published with it.

    Args:
        student_atoms: (N, F), projected if the widths differ.
        teacher_atoms: (N, F).
        batch: the batch that assigns atoms to crystals.

    Returns:
        A scalar; with several ranks this rank's share of it.
    """
    student, teacher = directions(student_atoms, teacher_atoms, batch)
    return squared_error_of_atoms(student, teacher, batch)


def directions(
    student: Tensor, teacher: Tensor, batch: CrystalBatch
) -> tuple[Tensor, Tensor]:
    """Return both embeddings at length one, as `atom_loss` compares them."""
    return F.normalize(student.float(), dim=1), F.normalize(teacher.float(), dim=1)


def as_they_are(
    student: Tensor, teacher: Tensor, batch: CrystalBatch
) -> tuple[Tensor, Tensor]:
    """Return both embeddings unchanged, as a squared error compares them."""
    return student.float(), teacher.float()


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
        student_crystals: (B, F'), projected if the widths differ.
        teacher_crystals: (B, F').
        batch: the batch of these crystals.

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
        distance: maps student, teacher and batch to this rank's share of the loss.
        compared: maps the same to the numbers that are compared, (n, F) each.
        standardized: whether each number of the teacher's answers is first brought to
            mean 0 and variance 1.
        relational: whether student and teacher may have different widths.
        weighs: whether it is a squared error, in which each number can have a weight.
    """

    level: Level
    distance: Callable[[Tensor, Tensor, CrystalBatch], Tensor]
    compared: Callable[[Tensor, Tensor, CrystalBatch], tuple[Tensor, Tensor]]
    standardized: bool = False
    relational: bool = False
    weighs: bool = False


DISTILLATION_LOSSES = {
    "published": DistillationLoss("atoms", atom_loss, directions),
    "standardized_atoms": DistillationLoss(
        "atoms", squared_error_of_atoms, as_they_are, standardized=True
    ),
    "standardized_crystals": DistillationLoss(
        "crystals",
        squared_error_of_crystals,
        as_they_are,
        standardized=True,
        weighs=True,
    ),
    "relations_atoms": DistillationLoss(
        "atoms", atom_relations, compared_atoms, standardized=True, relational=True
    ),
    "relations_crystals": DistillationLoss(
        "crystals",
        crystal_relations,
        compared_crystals,
        standardized=True,
        relational=True,
    ),
}
"""Distillation losses by the name that configurations use.

A standardised loss is about 1 for a student that predicts only the means, and 1 - R2
for a better one; relational losses are on the same scale. The published loss is at most
4 / F, about 0.06 at a width of 64, so it weighs little beside the property loss.
"""


def find_loss(name: str) -> DistillationLoss:
    """Return the loss with the given name.

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
    """A student's embedding loss, its weight, and a projector if one is needed.

    The projector is a Linear from the student's width to the teacher's. It is trained
    with the student but is not part of it.

    Weighting. `fixed`: (1 - alpha) P + alpha E, with the property loss P and the
    embedding loss E. `fading`: the same, but alpha falls to 0 along a half cosine by
    the end of the run. `balanced`: the geometric mean P^(1 - alpha) E^alpha. It does
    not depend on the scales or units of the losses, so none must be tuned.

    Source of the geometric mean: S. Chennupati, G. Sistu, S. Yogamani and S. Rawashdeh,
    CVPR Workshops 2019, arXiv:1904.08492.

    Args:
        student_width: F of the student, at the level of the loss.
        teacher_width: F of the teacher, at that level.
        alpha: the share of the embedding loss: 0 ignores the teacher, 1 the labels.
        loss: one of `DISTILLATION_LOSSES`.
        projector: whether to project; None projects except for relations, and for
            `published` with equal widths.
        weighting: see above.

    Attributes:
        level: whether `forward` takes atoms or crystals.
        standardizes: whether it needs the teacher's mean and variance.

    Raises:
        InputError: `alpha` is out of range; `loss` or `weighting` is unknown; or the
            loss needs equal widths, they differ, and `projector` is false.
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
        weighting: str = "fixed",
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise InputError(f"`alpha` is {alpha} but must be in [0, 1]")
        if weighting not in get_args(Weighting):
            known = get_args(Weighting)
            raise InputError(
                f"unknown `weighting` {weighting!r}; choose one of {', '.join(known)}"
                f"{did_you_mean(weighting, known)}"
            )
        found = find_loss(loss)
        differ = student_width != teacher_width and not found.relational
        if projector is False and differ:
            raise InputError(
                f"the teacher gives {teacher_width} numbers for {found.level} but the "
                f"student has {student_width}; set `projector=true`"
            )
        if projector is None:
            # Embeddings may never be negative, but standardised numbers are.
            projector = differ or (found.standardized and not found.relational)
        self.alpha = alpha
        self.weighting = weighting
        self.level: Level = found.level
        self.standardizes = found.standardized
        self._loss = found
        self.projector: nn.Module = (
            nn.Linear(student_width, teacher_width) if projector else nn.Identity()
        )
        # Not saved: every run computes them from the teacher's answers.
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)

    @classmethod
    def between(
        cls,
        student: tuple[int, int],
        teacher: tuple[int | None, int | None],
        loss: str = "published",
        spreads: bool = False,
        **settings: Any,
    ) -> Distillation:
        """Return the distillation with the widths at the level of the loss.

        Args:
            student: the widths of the student's atoms and crystals.
            teacher: those of the teacher; None where it does not answer.
            loss: one of `DISTILLATION_LOSSES`.
            spreads: whether the teacher says how uncertain its answers are.
            settings: see the class.

        Raises:
            InputError: as for the class, the teacher does not answer at that level, or
                the loss cannot weigh its answers.
        """
        level = find_loss(loss).level
        able = [n for n, x in DISTILLATION_LOSSES.items() if x.weighs or not spreads]
        place = ("atoms", "crystals").index(level)
        width = teacher[place]
        if width is None:
            others = [n for n in able if DISTILLATION_LOSSES[n].level != level]
            raise InputError(
                f"`loss` is {loss}, which compares {level}, but the teacher does not "
                f"answer for {level}; choose {' or '.join(others)}"
            )
        if loss not in able:
            raise InputError(
                f"`loss` is {loss}, which cannot weigh answers by their spread, as "
                f"this teacher needs; choose {' or '.join(able)}"
            )
        return cls(student[place], width, loss=loss, **settings)

    def standardize(self, mean: Tensor, variance: Tensor) -> None:
        """Set the mean and the variance of the teacher's answers, (F,) each.

        A number with variance 0 is not scaled; only its mean is subtracted.
        """
        scale = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
        device = next(self.parameters(), mean).device
        self.mean, self.scale = mean.float().to(device), scale.float().to(device)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: CrystalBatch,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the embedding loss; with several ranks this rank's share of it.

        Args:
            student: (N, student width), or (B, ...) at the level `crystals`.
            teacher: (N, teacher width), for the same atoms in the same order.
            batch: the student's batch.
            weights: of the squared error of each number, (B, teacher width); only for
                losses that `weighs`.

        Raises:
            InputError: the teacher answered for other atoms.
        """
        student, teacher = self._both(student, teacher)
        if weights is not None:
            root = weights.to(student.device).sqrt()  # w (s - t)^2 = (r s - r t)^2
            student, teacher = root * student, root * teacher
        return self._loss.distance(student, teacher, batch)

    @torch.no_grad()
    def compared(
        self, student: Tensor, teacher: Tensor, batch: CrystalBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the numbers that the loss compares, (n, F) of student and teacher."""
        return self._loss.compared(*self._both(student, teacher), batch)

    def _both(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return student and teacher in one space and on one scale."""
        projected = self.projector(student)  # (N, F)
        fits = len(projected) == len(teacher) and (
            self._loss.relational or projected.shape == teacher.shape
        )
        if not fits:
            raise InputError(
                f"teacher embeddings are {tuple(teacher.shape)} but this batch "
                f"needs {tuple(projected.shape)}; they belong to other crystals or to "
                "another teacher"
            )
        if self.standardizes:
            if self.mean is None or self.scale is None:
                raise RuntimeError("call `standardize` before the first batch")
            teacher = (teacher.float() - self.mean) * self.scale
        return projected, teacher

    def total(
        self, property_loss: Tensor, embedding_loss: Tensor, done: float = 0.0
    ) -> Tensor:
        """Return one loss; with several ranks this rank's share of it.

        Args:
            property_loss: this rank's share.
            embedding_loss: the same.
            done: the fraction of the run that is done; used by `fading`.
        """
        alpha = self.alpha
        if self.weighting == "balanced" and 0 < alpha < 1:
            shares = torch.stack((property_loss, embedding_loss))
            return geometric_mean(shares, shares.new_tensor([1 - alpha, alpha]))
        if self.weighting == "fading":
            alpha *= 0.5 * (1 + math.cos(math.pi * done))
        return (1 - alpha) * property_loss + alpha * embedding_loss


def agreement(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Return how much of the teacher's knowledge a student has learned.

    Args:
        student: (n, F), the student's numbers that a loss compares.
        teacher: (n, F), those of the teacher.

    Returns:
        `r2`, the share of the teacher's variance over rows that the student explains.
        It is 0 for a student that predicts only the means, less for a worse one, and 0
        if the teacher's answers are all the same. Also `cosine`, the mean over rows, if
        the rows are vectors.
    """
    wrong = (student.double() - teacher.double()).square().sum()
    variance = (teacher.double() - teacher.double().mean(dim=0)).square().sum()
    varies = variance > 1e-12 * teacher.double().square().sum()  # beyond rounding
    found = {"r2": (1 - wrong / variance).item() if varies else 0.0}
    if teacher.shape[1] > 1:
        found["cosine"] = F.cosine_similarity(student, teacher, dim=1).mean().item()
    return found
