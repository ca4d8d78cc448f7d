"""Probes: cheap, cross-validated readouts of a property from frozen embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import KFold

from crysdistill.encoders import Encoder
from crysdistill.store.store import Store
from crysdistill.training.loader import BatchLoader, place
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.scores import Scores

FOLDS = 5
HELPFUL = 0.02
"""The gain of a probe, relative, above which fine-tuning is likely to help."""
COMPOSITION, UNTRAINED = "composition", "untrained"
"""Names of the probes that pretrained weights must beat."""
MOST = 2_000
"""The most labelled crystals that a probe uses."""


@dataclass(frozen=True)
class Probed:
    """The result of a probe of one encoder's frozen embeddings.

    Args:
        name: of the encoder.
        score: the mean error over targets and held-out crystals, on a scale where
            guessing gives order one; see `Scores`.
        metrics: the metric of each target by its name, in its unit.
    """

    name: str
    score: float
    metrics: Mapping[str, float]


def probe(
    store: Store,
    rows: np.ndarray,
    outputs: Outputs,
    encoders: Mapping[str, Encoder | None],
    device: torch.device,
    seed: int = 0,
    report: Callable[[Probed], None] = lambda found: None,
) -> list[Probed]:
    """Cross-validate a readout of each encoder's embeddings of labelled crystals.

    The encoders do not change. Do not include the crystals that judge a predictor.

    Args:
        store: the store with the crystals.
        rows: their rows; of more than `MOST`, a random subset is used.
        outputs: the targets to predict.
        encoders: by name; None uses the composition only.
        device: where to compute.
        seed: of the subset and the folds.
        report: is called with each result as soon as it is there.

    Returns:
        A result for each encoder, the best first.
    """
    rows = np.random.default_rng(seed).permutation(rows)[:MOST]
    batches = BatchLoader(store, rows, 256, outputs.names)
    place([batches], device)
    found = []
    for name, encoder in encoders.items():
        if encoder is not None:
            encoder.to(device).eval()
        found.append(_probe(name, encoder, batches, outputs, seed))
        report(found[-1])
    return sorted(found, key=lambda one: one.score)


def _probe(
    name: str,
    encoder: Encoder | None,
    batches: BatchLoader,
    outputs: Outputs,
    seed: int,
) -> Probed:
    scores = Scores(outputs)
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    known = FrozenPredictor.read(encoder, batches)
    for train, held_out in folds.split(np.arange(len(known.labels))):
        predictor = FrozenPredictor.fit(
            encoder, known.take(train), outputs, batches.store.graph, seed
        )
        asked = known.take(held_out)
        scores.update(predictor.read_out(asked.features), asked.labels)
    metrics = scores.compute()
    score = metrics.pop("score")
    return Probed(name, score, metrics)


def advice(looked: Sequence[Probed], best: str | None) -> str:
    """Return a sentence on what the probe's results let one expect.

    Args:
        looked: the probe's results.
        best: the name of the best pretrained encoder; None if there is none.
    """
    score = {one.name: one.score for one in looked}
    if best is None:
        return "no pretrained weights were given: networks are trained from scratch"
    without = min(score[COMPOSITION], score[UNTRAINED])
    gain = 1 - score[best] / without
    if gain > HELPFUL:
        return (
            f"the probe's error with {best} is {gain:.0%} lower than with composition "
            "or an untrained encoder: fine-tuning is likely to help"
        )
    return (
        f"the probe's error with {best} is not clearly lower than with composition or "
        f"an untrained encoder (gain {gain:+.0%}): expect little from fine-tuning"
    )
