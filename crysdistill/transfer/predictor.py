"""An encoder with a head: from crystals to a property in its unit."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.ranks import sum_over_ranks
from crysdistill.transfer.freezing import BatchNormPolicy, FrozenStages, freeze
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.targets import Normalizer, Target


class Predictor(nn.Module):
    """What training makes and `predict` needs, in one place.

    Args:
        encoder: gives the embeddings.
        head: gives the output from them.
        target: what the output means.
        normalizer: the scale of the output, fitted on the training crystals.
        graph: the graph that batches must have.

    Raises:
        InputError: the parts do not fit each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: PropertyHead,
        target: Target,
        normalizer: Normalizer,
        graph: GraphSettings,
    ) -> None:
        super().__init__()
        if head.task != target.task:
            raise InputError(
                f"the head is made for {head.task} but `{target.name}` is a target of "
                f"{target.task}"
            )
        if head.settings["width"] != encoder.width:
            raise InputError(
                f"the head's `width` is {head.settings['width']} but the encoder's is "
                f"{encoder.width}"
            )
        self.encoder = encoder
        self.head = head
        self.target = target
        self.normalizer = normalizer
        self.graph = graph
        self.frozen = freeze(encoder, None)

    def embed(self, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return atom embeddings (N, F) and crystal embeddings (B, F)."""
        atoms = self.encoder(batch)
        return atoms, self.encoder.pool(atoms, batch)

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return the raw output of the head.

        Returns:
            (B, 1), transformed and normalised, or (B, 2), logarithms of class
            probabilities.
        """
        return self.head(self.embed(batch)[1], batch.rows)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return how far the output is from the labels; a share of it per rank.

        The mean squared error in the transformed and normalised target, or the mean
        negative log-likelihood, over the labels that are known.

        Args:
            output: what `forward` returned.
            targets: (B, 1) in the target's unit, NaN where not known, as
                `Target.check` accepts them; others make the loss NaN or infinite.

        Returns:
            A scalar; 0 if no label is known.
        """
        known = ~torch.isnan(targets)  # (B, T)
        output = output.float()
        if self.target.task == "classification":
            classes = targets.nan_to_num().long().squeeze(1)  # (B,)
            errors = F.nll_loss(output, classes, reduction="none").unsqueeze(
                1
            )  # (B, 1)
        else:
            wanted = self.normalizer.normalize(self.target.forward(targets))  # (B, T)
            # An unknown label is no error; NaN times 0 would still be NaN.
            errors = (output - torch.where(known, wanted, output)).square()  # (B, T)
        labels = sum_over_ranks(known.sum()).clamp(min=1)
        return (errors * known).sum() / labels

    def interpret(self, output: Tensor) -> Tensor:
        """Turn what `forward` returned into predictions, (B,).

        Returns:
            Values in the target's unit, or probabilities of class 1.
        """
        output = output.float()
        if self.target.task == "classification":
            return output[:, 1].exp()
        return self.target.inverse(self.normalizer.denormalize(output))[:, 0]

    @torch.no_grad()
    def predict(self, batch: CrystalBatch) -> Tensor:
        """Return predictions, (B,), without dropout and batch statistics.

        Returns:
            Values in the target's unit, or probabilities of class 1.
        """
        mode = self.training
        self.eval()
        try:
            return self.interpret(self(batch))
        finally:
            self.train(mode)

    # -------------------------------------------------------------------- freezing

    def freeze(
        self,
        convolutions: int | Literal["all"] | None,
        batch_norm: BatchNormPolicy = "frozen",
    ) -> FrozenStages:
        """Freeze the first stages of the encoder, and release those frozen before.

        See `crysdistill.transfer.freezing.freeze` for arguments and errors.
        """
        self.frozen = freeze(self.encoder, convolutions, batch_norm, self.frozen)
        self.train(self.training)
        return self.frozen

    def frozen_report(self) -> dict[str, Any]:
        """Return what is frozen, in numbers; see `FrozenStages.report`."""
        return self.frozen.report(self)

    def train(self, mode: bool = True) -> Predictor:
        """Set the mode of all but the frozen stages.

        Lightning and others call this at will; what is frozen stays frozen.
        """
        super().train(mode)
        self.frozen.enforce()
        return self
