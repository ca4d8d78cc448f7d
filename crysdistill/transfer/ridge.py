"""Starts a head from a linear fit of the labels to the encoder's embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs

PENALTIES = np.logspace(-3, 5, 17)
"""The penalties to choose from, smallest first, for features of mean variance one."""


@torch.no_grad()
def fit_last_layer(
    head: PropertyHead, outputs: Outputs, embeddings: Tensor, labels: Tensor
) -> None:
    """Fit the last Linear of a head; the layers below stay as they are.

    Numbers are fitted by ridge regression with a penalty chosen by the leave-one-out
    error, classes by logistic regression with a penalty chosen by the cross-validated
    likelihood. Of the penalties within a standard error of the best, the largest is
    taken, because large weights would amplify every step of the encoder. Each target is
    fitted to the crystals that have its label, on its scale of learning.

    Source: the first step of LP-FT, A. Kumar et al., ICLR 2022, arXiv:2202.10054.

    Differs from the paper: hidden layers below, if any, are random.

    Args:
        head: changed in place.
        outputs: the targets that the output columns stand for.
        embeddings: (B, F'), of the training crystals, by the encoder in eval mode.
        labels: (B, T) in the targets' units, NaN where not known.
    """
    features = head.features(embeddings).double().cpu().numpy()  # (B, H)
    known = labels.double().cpu()
    mean = features.mean(axis=0)
    # One scale for all features. Scaling each to unit variance would give features
    # that hardly vary, and their errors, three times larger weights for equal fits.
    scale = float(np.sqrt(features.var(axis=0).mean())) or 1.0
    weights, biases = [], []
    for t, target in enumerate(outputs.targets):
        some = ~torch.isnan(known[:, t]).numpy()
        x, y = (features[some] - mean) / scale, known[some, t]
        normalizer = outputs.normalizers[t]
        if normalizer.classes:
            weight, bias = logistic(x, y.long().numpy())
        else:
            weight, bias = _ridge(x, normalizer.normalize(target.forward(y)).numpy())
        weight = weight / scale  # (outputs of the target, H)
        weights.append(weight)
        biases.append(bias - weight @ mean)
    head.last.weight.copy_(torch.from_numpy(np.concatenate(weights)))
    head.last.bias.copy_(torch.from_numpy(np.concatenate(biases)))


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (1, H) and bias (1,)."""
    from sklearn.linear_model import Ridge, RidgeCV  # takes a second to import

    tried = RidgeCV(PENALTIES, store_cv_results=True).fit(x, y)
    fitted = Ridge(PENALTIES[largest_good(tried.cv_results_)]).fit(x, y)
    return fitted.coef_[None], np.array([fitted.intercept_])


def logistic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (C, H) and biases (C,) of a logistic regression.

    Args:
        x: (n, H) features, of about variance one.
        y: (n,) classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    folds = min(5, int(np.bincount(y).min()))
    strengths = 1 / PENALTIES[::2]

    def choose(tried: dict[str, Any]) -> int:
        scores = [tried[f"split{fold}_test_score"] for fold in range(folds)]
        return largest_good(-np.stack(scores))

    fitted = LogisticRegression(max_iter=1000)
    if folds > 1:
        search = GridSearchCV(
            fitted, {"C": strengths}, scoring="neg_log_loss", cv=folds, refit=choose
        )
        fitted = search.fit(x, y).best_estimator_
    else:  # a class with one crystal: no cross-validation is possible
        fitted.fit(x, y)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # two classes share one line: half of it for each
        return np.concatenate((-weight, weight)) / 2, np.concatenate((-bias, bias)) / 2
    return weight, bias


def largest_good(errors: np.ndarray) -> int:
    """Return the last column whose mean is within a standard error of the best.

    Source: L. Breiman et al., Classification and Regression Trees, 1984, Section 3.4.

    Args:
        errors: (trials, penalties).
    """
    mean = errors.mean(axis=0)
    best = int(mean.argmin())
    limit = mean[best] + errors[:, best].std() / np.sqrt(len(errors))
    return int(np.flatnonzero(mean <= limit)[-1])
