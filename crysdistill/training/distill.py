"""Distillation: a predictor that also learns what a teacher says of its crystals."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from crysdistill.encoders import Embeddings
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import on_first_rank
from crysdistill.store.store import Store
from crysdistill.teachers import Teacher, TeacherAnswers, answers_for, make_teacher
from crysdistill.training.engine import device_of
from crysdistill.training.loader import ROOM, free_memory
from crysdistill.training.run import Learning, execute
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import EncoderChoice, TrainerSettings
from crysdistill.training.supervised import SupervisedModule
from crysdistill.training.train import TrainConfig, TrainPlan
from crysdistill.transfer.distillation import Distillation
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.seen import Learned
from crysdistill.transfer.weights import Provenance


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """A predictor that also learns what a teacher says of its crystals.

    Args:
        teacher: a weights file; a checkpoint of the published CGCNN; a table of
            embeddings of any model (`crysdistill embed` writes them); `chgnet`; or
            `random` for a teacher that knows nothing (the control that tells knowledge
            from regularisation).
        teacher_encoder: the architecture of a `random` teacher.
        alpha: share of the teacher's loss in the total.
        loss: how the student is compared with the teacher: `published` compares the
            directions of atoms as CrysGNN does; `standardized_atoms` and
            `standardized_crystals` compare numbers on the scale of the teacher's own
            variance.
        projector: map student embeddings through a Linear before comparing; null does
            so where the widths differ.
    """

    out: Path = Path("runs/distill")
    teacher: str
    teacher_encoder: EncoderChoice = field(
        default_factory=lambda: {
            "name": "cgcnn",
            "convolutions": 5,
            "bias": False,
            "normalize": True,
        }
    )
    alpha: float = 0.5
    loss: Literal["published", "standardized_atoms", "standardized_crystals"] = (
        "published"
    )
    projector: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"`alpha` is {self.alpha} but must be between 0 and 1")


class Taught(nn.Module):
    """The teacher's part of the loss: (1 - alpha) * property + alpha * embedding.

    Args:
        distillation: compares the student's embeddings with the teacher's answers.
    """

    answers: TeacherAnswers

    def __init__(self, distillation: Distillation) -> None:
        super().__init__()
        self.distillation = distillation

    def place(self, device: torch.device) -> None:
        """Let the answers be where the student is, if they fit there."""
        if self.answers.nbytes < ROOM * free_memory(device):
            self.answers = self.answers.to(device)

    def losses(
        self, embeddings: Embeddings, batch: CrystalBatch, property_loss: Tensor
    ) -> dict[str, Tensor]:
        """Return the embedding loss and the total, this rank's shares."""
        if self.distillation.level == "crystals":
            student = embeddings.crystals
            known = self.answers.gather_crystals(batch.rows)  # (B, F')
        else:
            student = embeddings.atoms
            known = self.answers.gather_atoms(batch.rows, len(student))  # (N, F)
        known = known.to(student.device, non_blocking=True)
        loss = self.distillation(student, known, batch)
        return {
            "embedding": loss,
            "loss": self.distillation.total(property_loss, loss),
        }


class DistillPlan(TrainPlan):
    """Begin with random weights, beside a teacher that stays as it is."""

    config: DistillConfig
    teacher: Teacher
    taught: Taught

    def before(self) -> Learned | None:
        """Return what is known of the teacher."""
        return self.teacher.learned

    def taught_by(self) -> Provenance | None:
        """Return what the teacher learned from."""
        return self.teacher.provenance

    def open(self) -> Store:
        """Open the dataset, and find the teacher."""
        config = self.config
        store = Store.open(config.dataset)
        self.teacher = make_teacher(
            config.teacher, store, seed=config.seed + 1, encoder=config.teacher_encoder
        )
        return super().open()

    def prepare(self, store: Store, trainer: TrainerSettings) -> Learning:
        """Prepare, and see that the teacher knows all crystals."""
        learning = super().prepare(store, trainer)
        on_first_rank(lambda: self.teacher.prepare(store, self.split.train))
        return learning

    def module(self, predictor: Predictor) -> SupervisedModule:
        """Add the teacher's part of the loss."""
        config, encoder = self.config, predictor.encoder
        self.taught = Taught(
            Distillation.between(
                (encoder.width, encoder.crystal_width),
                (self.teacher.atom_width, self.teacher.crystal_width),
                alpha=config.alpha,
                loss=config.loss,
                projector=config.projector,
            )
        )
        return SupervisedModule(predictor, config.optimizer, self.taught)

    def begin(self, learning: Learning, run: RunDirectory) -> None:
        """Ask the teacher about the training crystals, unless it was asked before."""
        trainer = self.config.trainer
        answers = answers_for(
            self.teacher,
            self.store,
            self.split.train,
            fallback=run.path,
            device=device_of(trainer),
            progress=trainer.progress,
        )
        distillation = self.taught.distillation
        if distillation.standardizes:
            distillation.standardize(*answers.statistics(distillation.level))
        self.taught.answers = answers
        super().begin(learning, run)


def distill(config: DistillConfig) -> Path:
    """Train a predictor that a teacher helps; return the path of its weights file.

    Raises:
        InputError: the dataset, the teacher or a setting cannot be used.
    """
    return execute(DistillPlan(config))
