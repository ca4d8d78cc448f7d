"""Keeping the first stages of a pretrained encoder as they are."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError, did_you_mean

BatchNormPolicy = Literal["frozen", "adaptive"]
"""What the batch norms of frozen stages do; see `freeze`."""


class FrozenStages:
    """The stages of an encoder that `freeze` has frozen.

    Args:
        stages: the frozen modules.
        convolutions: how many of them are convolutions; None if nothing is frozen.
        batch_norm: the policy.
    """

    def __init__(
        self,
        stages: list[nn.Module],
        convolutions: int | None,
        batch_norm: BatchNormPolicy,
    ) -> None:
        self.stages = stages
        self.convolutions = convolutions
        self.batch_norm = batch_norm
        # What was frozen before stays so when these stages are released.
        self._parameters = [
            parameter
            for stage in stages
            for parameter in stage.parameters()
            if parameter.requires_grad
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self.enforce()

    def enforce(self) -> None:
        """Put the stages back into eval mode, after something called `.train()`.

        Under the policy `adaptive` the batch norms, and they alone, follow the mode
        of the model: neither dropout nor anything else in a frozen stage is random.
        """
        for stage in self.stages:
            for module in stage.modules():
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
        self.stages = []
        self.convolutions = None

    def report(self, model: nn.Module) -> dict[str, Any]:
        """Return what is frozen in `model`, in numbers.

        Args:
            model: the encoder, or the predictor that contains it.

        Returns:
            `convolutions` and `batch_norm`, each None where nothing is frozen;
            `frozen_parameters`, `trainable_parameters`, and `fixed_batch_norms`:
            those whose running statistics do not move.
        """
        count = {True: 0, False: 0}
        for parameter in model.parameters():
            count[parameter.requires_grad] += parameter.numel()
        norms = sum(
            isinstance(module, _BatchNorm)
            for stage in self.stages
            for module in stage.modules()
        )
        return {
            "convolutions": self.convolutions,
            "batch_norm": self.batch_norm if self.stages else None,
            "frozen_parameters": count[False],
            "trainable_parameters": count[True],
            "fixed_batch_norms": norms if self.batch_norm == "frozen" else 0,
        }


def freeze(
    encoder: Encoder,
    convolutions: int | Literal["all"] | None,
    batch_norm: BatchNormPolicy = "frozen",
    before: FrozenStages | None = None,
) -> FrozenStages:
    """Freeze the embedding and the first convolutions of an encoder.

    The parameters of batch norms are frozen with their stage under either policy.
    The policy is about their running statistics: `frozen` keeps those of pretraining
    and normalises with them; `adaptive` lets them follow the new data, so that a
    frozen stage does not compute what it computed in pretraining.

    Args:
        encoder: changed in place.
        convolutions: how many; 0 freezes the embedding alone, `all` the whole
            encoder, None nothing.
        batch_norm: the policy.
        before: what an earlier call froze; it is released first.

    Returns:
        The frozen stages. Their `enforce` must be called after each `.train()`;
        `Predictor.freeze` sees to that.

    Raises:
        InputError: the encoder has fewer convolutions, or the policy is unknown.
    """
    policies = get_args(BatchNormPolicy)
    if batch_norm not in policies:
        raise InputError(
            f"`batch_norm` is {batch_norm!r} but must be one of {', '.join(policies)}"
            f"{did_you_mean(str(batch_norm), policies)}"
        )
    stages = encoder.stages()
    available = len(stages) - 1
    count = available if convolutions == "all" else convolutions
    if count is None:
        stages = []
    elif isinstance(count, bool) or not isinstance(count, int):
        raise InputError(
            f"`convolutions` is {convolutions!r} but must be a number, `all` or None"
        )
    elif not 0 <= count <= available:
        raise InputError(
            f"`convolutions` is {convolutions} but the encoder has {available}; "
            f"freeze 0 to {available} of them, or `all`"
        )
    else:
        stages = stages[: count + 1]
    if before is not None:
        before.release()
    return FrozenStages(stages, count, batch_norm)
