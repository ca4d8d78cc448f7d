"""Freezes the first blocks of a pretrained encoder."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError, did_you_mean

BatchNormPolicy = Literal["frozen", "adaptive"]
"""What the batch norms of frozen blocks do; see `freeze`."""


class FrozenBlocks:
    """The blocks of an encoder that `freeze` has frozen.

    Args:
        blocks: the frozen modules.
        convolutions: how many of them are convolutions; None if nothing is frozen.
        batch_norm: the policy.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        convolutions: int | None,
        batch_norm: BatchNormPolicy,
    ) -> None:
        self.blocks = blocks
        self.convolutions = convolutions
        self.batch_norm = batch_norm
        # Parameters that were frozen before stay frozen after `release`.
        self._parameters = [
            parameter
            for block in blocks
            for parameter in block.parameters()
            if parameter.requires_grad
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self.enforce()

    def enforce(self) -> None:
        """Put the blocks back into eval mode after a call of `.train()`.

        Under the policy `adaptive`, only the batch norms follow the mode of the model.
        Dropout and other randomness in a frozen block stay off.
        """
        for block in self.blocks:
            for module in block.modules():
                adapts = self.batch_norm == "adaptive" and isinstance(
                    module, _BatchNorm
                )
                if not adapts:
                    module.training = False

    def release(self) -> None:
        """Make the parameters trainable again, for gradual unfreezing."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._parameters = []
        self.blocks = []
        self.convolutions = None

    def report(self, model: nn.Module) -> dict[str, Any]:
        """Return what is frozen in `model`, in numbers.

        Args:
            model: the encoder, or the predictor that contains it.

        Returns:
            `convolutions` and `batch_norm`, each None if nothing is frozen;
            `frozen_parameters`, `trainable_parameters`, and `fixed_batch_norms`, the
            number of batch norms with fixed running statistics.
        """
        count = {True: 0, False: 0}
        for parameter in model.parameters():
            count[parameter.requires_grad] += parameter.numel()
        norms = sum(
            isinstance(module, _BatchNorm)
            for block in self.blocks
            for module in block.modules()
        )
        return {
            "convolutions": self.convolutions,
            "batch_norm": self.batch_norm if self.blocks else None,
            "frozen_parameters": count[False],
            "trainable_parameters": count[True],
            "fixed_batch_norms": norms if self.batch_norm == "frozen" else 0,
        }


def freeze(
    encoder: Encoder,
    convolutions: int | Literal["all"] | None,
    batch_norm: BatchNormPolicy = "frozen",
    before: FrozenBlocks | None = None,
) -> FrozenBlocks:
    """Freeze the embedding and the first convolutions of an encoder.

    The parameters of batch norms are frozen with their block under either policy. The
    policy concerns their running statistics. `frozen` keeps those of pretraining and
    normalises with them. `adaptive` lets them follow the new data, so the output of a
    frozen block differs from that in pretraining.

    Args:
        encoder: changed in place.
        convolutions: how many to freeze; 0 freezes only the embedding, `all` the whole
            encoder, None nothing.
        batch_norm: the policy.
        before: the blocks that an earlier call froze; they are released first.

    Returns:
        The frozen blocks. Their `enforce` must be called after each `.train()`;
        `Predictor` does so once `Predictor.freeze` was called.

    Raises:
        InputError: the encoder has fewer convolutions, or the policy is unknown.
    """
    policies = get_args(BatchNormPolicy)
    if batch_norm not in policies:
        raise InputError(
            f"`batch_norm` is {batch_norm!r} but must be one of {', '.join(policies)}"
            f"{did_you_mean(str(batch_norm), policies)}"
        )
    blocks = encoder.blocks()
    available = len(blocks.convolutions)
    frozen: list[nn.Module] = []
    count = available if convolutions == "all" else convolutions
    if count is None:
        pass
    elif isinstance(count, bool) or not isinstance(count, int):
        raise InputError(
            f"`convolutions` is {convolutions!r} but must be a number, `all` or None"
        )
    elif not 0 <= count <= available:
        raise InputError(
            f"`convolutions` is {convolutions} but the encoder has {available}; "
            f"freeze 0 to {available} of them, or `all`"
        )
    elif convolutions == "all":
        frozen = list(blocks)  # with the pooling
    else:
        frozen = list(blocks)[: count + 1]
    if before is not None:
        before.release()
    return FrozenBlocks(frozen, count, batch_norm)
