"""Fine-tuning: a predictor whose encoder starts from pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from crysdistill.encoders import Encoder, find_encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.training.labelled import LabelledConfig, LabelledPlan
from crysdistill.training.pretrained import load_pretrained
from crysdistill.training.run import execute
from crysdistill.training.settings import FreezeSettings
from crysdistill.training.supervised import SupervisedModule
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.weights import WeightsHeader, read_header


@dataclass(kw_only=True)
class FinetuneConfig(LabelledConfig):
    """A predictor whose encoder starts from pretrained weights.

    The weights file tells the architecture.

    Args:
        weights: of the pretrained encoder or predictor.
        keep: how many convolutions start from those weights, with the embedding; the
            blocks above start anew. `all` keeps the whole encoder.
        freeze: which part of it does not learn.
        encoder: settings of the pretrained encoder that shall differ and leave the
            shapes of its weights as they are. CGCNN averages atoms as they are in a
            predictor (`normalize: false`) whatever it did in pretraining.
        encoder_lr: learning rate of the pretrained encoder, as a share of
            `optimizer.lr`.
    """

    out: Path = Path("runs/finetune")
    weights: Path
    keep: int | Literal["all"] = "all"
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    encoder: dict[str, Any] = field(default_factory=dict)
    encoder_lr: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder_lr > 0:
            raise InputError(f"`encoder_lr` is {self.encoder_lr} but must be positive")
        frozen = self.freeze.convolutions
        if self.keep != "all" and (
            frozen == "all" or (frozen is not None and frozen > self.keep)
        ):
            raise InputError(
                f"`freeze.convolutions` is {frozen} but `keep` is {self.keep}; what "
                "starts anew must learn: freeze no more than is kept"
            )


class FinetunePlan(LabelledPlan[FinetuneConfig]):
    """Begin with pretrained weights, as many of them as are to be kept."""

    def before(self) -> WeightsHeader:
        """Return what the pretrained weights say of themselves."""
        return read_header(self.config.weights)

    def encoder(self, store: Store) -> Encoder:
        """Load the encoder; start what is not kept anew."""
        config = self.config
        source = load_pretrained(config.weights, store)
        settings = find_encoder(source.name).for_properties(source.settings)
        given = dict(config.encoder)
        if given.pop("name", source.name) != source.name:
            raise InputError(
                f"`encoder.name` is {config.encoder['name']} but {config.weights} "
                f"holds a {source.name}; leave it out"
            )
        encoder = make_encoder(source.name, **{**settings, **given})
        fresh = encoder.state_dict()
        kept = source.state_dict()
        if fresh.keys() != kept.keys() or any(
            fresh[name].shape != kept[name].shape for name in kept
        ):
            raise InputError(
                f"`encoder` changes the shapes of weights that {config.weights} holds; "
                "leave out what is not about the pooling or the output"
            )
        if config.keep == "all":
            encoder.load_state_dict(kept)
            return encoder
        blocks, known = encoder.blocks(), source.blocks()
        available = len(blocks.convolutions)
        if not 0 <= config.keep <= available:
            raise InputError(
                f"`keep` is {config.keep} but the encoder has {available} "
                f"convolutions; keep 0 to {available}, or `all`"
            )
        with torch.no_grad():
            for new, old in zip(list(blocks)[: config.keep + 1], known, strict=False):
                new.load_state_dict(old.state_dict())
        return encoder

    def module(self, predictor: Predictor) -> SupervisedModule:
        """Freeze, and let the encoder learn at its own rate."""
        config = self.config
        predictor.freeze(config.freeze.convolutions, config.freeze.batch_norm)
        return SupervisedModule(
            predictor, config.optimizer, encoder_lr=config.encoder_lr
        )


def finetune(config: FinetuneConfig) -> Path:
    """Train a predictor from pretrained weights; return its weights file's path.

    Raises:
        InputError: the dataset, the weights or a setting cannot be used.
    """
    return execute(FinetunePlan(config))
