"""The weighted mean of predictors that predicts validation crystals best."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.scores import Scores

STEPS = 20
"""The steps of the search; shares are multiples of one over at most this number."""


def choose_shares(
    answers: Mapping[str, Tensor], labels: Tensor, outputs: Outputs, steps: int = STEPS
) -> dict[str, float]:
    """Return the share of each predictor in the best mean that a greedy search finds.

    Each step adds the predictor that lowers the error of the mean most; the same one
    may be added again. The best mean of all steps counts, so it is never worse on these
    crystals than the best single predictor. There are few shares to choose, so that a
    hundred crystals are enough.

    Source: R. Caruana et al., Ensemble selection from libraries of models, ICML 2004,
    doi:10.1145/1015330.1015432.

    Args:
        answers: the raw output (n, O) of each predictor, by name.
        labels: (n, T), NaN where not known.
        outputs: the targets that the output columns stand for.
        steps: how many predictors to add.

    Returns:
        Shares that sum to 1, the largest first; predictors without one are left out.
    """
    added: list[str] = []
    total = torch.zeros_like(next(iter(answers.values())))
    best, least = Counter[str](), math.inf
    for count in range(1, steps + 1):
        error = {
            name: _error((total + answer) / count, labels, outputs)
            for name, answer in answers.items()
        }
        name = min(error, key=lambda one: error[one])
        total = total + answers[name]
        added.append(name)
        if error[name] < least or count == 1:
            best, least = Counter(added), error[name]
    return {name: n / best.total() for name, n in best.most_common()}


def _error(answer: Tensor, labels: Tensor, outputs: Outputs) -> float:
    scores = Scores(outputs)
    scores.update(answer, labels)
    error = float(scores.compute()["score"])
    return math.inf if math.isnan(error) else error
