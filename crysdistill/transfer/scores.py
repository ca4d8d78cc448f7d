"""Metrics of predictions: one for each target, and one for all together."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from crysdistill.transfer.outputs import Outputs

WORDS = {"mae": "MAE", "auc": "AUC", "accuracy": "accuracy", "score": "score"}
"""The usual spelling of the metrics."""


def metric_of(classes: int) -> str:
    """Return the metric for a number (0 classes), for two classes, or for more."""
    if not classes:
        return "mae"
    return "auc" if classes == 2 else "accuracy"


class Scores(nn.Module):
    """Metrics of several targets over batches and ranks; unknown labels are left out.

    The metric is the mean absolute error in the target's unit (`mae`) for numbers, the
    area under the ROC curve (`auc`) for two classes, and the share of correct
    predictions (`accuracy`) for more classes.

    With several targets, `score` chooses between epochs. It is the mean over targets of
    an error for which guessing gives a value of order one: the mean absolute error of
    the normalised target, 1 - AUC, or 1 - accuracy.

    Args:
        outputs: the targets that the output columns stand for.
    """

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs
        classes = [one.classes for one in outputs.normalizers]
        self.kinds = [metric_of(count) for count in classes]
        self.metrics = nn.ModuleList(map(_metric, classes))
        # For numbers, also the error on the scale of learning.
        self.scaled = nn.ModuleList(MeanAbsoluteError() for _ in classes)

    @property
    def chooses(self) -> str:
        """The number that chooses the epoch: a single target's metric, or `score`."""
        return self.kinds[0] if len(self.kinds) == 1 else "score"

    def update(self, output: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            output: (B, O), of the head.
            labels: (B, T), NaN where not known.
        """
        found = self.outputs.predictions(output)  # (B, T)
        for t, kind in enumerate(self.kinds):
            known = ~torch.isnan(labels[:, t])
            truth, value = labels[known, t], found[known, t]
            if kind != "mae":
                value = value if kind == "auc" else value.long()
                self._metric(t).update(value, truth.long())
                continue
            self._metric(t).update(value, truth)
            target, scale = self.outputs.targets[t], self.outputs.normalizers[t]
            on_scale = [scale.normalize(target.forward(x)) for x in (value, truth)]
            self._scaled(t).update(*on_scale)

    def compute(self) -> dict[str, float]:
        """Return the metric of each target by its name, and `score`."""
        found = {}
        wrong = []
        for t, kind in enumerate(self.kinds):
            value = float(self._metric(t).compute())
            found[self.outputs.names[t]] = value
            wrong.append(
                float(self._scaled(t).compute()) if kind == "mae" else 1 - value
            )
        return {**found, "score": sum(wrong) / len(wrong)}

    def reset(self) -> None:
        """Forget all batches."""
        for t in range(len(self.kinds)):
            self._metric(t).reset()
            self._scaled(t).reset()

    def _metric(self, t: int) -> Metric:
        return cast(Metric, self.metrics[t])

    def _scaled(self, t: int) -> Metric:
        return cast(Metric, self.scaled[t])


def _metric(classes: int) -> Metric:
    kind = metric_of(classes)
    if kind == "mae":
        return MeanAbsoluteError()
    return (
        BinaryAUROC() if kind == "auc" else MulticlassAccuracy(classes, average="micro")
    )
