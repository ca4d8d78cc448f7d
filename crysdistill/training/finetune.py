"""Fine-tuning: a predictor whose encoder starts from pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import rich
import torch
from torch import Tensor

from crysdistill.encoders import Encoder, find_encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.training.anchor import Anchor
from crysdistill.training.interpolation import choose_between
from crysdistill.training.labelled import LabelledConfig, LabelledPlan
from crysdistill.training.pretrained import load_pretrained
from crysdistill.training.run import Learning, execute
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import FreezeSettings
from crysdistill.training.supervised import SupervisedModule
from crysdistill.training.thawing import thaw
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.weights import WeightsHeader, read_header


@dataclass(kw_only=True)
class FinetuneConfig(LabelledConfig):
    """A predictor whose encoder starts from pretrained weights.

    The weights file defines the architecture.

    Args:
        weights: of the pretrained encoder or predictor.
        keep: how many convolutions start from those weights, with the embedding; the
            blocks above get random weights. `all` keeps the whole encoder.
        freeze: which part of the encoder does not learn.
        encoder: settings to change in the pretrained encoder; they must not change the
            shapes of its weights. In a predictor CGCNN averages its atoms unnormalised
            (`normalize: false`), whatever it did in pretraining.
        encoder_lr: learning rate of the pretrained encoder, as a share of
            `optimizer.lr`.
        layer_decay: factor of that rate from each convolution to the one below.
        l2_sp: strength of a penalty on the distance from the pretrained weights, which
            replaces their weight decay; 0 for none (X. Li et al., 2018,
            arXiv:1802.01483).
        interpolate: end with weights between those of the start and of the best epoch,
            chosen by validation; the start is the frozen encoder with the fitted head
            (M. Wortsman et al., 2022, doi:10.1109/CVPR52688.2022.00780).
    """

    out: Path = Path("runs/finetune")
    weights: Path
    keep: int | Literal["all"] = "all"
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    encoder: dict[str, Any] = field(default_factory=dict)
    encoder_lr: float = 1.0
    layer_decay: float = 1.0
    l2_sp: float = 0.0
    interpolate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder_lr > 0:
            raise InputError(f"`encoder_lr` is {self.encoder_lr} but must be positive")
        if not 0 < self.layer_decay <= 1:
            raise InputError(
                f"`layer_decay` is {self.layer_decay} but must be above 0 and at most 1"
            )
        if not self.l2_sp >= 0:
            raise InputError(f"`l2_sp` is {self.l2_sp} but must be at least 0")
        if self.interpolate and self.head.start == "random":
            raise InputError(
                "`interpolate` needs a head that is fitted to the labels at the start; "
                "set `head.start=ridge`"
            )
        frozen = self.freeze.convolutions
        if self.keep != "all" and (
            frozen == "all" or (frozen is not None and frozen > self.keep)
        ):
            raise InputError(
                f"`freeze.convolutions` is {frozen} but `keep` is {self.keep}; "
                "convolutions with random weights must learn: freeze no more than are "
                "kept"
            )


class FinetunePlan(LabelledPlan[FinetuneConfig]):
    """Start with the pretrained weights that `keep` names."""

    share: float | None = None
    begun: dict[str, Tensor]

    def before(self) -> WeightsHeader:
        """Return the header of the pretrained weights."""
        return read_header(self.config.weights)

    def encoder(self, store: Store) -> Encoder:
        """Load the encoder; blocks that are not kept get random weights."""
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
                f"`encoder` changes the shapes of weights in {config.weights}; leave "
                "out settings that do not concern the pooling or the output"
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
        """Freeze blocks, and set the learning rates of the encoder."""
        config = self.config
        freeze = config.freeze
        predictor.freeze(freeze.convolutions, freeze.batch_norm)
        if freeze.thaw is not None:
            thaw(predictor, freeze.thaw, config.trainer.epochs)
        anchor = None
        if config.l2_sp:
            blocks = list(predictor.encoder.blocks())
            kept = None if config.keep == "all" else config.keep + 1
            anchor = Anchor(blocks[:kept], config.l2_sp)
        return SupervisedModule(
            predictor,
            config.optimizer,
            encoder_lr=config.encoder_lr,
            layer_decay=config.layer_decay,
            anchor=anchor,
        )

    def head_start(self) -> Literal["ridge", "random"]:
        """Return `ridge` for `interpolate`, which needs a fitted head at the start."""
        return "ridge" if self.config.interpolate else "random"

    def begin(self, learning: Learning, run: RunDirectory) -> None:
        """Copy the weights at the start, for `interpolate`."""
        super().begin(learning, run)
        if self.config.interpolate:
            state = learning.module.predictor.state_dict()  # type: ignore[union-attr]
            self.begun = {n: tensor.to("cpu", copy=True) for n, tensor in state.items()}

    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Judge the predictor; with `interpolate`, first choose its weights."""
        module = learning.module
        assert isinstance(module, SupervisedModule)  # noqa: S101 - for the type checker
        if self.config.interpolate:
            names = module.predictor.outputs.names
            chosen_by = names[0] if len(names) == 1 else "score"
            sign = -1.0 if learning.mode == "max" else 1.0
            self.share, errors = choose_between(
                module.predictor,
                self.begun,
                lambda: sign * self._predict(module, "val")[chosen_by],
            )
            rich.print(
                f"weights {self.share:.0%} of the way from the start to the best epoch"
                f" ({learning.monitor} there {sign * errors[self.share]:.4g}, at the "
                f"start {sign * errors[0.0]:.4g}, at the end {sign * errors[1.0]:.4g})"
            )
        super().judge(learning, run)

    def notes(self) -> dict[str, Any]:
        """Return the chosen share of the way from start to end."""
        return {} if self.share is None else {"interpolated": self.share}


def finetune(config: FinetuneConfig) -> Path:
    """Train a predictor from pretrained weights; return its weights file's path.

    Raises:
        InputError: the dataset, the weights or a setting cannot be used.
    """
    return execute(FinetunePlan(config))
