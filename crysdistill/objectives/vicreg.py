"""Objective: VICReg, which makes two views alike and spreads the embeddings."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from crysdistill.layers.settings import positive
from crysdistill.objectives.spread import lacking_variance, overlap_of_columns
from crysdistill.objectives.two_views import TwoViews, projector

__all__ = ["VICReg"]


class VICReg(TwoViews):
    """Bring two views together; keep the variance up, the covariances down.

    (lambda s(Z, Z') + mu (v(Z) + v(Z')) + nu (c(Z) + c(Z'))) / (2 mu), with s the mean
    squared difference of the projected embeddings, v the shortfall of their deviation
    from 1 (`lacking_variance`), c their squared covariances (`overlap_of_columns`). It
    is 1 if all embeddings are equal, and with the paper's weights also for unrelated
    views.

    Number: `vicreg_retrieval`; see `TwoViews`.

    Source: A. Bardes, J. Ponce and Y. LeCun, ICLR 2022, arXiv:2105.04906, Eq. 6.

    Differs from the paper:

    - The loss is divided by 2 mu; s is a mean over columns too, whereas Eq. 5 sums.
    - The projector has one hidden layer and no batch norm.

    Args:
        crystal_width: F', the width of crystal embeddings.
        mask_fraction: the chance that an atom is hidden; if it is not 0, at least one
            atom is.
        drop_fraction: the chance that a bond is left out.
        sigma: Å, how far atoms are moved along each axis.
        projected: P, the width of the projected embeddings.
        invariance: lambda, the weight of s.
        variance: mu, the weight of v.
        covariance: nu, the weight of c.

    Raises:
        InputError: a setting is out of range, or the two views would be the same.
    """

    name: ClassVar[str] = "vicreg"

    def __init__(
        self,
        crystal_width: int,
        *,
        mask_fraction: float = 0.1,
        drop_fraction: float = 0.1,
        sigma: float = 0.03,
        projected: int = 128,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__(crystal_width, mask_fraction, drop_fraction, sigma)
        positive(invariance=invariance, variance=variance, covariance=covariance)
        self.weights = invariance, variance, covariance
        self.projector = projector(crystal_width, projected)

    def compare(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the loss of embeddings (B, F')."""
        a, b = self.projector(one), self.projector(two)  # (B, P)
        invariance, variance, covariance = self.weights
        total = invariance * (a - b).square().mean()  # Eq. 5
        total = total + variance * (lacking_variance(a) + lacking_variance(b))
        total = total + covariance * (overlap_of_columns(a) + overlap_of_columns(b))
        return total / (2 * variance)  # Eq. 6
