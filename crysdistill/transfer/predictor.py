"""An encoder with a head; predicts properties of crystals in their units."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from crysdistill.encoders import Embeddings, Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.transfer.freezing import BatchNormPolicy, FrozenBlocks, freeze
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.targets import Normalizer, Target


class Predictor(nn.Module):
    """A trained model with all that `predict` needs.

    Args:
        encoder: computes the embeddings.
        head: computes the output from them.
        outputs: the targets that the output columns stand for.
        graph: the graph that batches must have.

    Raises:
        InputError: the parts do not fit each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: PropertyHead,
        outputs: Outputs,
        graph: GraphSettings,
    ) -> None:
        super().__init__()
        if head.settings["width"] != encoder.crystal_width:
            raise InputError(
                f"the head's `width` is {head.settings['width']} but the encoder's is "
                f"{encoder.crystal_width}"
            )
        if head.settings["outputs"] != outputs.size:
            raise InputError(
                f"the head has {head.settings['outputs']} outputs but "
                f"{', '.join(outputs.names)} need {outputs.size}"
            )
        self.encoder = encoder
        self.head = head
        self.outputs = outputs
        self.graph = graph
        self.frozen = freeze(encoder, None)

    @property
    def target(self) -> Target:
        """The target, or the first of several."""
        return self.outputs.targets[0]

    @property
    def normalizer(self) -> Normalizer:
        """The scale of `target`."""
        return self.outputs.normalizers[0]

    def embed(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Return the embeddings of a batch; see `Encoder.forward`."""
        return self.encoder(batch, layers)

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return the raw output of the head, (B, O); see `Outputs`."""
        return self.head(self.encoder(batch).crystals, batch.rows)

    @torch.no_grad()
    def predict(self, batch: CrystalBatch) -> Tensor:
        """Return predictions, without dropout and batch statistics.

        Returns:
            (B,), or (B, T) for several targets: values in the target's unit, the
            probability of class 1 of two, or the most likely of more classes.
        """
        found = self.outputs.predictions(self.answer(batch))  # (B, T)
        return found[:, 0] if found.shape[1] == 1 else found

    def answer(self, batch: CrystalBatch) -> Tensor:
        """Return the raw output (B, O) without dropout and batch statistics."""
        return answered(self, batch)

    # -------------------------------------------------------------------- freezing

    def freeze(
        self,
        convolutions: int | Literal["all"] | None,
        batch_norm: BatchNormPolicy = "frozen",
    ) -> FrozenBlocks:
        """Freeze the encoder's first blocks; first release those frozen before.

        See `crysdistill.transfer.freezing.freeze` for arguments and errors.
        """
        self.frozen = freeze(self.encoder, convolutions, batch_norm, self.frozen)
        self.train(self.training)
        return self.frozen

    def frozen_report(self) -> dict[str, Any]:
        """Return what is frozen, in numbers; see `FrozenBlocks.report`."""
        return self.frozen.report(self)

    def train(self, mode: bool = True) -> Predictor:
        """Set the mode of all blocks that are not frozen.

        Frozen blocks stay frozen, even when Lightning or others call this.
        """
        super().train(mode)
        self.frozen.enforce()
        return self


@torch.no_grad()
def answered(model: nn.Module, batch: CrystalBatch) -> Tensor:
    """Return a model's output in eval mode; restore the mode that it had."""
    mode = model.training
    model.eval()
    try:
        return model(batch)
    finally:
        model.train(mode)
