"""Learners on frozen features: a Gaussian process for numbers, a line for classes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    ConstantKernel,
    RationalQuadratic,
    WhiteKernel,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from torch import Tensor, nn

from crysdistill.errors import InputError

SEARCHED = 1_000
"""Crystals on which the scales of the kernel are searched: each step is cubic."""

MOST = 5_000
"""Crystals that a Gaussian process remembers; of more, it remembers so many."""

_LONGEST = 5.0  # standard deviations; further out a feature says nothing more


class Scaling(nn.Module):
    """Brings features to mean 0 and variance 1 over the crystals that it was fitted to.

    A feature that was the same for all of them becomes 0 for every crystal.

    Args:
        width: D.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.zeros(width))

    def fit(self, x: Tensor) -> None:
        """Take mean and variance of features (n, D)."""
        spread = x.double().std(dim=0, correction=0)  # (D,)
        self.mean = x.double().mean(dim=0).float()
        self.scale = torch.where(spread > 1e-6, 1 / spread, 0.0).float()

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled features, (B, D)."""
        return ((x - self.mean) * self.scale).clamp(-_LONGEST, _LONGEST)


class GaussianProcess(nn.Module):
    """Kernel regression whose scales maximise the likelihood of the labels.

    k(x, x') = a (1 + |x - x'|^2 / (2 s l^2))^(-s), plus noise on the labels.

    Source: C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine
    Learning, MIT Press (2006), Eqs. 2.25 and 4.19; scikit-learn finds the scales.

    Args:
        width: D, of the features.
        crystals: n, how many it remembers.
    """

    known: Tensor
    weights: Tensor
    scales: Tensor

    def __init__(self, width: int, crystals: int) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"width": width, "crystals": crystals}
        self.register_buffer("known", torch.zeros(crystals, width))
        self.register_buffer("weights", torch.zeros(crystals, dtype=torch.float64))
        # a, l, s and the variance of the noise.
        self.register_buffer("scales", torch.ones(4, dtype=torch.float64))

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, seed: int) -> GaussianProcess:
        """Learn from scaled features and normalised labels.

        Args:
            x: (n, D).
            y: (n,).
            seed: of the choice of crystals where there are more than `MOST`.
        """
        order = np.random.default_rng(seed).permutation(len(x))[:MOST]
        x, y = x[order], y[order].double()
        process = cls(x.shape[1], len(x))
        process.scales = _likely_scales(x[:SEARCHED].numpy(), y[:SEARCHED].numpy())
        process.known = x.float()
        kernel = process._kernel(x)  # (n, n)
        kernel.diagonal().add_(process.scales[3] + 1e-10)
        factor = torch.linalg.cholesky(kernel)
        process.weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
        return process

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised predictions, (B, 1), for scaled features (B, D)."""
        return (self._kernel(x) @ self.weights)[:, None].float()

    def _kernel(self, x: Tensor) -> Tensor:
        a, length, s, _ = self.scales
        square = torch.cdist(x.double(), self.known.double()).square()  # (B, n)
        return a * (1 + square / (2 * s * length**2)) ** -s


def _likely_scales(x: np.ndarray, y: np.ndarray) -> Tensor:
    """Return a, l, s and the variance of the noise."""
    far = float(np.sqrt(x.shape[1]))
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RationalQuadratic(
        far, 1.0, (0.1 * far, 100 * far), (1e-2, 1e3)
    ) + WhiteKernel(0.1, (1e-5, 10.0))
    with warnings.catch_warnings():
        # At a bound the kernel is a simpler one, which is no fault.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = GaussianProcessRegressor(kernel).fit(x.astype(np.float64), y).kernel_
    a, rational, noise = found.k1.k1, found.k1.k2, found.k2
    return torch.tensor(
        [
            a.constant_value,
            rational.length_scale,
            rational.alpha,
            noise.noise_level,
        ],
        dtype=torch.float64,
    )


class Logistic(nn.Module):
    """Logistic regression; five-fold cross-validation chooses its penalty.

    Args:
        width: D, of the features.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"width": width, "classes": classes}
        self.linear = nn.Linear(width, classes).requires_grad_(False)

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, classes: int, seed: int) -> Logistic:
        """Learn from scaled features and classes.

        Args:
            x: (n, D).
            y: (n,) classes.
            classes: C.
            seed: of the folds.

        Raises:
            InputError: a class has fewer than two crystals.
        """
        counts = np.bincount(y.numpy().astype(int), minlength=classes)
        if counts.min() < 2:
            raise InputError(
                f"class {counts.argmin()} has {counts.min()} training crystals but "
                "needs at least 2; set `split.stratify=true`, or give more labels"
            )
        folds = StratifiedKFold(
            int(min(5, counts.min())), shuffle=True, random_state=seed
        )
        penalties = {"C": np.logspace(-4, 1, 6)}
        search = GridSearchCV(
            LogisticRegression(max_iter=2_000),
            penalties,
            scoring="neg_log_loss",
            cv=folds,
        )
        search.fit(x.double().numpy(), y.numpy().astype(int))
        found = search.best_estimator_
        readout = cls(x.shape[1], classes)
        weights, start = found.coef_, found.intercept_
        if classes == 2:  # scikit-learn has a row for class 1 alone
            weights = np.concatenate([np.zeros_like(weights), weights])
            start = np.concatenate([np.zeros_like(start), start])
        with torch.no_grad():
            readout.linear.weight.copy_(torch.from_numpy(weights))
            readout.linear.bias.copy_(torch.from_numpy(start))
        return readout

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) for scaled features (B, D)."""
        return self.linear(x)


READOUTS: dict[str, type[GaussianProcess] | type[Logistic]] = {
    "gaussian_process": GaussianProcess,
    "logistic": Logistic,
}
"""Readouts by the name that weights files use."""
