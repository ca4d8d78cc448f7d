"""Readouts of frozen features: a Gaussian process, or a linear one for classes."""

from __future__ import annotations

import math
from math import pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.transfer.ridge import logistic

SEARCHED = 500
"""Crystals used to optimise the kernel's scales; each step takes cubic time."""

MOST = 5_000
"""The most crystals that a Gaussian process keeps; from more it draws this many."""

_LONGEST = 5.0  # standard deviations; scaled features are clipped to this


class Scaling(nn.Module):
    """Scales features to mean 0 and variance 1 over the crystals of the fit.

    A feature that was constant over them becomes 0 for every crystal.

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
        """Set the mean and variance from features (n, D)."""
        spread = x.double().std(dim=0, correction=0)  # (D,)
        self.mean = x.double().mean(dim=0).float()
        self.scale = torch.where(spread > 1e-6, 1 / spread, 0.0).float()

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled features, (B, D)."""
        return ((x - self.mean) * self.scale).clamp(-_LONGEST, _LONGEST)


class GaussianProcess(nn.Module):
    """Kernel regression with scales that maximise the likelihood of the labels.

    k(x, x') = a (1 + |x - x'|^2 / (2 s l^2))^(-s), plus noise on the labels.

    Source: C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine
    Learning, MIT Press (2006), Eqs. 2.25 and 4.19.

    The distances of features are computed once for all steps of the search;
    scikit-learn computes them in each step.

    Args:
        width: D, of the features.
        crystals: n, the number of crystals that it keeps.
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
        self._factor: Tensor | None = None  # of the kernel, for deviations

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, seed: int) -> GaussianProcess:
        """Learn from scaled features and normalised labels.

        Args:
            x: (n, D).
            y: (n,).
            seed: of the choice of crystals if there are more than `MOST`.
        """
        order = np.random.default_rng(seed).permutation(len(x))[:MOST]
        x, y = x[order], y[order].double()
        process = cls(x.shape[1], len(x))
        process.scales = _likely_scales(x[:SEARCHED].double(), y[:SEARCHED])
        process.known = x.float()
        kernel = process._kernel(x)  # (n, n)
        kernel.diagonal().add_(process.scales[3] + 1e-10)
        factor = torch.linalg.cholesky(kernel)
        process.weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
        return process

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised predictions, (B, 1), for scaled features (B, D)."""
        return (self._kernel(x) @ self.weights)[:, None].float()

    def deviation(self, x: Tensor) -> Tensor:
        """Return normalised standard deviations of labels, noise included, (B, 1).

        Source: Rasmussen and Williams, Eq. 2.26.

        Args:
            x: (B, D) scaled features.
        """
        if self._factor is None or self._factor.device != x.device:
            kernel = self._kernel(self.known)  # (n, n)
            kernel.diagonal().add_(self.scales[3] + 1e-10)
            self._factor = torch.linalg.cholesky(kernel)
        half = torch.linalg.solve_triangular(
            self._factor, self._kernel(x).T, upper=False
        )  # (n, B)
        explained = half.square().sum(dim=0)
        left = (self.scales[0] - explained).clamp(min=0)
        return (left + self.scales[3]).sqrt()[:, None].float()

    def _kernel(self, x: Tensor) -> Tensor:
        square = torch.cdist(x.double(), self.known.double()).square()  # (B, n)
        return _rational(square, self.scales)


def log_likelihood(square: Tensor, y: Tensor, scales: Tensor) -> Tensor:
    """Return the log-likelihood of labels, a scalar.

    Source: Rasmussen and Williams, Eq. 2.30.

    Args:
        square: (n, n) squared distances of the features.
        y: (n,) labels.
        scales: a, l, s and the variance of the noise.
    """
    eye = torch.eye(len(y), dtype=square.dtype)
    kernel = _rational(square, scales) + (scales[3] + 1e-10) * eye
    factor = torch.linalg.cholesky(kernel)
    half = torch.linalg.solve_triangular(factor, y[:, None], upper=False)[:, 0]
    determinant = factor.diagonal().log().sum()
    return -0.5 * half.square().sum() - determinant - 0.5 * len(y) * math.log(2 * pi)


def _likelihood_and_slope(
    square: Tensor, y: Tensor, logarithms: Tensor
) -> tuple[float, Tensor]:
    """Return `log_likelihood` and its derivatives by the logarithms of the scales.

    Autograd gives the same in three times the time.

    Source: Rasmussen and Williams, Eq. 5.9.

    Args:
        square: (n, n) squared distances of the features.
        y: (n,) labels.
        logarithms: (4,) of the scales.
    """
    a, length, s, noise = logarithms.exp()
    ratio = square / (2 * s * length**2)
    logarithm = ratio.log1p()
    kernel = a * (-s * logarithm).exp()
    whole = kernel.clone()
    whole.diagonal().add_(noise + 1e-10)
    factor = torch.linalg.cholesky(whole)
    inverse = torch.cholesky_inverse(factor)
    weights = inverse @ y
    determinant = factor.diagonal().log().sum()
    value = -0.5 * y @ weights - determinant - 0.5 * len(y) * math.log(2 * pi)
    outer = torch.outer(weights, weights) - inverse
    steep = outer * kernel
    share = ratio / (1 + ratio)
    slope = torch.stack(
        [
            steep.sum(),
            2 * s * (steep * share).sum(),
            s * (steep * (share - logarithm)).sum(),
            noise * outer.diagonal().sum(),
        ]
    )
    return float(value), slope / 2


def _rational(square: Tensor, scales: Tensor) -> Tensor:
    """Return the kernel without noise for squared distances."""
    a, length, s, _ = scales
    return a * (1 + square / (2 * s * length**2)) ** -s


def _likely_scales(x: Tensor, y: Tensor) -> Tensor:
    """Return a, l, s and the noise variance that maximise the labels' likelihood."""
    from scipy.optimize import minimize  # takes half a second to import

    square = torch.cdist(x, x).square()  # (n, n)
    far = math.sqrt(x.shape[1])
    start = torch.tensor([1.0, far, 1.0, 0.1], dtype=torch.float64).log()
    bounds = ((1e-2, 1e3), (0.1 * far, 100 * far), (1e-2, 1e3), (1e-5, 10.0))

    def unlikely(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            value, slope = _likelihood_and_slope(square, y, torch.tensor(logarithms))
        except torch.linalg.LinAlgError:  # no Cholesky factor at these scales
            return 1e10, np.zeros(len(logarithms))
        return -value, -slope.numpy()

    limits = [(math.log(low), math.log(high)) for low, high in bounds]
    found = minimize(
        unlikely, start.numpy(), jac=True, method="L-BFGS-B", bounds=limits
    )
    return torch.from_numpy(found.x).exp()


class Logistic(nn.Module):
    """Logistic regression with a cross-validated penalty; see `logistic`.

    Args:
        width: D, of the features.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"width": width, "classes": classes}
        self.linear = nn.Linear(width, classes).requires_grad_(False)

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, classes: int) -> Logistic:
        """Learn from scaled features and classes.

        Args:
            x: (n, D).
            y: (n,) classes.
            classes: C.

        Raises:
            InputError: a class has fewer than two crystals.
        """
        counts = np.bincount(y.numpy().astype(int), minlength=classes)
        if counts.min() < 2:
            raise InputError(
                f"class {counts.argmin()} has {counts.min()} training crystals but "
                "needs at least 2; set `split.stratify=true`, or give more labels"
            )
        weights, biases = logistic(x.double().numpy(), y.numpy().astype(int))
        readout = cls(x.shape[1], classes)
        with torch.no_grad():
            readout.linear.weight.copy_(torch.from_numpy(weights))
            readout.linear.bias.copy_(torch.from_numpy(biases))
        return readout

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) for scaled features (B, D)."""
        return self.linear(x)


READOUTS: dict[str, type[GaussianProcess] | type[Logistic]] = {
    "gaussian_process": GaussianProcess,
    "logistic": Logistic,
}
"""Readouts by the name that weights files use."""
