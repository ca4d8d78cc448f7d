"""Terms against collapse: how far, and along how many axes, embeddings spread.

Every function takes the rows of all ranks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Standardize", "lacking_variance", "overlap_of_columns", "standardized"]

# A column that hardly varies in this batch must not cause large steps, and rounding
# must not determine its values.
_LEAST = 1e-3
_LEAST_OF_HINGE = 1e-4  # epsilon of VICReg, Eq. 2


def standardized(x: Tensor) -> Tensor:
    """Return rows with mean 0 and variance 1 in each column; (n, F).

    Columns with a variance below about 10^-3 end below 1. A single row becomes zeros.
    """
    centred = x - x.mean(dim=0)
    return centred / (centred.square().mean(dim=0) + _LEAST).sqrt()


class Standardize(nn.Module):
    """A batch norm without weights or running statistics; see `standardized`."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardise rows (n, F)."""
        return standardized(x)


def lacking_variance(x: Tensor) -> Tensor:
    """Return how much the deviation of each column falls short of 1, averaged.

    v = mean_j max(0, 1 - sqrt(Var(x_j) + epsilon)), between 0 and 1.

    Source: A. Bardes, J. Ponce and Y. LeCun, ICLR 2022, arXiv:2105.04906, Eqs. 1, 2.

    Args:
        x: (n, F).
    """
    centred = x - x.mean(dim=0)
    variance = centred.square().sum(dim=0) / max(1, len(x) - 1)  # (F,)
    return F.relu(1 - (variance + _LEAST_OF_HINGE).sqrt()).mean()


def overlap_of_columns(x: Tensor) -> Tensor:
    """Return the sum of squared covariances of different columns, over F.

    c = (1 / F) sum_{i != j} C_ij^2.

    Source: A. Bardes, J. Ponce and Y. LeCun, ICLR 2022, arXiv:2105.04906, Eqs. 3, 4.

    Args:
        x: (n, F).
    """
    centred = x - x.mean(dim=0)
    covariance = centred.T @ centred / max(1, len(x) - 1)  # (F, F)
    squares = covariance.square()
    return (squares.sum() - squares.diagonal().sum()) / x.shape[1]
