"""Distillation: a predictor that also learns a teacher's answers for its crystals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import rich
import torch
from rich.markup import escape
from torch import Tensor, nn

from crysdistill.encoders import Embeddings
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import on_first_rank
from crysdistill.store.store import Store
from crysdistill.teachers import Teacher, TeacherAnswers, answers_for, make_teacher
from crysdistill.training.engine import device_of
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.run import Learning, execute
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import EncoderChoice, TrainerSettings
from crysdistill.training.supervised import SupervisedModule
from crysdistill.training.train import TrainConfig, TrainPlan
from crysdistill.transfer.distillation import Distillation, Weighting, agreement
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.seen import Learned
from crysdistill.transfer.weights import Provenance

HELD_OUT = 256
"""The most held-out crystals that show how much of the teacher was learned.

CHGNet takes a quarter of a minute for them on one core."""

LEARNED = 0.05
"""A student with a larger R2 on them has learned something from its teacher.

A student that predicts only the means has about 0."""


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """A predictor that also learns a teacher's answers for its crystals.

    Args:
        teacher: a weights file; a checkpoint of the published CGCNN; a table of
            embeddings of any model (`crysdistill embed` writes them); `chgnet`;
            `dftd4`, charges and dispersion; `ewald`, the potentials of formal charges;
            `ensemble:FOLDER`, the mean prediction of trained predictors; or `random`
            for random weights, the control that separates knowledge from
            regularisation.
        teacher_encoder: the architecture of a `random` teacher.
        shuffled: give each crystal the answers for another one, the control that keeps
            all of a teacher but what it says of which crystal.
        alpha: share of the teacher's loss in the total.
        weighting: `fixed`; `fading`, where alpha falls to 0 by the end of the run; or
            `balanced`, the geometric mean of both losses, which does not depend on
            their scales. Null takes `balanced`; but `fixed` for `loss=published`, and
            for several targets with learned variances.
        loss: how the student is compared with the teacher: `standardized_atoms` and
            `standardized_crystals` compare numbers on the scale of the teacher's own
            variance; `relations_atoms` and `relations_crystals` compare distances
            within a crystal, and distances and angles between crystals; `published`
            compares the directions of atoms as CrysGNN does, and weighs little.
        projector: map student embeddings through a Linear before comparing; null does
            so except for relations, and for `published` with equal widths.
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
    shuffled: bool = False
    alpha: float = 0.5
    weighting: Weighting | None = None
    loss: Literal[
        "published",
        "standardized_atoms",
        "standardized_crystals",
        "relations_atoms",
        "relations_crystals",
    ] = "standardized_crystals"
    projector: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"`alpha` is {self.alpha} but must be between 0 and 1")
        if self.weighting == "balanced" and not self._has_scale():
            raise InputError(
                "`weighting` is balanced, but the loss of several targets with learned "
                "variances has no fixed scale; give each target a `weight`, or set "
                "`weighting=fixed`"
            )

    def _has_scale(self) -> bool:
        """Return whether the property loss has a fixed scale."""
        weights = [target.weight for target in self.targets]
        return len(weights) < 2 or any(weight is not None for weight in weights)

    @property
    def balance(self) -> Weighting:
        """The weighting, with null replaced by what it stands for."""
        if self.weighting is not None:
            return self.weighting
        return "balanced" if self._has_scale() and self.loss != "published" else "fixed"


class Taught(nn.Module):
    """The teacher's part of the loss.

    Args:
        distillation: compares the student's embeddings with the teacher's answers.

    Attributes:
        done: the fraction of the run that is done.
    """

    answers: TeacherAnswers

    def __init__(self, distillation: Distillation) -> None:
        super().__init__()
        self.distillation = distillation
        self.done = 0.0

    def place(self, device: torch.device) -> None:
        """Move the answers to the student's device, if they fit there."""
        self.answers = self.answers.near(device)

    def losses(
        self, embeddings: Embeddings, batch: CrystalBatch, property_loss: Tensor
    ) -> dict[str, Tensor]:
        """Return this rank's shares of the embedding loss and the total."""
        weights = self.answers.gather_weights(batch.rows)
        loss = self.distillation(*self._both(embeddings, batch), batch, weights)
        return {
            "embedding": loss,
            "loss": self.distillation.total(property_loss, loss, self.done),
        }

    def compared(
        self, embeddings: Embeddings, batch: CrystalBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the numbers that are compared, (n, F) of student and teacher."""
        return self.distillation.compared(*self._both(embeddings, batch), batch)

    def _both(
        self, embeddings: Embeddings, batch: CrystalBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the student's embeddings and the teacher's answers."""
        if self.distillation.level == "crystals":
            student = embeddings.crystals
            known = self.answers.gather_crystals(batch.rows)  # (B, F')
        else:
            student = embeddings.atoms
            known = self.answers.gather_atoms(batch.rows, len(student))  # (N, F)
        return student, known.to(student.device, non_blocking=True)


class DistilledModule(SupervisedModule):
    """Tells the teacher's part of the loss how far the run is."""

    def on_train_batch_start(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Count steps."""
        steps = int(self.trainer.estimated_stepping_batches)
        cast(Taught, self.companion).done = self.trainer.global_step / max(1, steps)


class DistillPlan(TrainPlan):
    """Start with random weights, and learn from a fixed teacher too."""

    config: DistillConfig
    teacher: Teacher
    taught: Taught

    def before(self) -> Learned | None:
        """Return what is known of the teacher."""
        return self.teacher.learned

    def taught_by(self) -> Provenance | None:
        """Return the provenance of the teacher."""
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
        """Prepare the run, and check that the teacher knows all training crystals."""
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
                spreads=self.teacher.spreads,
                projector=config.projector,
                weighting=config.balance,
            )
        )
        return DistilledModule(predictor, config.optimizer, self.taught)

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
        if self.config.shuffled:
            answers = answers.shuffled(self.config.seed)
        self.taught.answers = answers
        super().begin(learning, run)

    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Judge the predictor, and print how much of the teacher it has learned."""
        found = self._agreement(learning.module, run)
        super().judge(learning, run)
        results = json.loads((run.path / "results.json").read_text("utf-8"))
        run.write_json("results.json", {**results, "teacher": found})
        rich.print(escape(_spoken(found)))

    @torch.no_grad()
    def _agreement(
        self, module: L.LightningModule, run: RunDirectory
    ) -> dict[str, Any]:
        """Compare student and teacher on held-out crystals.

        The teacher is asked about them only now, after training.
        """
        assert isinstance(module, SupervisedModule)  # noqa: S101 - for the type checker
        config, taught, device = (
            self.config,
            self.taught,
            device_of(self.config.trainer),
        )
        found: dict[str, Any] = {
            "name": self.teacher.name,
            "loss": config.loss,
            "level": taught.distillation.level,
        }
        rows = np.sort(np.concatenate((self.split.val, self.split.test)))
        rows = rows[self.teacher.knows(self.store, rows)]
        rows = rows[:: -(-len(rows) // HELD_OUT) or 1]  # evenly, from first to last
        try:
            taught.answers = answers_for(
                self.teacher,
                self.store,
                rows,
                fallback=run.path,
                device=device,
                progress=config.trainer.progress,
            )
        except InputError as error:  # the trained student must not be lost
            return {**found, "crystals": 0, "why": str(error)}
        module.to(device).eval()
        taught.place(device)
        loader = BatchLoader(self.store, rows, HELD_OUT)
        place([loader], device)
        pairs = [
            taught.compared(module.predictor.embed(batch), batch) for batch in loader
        ]
        student, teacher = (torch.cat(x).cpu() for x in zip(*pairs, strict=True))
        return {**found, "crystals": len(rows), **agreement(student, teacher)}


def _spoken(found: dict[str, Any]) -> str:
    """Return a line on how much of a teacher was learned."""
    name = found["name"]
    if "r2" not in found:
        return f"{name} as teacher: what was learned is not known ({found['why']})"
    cosine = f", cosine {found['cosine']:.2f}" if "cosine" in found else ""
    line = (
        f"{name} as teacher: R2 {found['r2']:.2f}{cosine} on {found['crystals']:,} "
        f"crystals held out ({found['loss']})"
    )
    if found["r2"] <= LEARNED:
        line += "; the student learned nothing from the teacher"
    return line


def distill(config: DistillConfig) -> Path:
    """Train a predictor with a teacher; return the path of its weights file.

    Raises:
        InputError: the dataset, the teacher or a setting cannot be used.
    """
    return execute(DistillPlan(config))
