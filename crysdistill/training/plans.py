"""What a run on labels can be told: the configurations of its three verbs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from crysdistill.encoders import ENCODERS
from crysdistill.errors import InputError
from crysdistill.schema import Choice
from crysdistill.training.settings import (
    FreezeSettings,
    HeadSettings,
    OptimizerSettings,
    SplitSettings,
    TrainerSettings,
)
from crysdistill.transfer.targets import Target


@dataclass(kw_only=True)
class LabelledConfig:
    """What all runs on labels share.

    Args:
        dataset: a store with the property.
        target: the property: `name`, `unit`, `task`, `transform`.
        out: the run directory.
        head: hidden layers on top of the encoder.
        split: which crystals train, choose and judge.
        optimizer: how weights move.
        trainer: how long and on what.
        seed: of weights, order and dropout.
        resume: go on with an interrupted run.
        overwrite: delete what an earlier run left.
    """

    dataset: Path
    target: Target
    out: Path
    head: HeadSettings = field(default_factory=HeadSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    seed: int = 0
    resume: bool = False
    overwrite: bool = False


@dataclass(kw_only=True)
class TrainConfig(LabelledConfig):
    """A predictor trained on labels alone.

    Args:
        encoder: `name` and the settings of that encoder.
    """

    out: Path = Path("runs/train")
    encoder: Annotated[dict[str, Any], Choice(ENCODERS)] = field(
        default_factory=lambda: {"name": "cgcnn"}
    )


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """A predictor that also learns the atom embeddings of a teacher.

    Args:
        teacher: a weights file, or `random` for a teacher that knows nothing (the
            control that tells knowledge from regularisation).
        teacher_encoder: the architecture of a `random` teacher.
        alpha: share of the embedding loss in the total.
        projector: map student embeddings through a Linear before comparing; needed
            where the widths differ.
    """

    out: Path = Path("runs/distill")
    teacher: str
    teacher_encoder: Annotated[dict[str, Any], Choice(ENCODERS)] = field(
        default_factory=lambda: {
            "name": "cgcnn",
            "convolutions": 5,
            "bias": False,
            "normalize": True,
        }
    )
    alpha: float = 0.5
    projector: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"`alpha` is {self.alpha} but must be between 0 and 1")


@dataclass(kw_only=True)
class FinetuneConfig(LabelledConfig):
    """A predictor whose encoder starts from pretrained weights.

    The weights file tells the architecture.

    Args:
        weights: of the pretrained encoder or predictor.
        freeze: which part of it keeps its weights.
        normalize: average unit vectors, as CrysGNN's decoders are given; otherwise
            atom embeddings are averaged as they are, as CGCNN's head expects.
        encoder_lr: learning rate of the pretrained part, as a share of `optimizer.lr`.
    """

    out: Path = Path("runs/finetune")
    weights: Path
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    normalize: bool = False
    encoder_lr: float = 0.3

    def __post_init__(self) -> None:
        if not self.encoder_lr > 0:
            raise InputError(f"`encoder_lr` is {self.encoder_lr} but must be positive")
