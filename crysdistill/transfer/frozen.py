"""A predictor that trains no network: a readout on frozen embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.transfer.features import CrystalFeatures
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.readouts import READOUTS, GaussianProcess, Logistic, Scaling

LEAST = 10
"""The fewest labels of a target to which a readout is fitted."""


@dataclass(frozen=True)
class Known:
    """Features and labels of some crystals.

    Args:
        features: (n, D), from `CrystalFeatures`.
        labels: (n, T), NaN where not known.
    """

    features: Tensor
    labels: Tensor

    def take(self, places: np.ndarray) -> Known:
        """Return some of the crystals."""
        return Known(self.features[places], self.labels[places])


class FrozenPredictor(nn.Module):
    """A readout for each target on `CrystalFeatures`; fitted, not trained by steps.

    Args:
        encoder: the frozen encoder of the embeddings; None uses the composition only.
        readouts: one for each target, in order; all targets share the features.
        outputs: the targets that the output columns stand for.
        graph: the graph that batches must have.

    Raises:
        InputError: the number of readouts differs from that of the targets.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        readouts: Sequence[GaussianProcess | Logistic],
        outputs: Outputs,
        graph: GraphSettings,
    ) -> None:
        super().__init__()
        if len(readouts) != len(outputs.targets):
            raise InputError(
                f"there are {len(readouts)} readouts for {len(outputs.targets)} targets"
            )
        self.encoder = encoder.eval().requires_grad_(False) if encoder else None
        self.features = CrystalFeatures(encoder)
        self.scaling = Scaling(self.features.width)
        self.readouts = nn.ModuleList(readouts)
        self.outputs = outputs
        self.graph = graph

    @staticmethod
    def read(encoder: Encoder | None, batches: Iterable[CrystalBatch]) -> Known:
        """Return the features and the labels of labelled batches."""
        features = CrystalFeatures(encoder)
        parts = []
        for batch in batches:
            found = _features(encoder, features.to(batch.cell.device), batch)
            parts.append((found.cpu(), batch.targets.cpu()))
        return Known(*(torch.cat(each) for each in zip(*parts, strict=True)))

    @classmethod
    def fit(
        cls,
        encoder: Encoder | None,
        known: Known,
        outputs: Outputs,
        graph: GraphSettings,
        seed: int = 0,
    ) -> FrozenPredictor:
        """Fit readouts to what `read` returned.

        Args:
            encoder: the encoder given to `read`.
            known: features and labels of the training crystals.
            outputs: the targets to predict.
            graph: the graph of the crystals.
            seed: the seed of random choices; see the readouts.

        Raises:
            InputError: a target has fewer than `LEAST` labels.
        """
        scaling = Scaling(known.features.shape[1])
        scaling.fit(known.features)
        x = scaling(known.features)
        readouts = [
            _fit_one(outputs, t, x, known.labels[:, t], seed)
            for t in range(len(outputs.targets))
        ]
        predictor = cls(encoder, readouts, outputs, graph)
        predictor.scaling = scaling
        return predictor

    @classmethod
    def empty(
        cls,
        encoder: Encoder | None,
        readouts: Sequence[Mapping[str, Any]],
        outputs: Outputs,
        graph: GraphSettings,
    ) -> FrozenPredictor:
        """Return a predictor built from `describe_readouts`, without its weights."""
        made = [READOUTS[one["name"]](**one["settings"]) for one in readouts]
        return cls(encoder, made, outputs, graph)

    def describe_readouts(self) -> list[dict[str, Any]]:
        """Return name and settings of each readout, as plain values."""
        names = {kind: name for name, kind in READOUTS.items()}
        return [
            {"name": names[type(one)], "settings": one.settings}  # type: ignore[index]
            for one in self.readouts
        ]

    def train(self, mode: bool = True) -> FrozenPredictor:
        """Stay in eval mode: nothing here learns."""
        return super().train(False)

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return normalised predictions and logits, (B, O); see `Outputs`."""
        return self.read_out(_features(self.encoder, self.features, batch))

    def read_out(self, features: Tensor) -> Tensor:
        """Return the result of `forward`, from `CrystalFeatures` (B, D)."""
        x = self.scaling(features)
        return torch.cat([readout(x) for readout in self.readouts], dim=1)

    def scaled(self, batch: CrystalBatch) -> Tensor:
        """Return the features that the readouts read, (B, D)."""
        return self.scaling(_features(self.encoder, self.features, batch))

    @torch.no_grad()
    def answer(self, batch: CrystalBatch) -> Tensor:
        """Return the result of `forward`; all predictors have this method."""
        return self(batch)


@torch.no_grad()
def _features(
    encoder: Encoder | None, features: CrystalFeatures, batch: CrystalBatch
) -> Tensor:
    if encoder is not None and encoder.training:
        encoder.eval()
    return features(encoder(batch, layers=True) if encoder else None, batch)


def check_enough(name: str, labels: np.ndarray) -> None:
    """Refuse fewer training labels than a readout needs.

    Args:
        name: of the target.
        labels: (B,) of the training crystals, NaN where not known.

    Raises:
        InputError: there are fewer than `LEAST`.
    """
    known = int((~np.isnan(labels)).sum())
    if known < LEAST:
        raise InputError(
            f"`{name}` has {known} training labels but a readout needs at least {LEAST}"
        )


def _fit_one(
    outputs: Outputs, t: int, x: Tensor, labels: Tensor, seed: int
) -> GaussianProcess | Logistic:
    """Fit the readout of target `t` to the crystals whose label is known."""
    target, normalizer = outputs.targets[t], outputs.normalizers[t]
    check_enough(target.name, labels.numpy(force=True))
    known = ~torch.isnan(labels)
    x, labels = x[known], labels[known]
    if normalizer.classes:
        return Logistic.fit(x, labels, normalizer.classes)
    return GaussianProcess.fit(x, normalizer.normalize(target.forward(labels)), seed)
