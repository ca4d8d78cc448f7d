"""Objective: predict known properties, as ordinary pretraining with labels."""

from __future__ import annotations

from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.objective import Embedded, Objective
from crysdistill.store.store import Store
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Balance, Outputs, check_names
from crysdistill.transfer.scores import Scores
from crysdistill.transfer.targets import Normalizer, Target

__all__ = ["Properties"]


class Properties(Objective):
    """Predict several properties of a crystal from one embedding.

    Labels may be missing; a crystal without any adds nothing. Each target has its own
    scale, fitted on the training crystals. Learned variances balance the losses unless
    a target has a `weight` (`Balance`).

    Numbers: for each target its mean absolute error in its unit, the area under the
    ROC curve for two classes, or the accuracy for more. The chance level answers the
    mean of the training labels, or guesses a class.

    Source: pretraining on several properties at once, S. Deng, J. Park and A. Sy,
    "Transfer Learning and Representations for Material Properties", University of
    California, Berkeley.

    Args:
        crystal_width: F', the width of the crystal embeddings.
        targets: the properties: `name`, `unit`, `task`, `transform`, `weight`.
        hidden: width of the hidden layer above the embedding.

    Raises:
        InputError: there is no target, or one comes twice.
    """

    name: ClassVar[str] = "properties"

    def __init__(
        self,
        crystal_width: int,
        *,
        targets: list[Target],
        hidden: int = 128,
    ) -> None:
        super().__init__()
        targets = [t if isinstance(t, Target) else Target(**t) for t in targets]
        check_names(targets)
        self.targets = targets
        self.columns = tuple(target.name for target in targets)
        self.crystal_width = crystal_width
        self.hidden = hidden
        self.balance = Balance(targets)

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Fit the scale of each target, and make the head for them.

        Raises:
            InputError: the store lacks a property, or no training crystal has one.
        """
        names = np.array(store.material_ids)[rows]
        normalizers = []
        for target in self.targets:
            labels = store.property(target.name)
            target.check(labels, store.material_ids)
            normalizers.append(Normalizer.fit(target, labels[rows], names))
        self.outputs = Outputs(self.targets, normalizers)
        self.head = PropertyHead(
            self.crystal_width, self.hidden, outputs=self.outputs.size
        )
        self.scores = Scores(self.outputs)
        self.by_mean = torch.nn.ModuleList(MeanAbsoluteError() for _ in normalizers)

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return this rank's share of the balanced loss."""
        losses, counts = self.outputs.losses(self._output(seen), self.labels(batch))
        return self.balance(losses, counts)

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        labels = self.labels(batch)
        self.scores.update(self._output(seen), labels)
        for t, (target, scale) in enumerate(
            zip(self.targets, self.outputs.normalizers, strict=True)
        ):
            if not scale.classes:
                truth = labels[~torch.isnan(labels[:, t]), t]
                mean = target.inverse(torch.full_like(truth, scale.mean))
                cast(Metric, self.by_mean[t]).update(mean, truth)

    def compute(self) -> dict[str, float]:
        """Return the number of each target beside its chance level."""
        found = self.scores.compute()
        numbers: dict[str, float] = {}
        for t, (name, kind) in enumerate(
            zip(self.columns, self.scores.kinds, strict=True)
        ):
            chance = 1 / max(2, self.outputs.normalizers[t].classes)
            if kind == "mae":
                chance = float(cast(Metric, self.by_mean[t]).compute())
            numbers[f"{name}_{kind}"] = found[name]
            numbers[f"{name}_{kind}_chance"] = chance
        return numbers

    def _output(self, seen: tuple[Embedded, ...]) -> Tensor:
        return self.head(seen[0].crystals)
