"""From crystal embeddings to a property."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.randomness import per_crystal_uniform
from crysdistill.transfer.targets import TASKS


class PropertyHead(nn.Module):
    """The head of CGCNN.

    softplus, then Linear and softplus for each hidden layer, then a last Linear. A
    classifier drops out after the first hidden layer and ends with the logarithms of
    the class probabilities.

    Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
    doi:10.1103/PhysRevLett.120.145301, and the code published with it, where the
    softplus before the first layer stands.

    Args:
        width: F, of the crystal embeddings.
        hidden: width of the hidden layers.
        layers: how many hidden layers.
        outputs: numbers per crystal; None for 1, or 2 classes.
        task: what the outputs mean.
        dropout: the share of dropped values; None for 0, or 0.5 in a classifier.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        width: int,
        hidden: int = 128,
        layers: int = 1,
        outputs: int | None = None,
        task: Literal["regression", "classification"] = "regression",
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise InputError(
                f"`task` is {task!r} but must be one of {', '.join(TASKS)}"
                f"{did_you_mean(str(task), TASKS)}"
            )
        classifies = task == "classification"
        if outputs is None:
            outputs = 2 if classifies else 1
        if dropout is None:
            dropout = 0.5 if classifies else 0.0
        for name, value in (("width", width), ("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise InputError(f"`{name}` is {value} but must be at least 1")
        least = 2 if classifies else 1
        if outputs < least:
            raise InputError(f"`outputs` is {outputs} but must be at least {least}")
        if not 0 <= dropout < 1:
            raise InputError(f"`dropout` is {dropout} but must be in [0, 1)")
        self.task = task
        self.settings: dict[str, Any] = {
            "width": width,
            "hidden": hidden,
            "layers": layers,
            "outputs": outputs,
            "task": task,
            "dropout": dropout,
        }
        self.first = nn.Linear(width, hidden)
        self.dropout = dropout
        self.middle = nn.ModuleList(
            nn.Linear(hidden, hidden) for _ in range(layers - 1)
        )
        self.last = nn.Linear(hidden, outputs)

    def forward(self, crystal_embeddings: Tensor, rows: Tensor | None = None) -> Tensor:
        """Map crystal embeddings to outputs.

        Args:
            crystal_embeddings: (B, F).
            rows: (B,) rows of the crystals in their store. With them, what is dropped
                depends on torch's seed and the crystal alone: not on the batch around
                it, nor on the rank that has it.

        Returns:
            (B, outputs).
        """
        x = F.softplus(self.first(F.softplus(crystal_embeddings)))  # (B, hidden)
        if self.training and self.dropout:
            x = self._drop(x, rows)
        for layer in self.middle:
            x = F.softplus(layer(x))
        x = self.last(x)  # (B, outputs)
        return F.log_softmax(x, dim=1) if self.task == "classification" else x

    def _drop(self, x: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return F.dropout(x, self.dropout)
        draw = per_crystal_uniform(rows, x.shape[1], torch.initial_seed(), "dropout")
        return x * (draw >= self.dropout) / (1 - self.dropout)
