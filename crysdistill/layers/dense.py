"""Linear layers with activations and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.layers.basis import shifted_softplus
from crysdistill.layers.group_norm import NORMS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted_softplus": shifted_softplus,
    "relu": F.relu,
}
"""Activations that may follow a linear layer."""


class Dense(nn.Module):
    """Linear layers, each with activation and then norm.

    Args:
        widths: the widths of the input and of each layer's result.
        activation: one of `ACTIVATIONS`.
        norm: one of `NORMS`.
        skip: whether the input of a layer is added to its output, from the second layer
            on, if the widths agree.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str,
        norm: str = "none",
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.skip = skip
        self.linears = nn.ModuleList(
            nn.Linear(before, after) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(NORMS[norm](after) for after in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, first width) to (rows, last width)."""
        return self.finish(self.linears[0](x))

    def finish(self, x: Tensor) -> Tensor:
        """Continue from the product of the first layer, (rows, second width)."""
        x = self.norms[0](self.activation(x))
        for linear, norm in zip(self.linears[1:], self.norms[1:], strict=True):
            y = norm(self.activation(linear(x)))
            x = x + y if self.skip and x.shape == y.shape else y
        return x
