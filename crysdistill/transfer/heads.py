"""From crystal embeddings to a property."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.randomness import per_crystal_uniform
from crysdistill.layers.basis import shifted_softplus

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "shifted_softplus": shifted_softplus,
    "relu": F.relu,
    "silu": F.silu,
}
"""Activations by the name that configurations and weights files use."""

CLASSIFIER_DROPOUT = 0.5
"""The dropout rate after a classifier's first hidden layer in the published CGCNN."""


class PropertyHead(nn.Module):
    """Hidden layers between the embedding of a crystal and its properties.

    The default is the head of CGCNN: softplus, then Linear and softplus for each hidden
    layer, then a last Linear. Other encoders define theirs in `Encoder.HEAD`.

    Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
    doi:10.1103/PhysRevLett.120.145301, and the code published with it, which has the
    softplus before the first layer.

    Args:
        width: F', of the crystal embeddings.
        hidden: width of the hidden layers.
        layers: how many hidden layers; 0 leaves only the last Linear.
        outputs: O, numbers per crystal; see `Outputs`.
        activation: after each hidden layer.
        first: whether the activation also comes before the first layer.
        dropout: the share of values dropped after the first hidden layer.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        width: int,
        hidden: int = 128,
        layers: int = 1,
        outputs: int = 1,
        activation: Literal[
            "softplus", "shifted_softplus", "relu", "silu"
        ] = "softplus",
        first: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("hidden", hidden), ("outputs", outputs)):
            if value < 1:
                raise InputError(f"`{name}` is {value} but must be at least 1")
        if layers < 0:
            raise InputError(f"`layers` is {layers} but must be at least 0")
        if not 0 <= dropout < 1:
            raise InputError(f"`dropout` is {dropout} but must be in [0, 1)")
        if activation not in ACTIVATIONS:
            raise InputError(
                f"`activation` is {activation!r} but must be one of "
                f"{', '.join(ACTIVATIONS)}{did_you_mean(activation, ACTIVATIONS)}"
            )
        self.settings: dict[str, Any] = {
            "width": width,
            "hidden": hidden,
            "layers": layers,
            "outputs": outputs,
            "activation": activation,
            "first": first,
            "dropout": dropout,
        }
        self.activation = ACTIVATIONS[activation]
        self.activates_first = first
        self.dropout = dropout
        if layers:
            self.first = nn.Linear(width, hidden)
        self.middle = nn.ModuleList(
            nn.Linear(hidden, hidden) for _ in range(layers - 1)
        )
        self.last = nn.Linear(hidden if layers else width, outputs)

    def forward(self, crystal_embeddings: Tensor, rows: Tensor | None = None) -> Tensor:
        """Map crystal embeddings to outputs.

        Args:
            crystal_embeddings: (B, F').
            rows: (B,) rows of the crystals in their store. With them, dropout depends
                only on torch's seed and the crystal, not on the batch or the rank.

        Returns:
            (B, O).
        """
        return self.last(self.features(crystal_embeddings, rows))

    def features(
        self, crystal_embeddings: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Return the input of the last Linear: (B, hidden), or (B, F') if none."""
        x = crystal_embeddings
        if self.activates_first:
            x = self.activation(x)
        if self.settings["layers"]:
            x = self.activation(self.first(x))  # (B, hidden)
            if self.training and self.dropout:
                x = self._drop(x, rows)
        for layer in self.middle:
            x = self.activation(layer(x))
        return x

    def _drop(self, x: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return F.dropout(x, self.dropout)
        draw = per_crystal_uniform(rows, x.shape[1], torch.initial_seed(), "dropout")
        return x * (draw >= self.dropout) / (1 - self.dropout)
