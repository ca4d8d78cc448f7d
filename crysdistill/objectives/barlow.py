"""Objective: Barlow twins of crystals."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from crysdistill.layers.settings import positive
from crysdistill.objectives.spread import standardized
from crysdistill.objectives.two_views import TwoViews, projector

__all__ = ["Barlow"]


class Barlow(TwoViews):
    """Correlate each number of one view with itself in the other, and with no other.

    C are the correlations (P, P) of the projected embeddings over the crystals of a
    batch. The loss is (1 / P) (sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2):
    about 1 for unrelated views.

    Number: `barlow_retrieval`; see `TwoViews`.

    Sources: J. Zbontar et al., ICML 2021, arXiv:2103.03230, Eqs. 1 and 2; for
    crystals, R. Magar, Y. Wang and A. Barati Farimani, npj Comput. Mater. 8, 231
    (2022), doi:10.1038/s41524-022-00921-5 (Crystal Twins).

    Differs from the papers:

    - The loss is divided by P.
    - The projector has one hidden layer and no batch norm.

    Args:
        crystal_width: F', the width of crystal embeddings.
        mask_fraction: the chance that an atom is hidden; if it is not 0, at least one
            atom is.
        drop_fraction: the chance that a bond is left out.
        sigma: Å, how far atoms are moved along each axis.
        projected: P, the width of the projected embeddings.
        redundancy: lambda, the weight of correlations between different numbers.

    Raises:
        InputError: a setting is out of range, or the two views would be the same.
    """

    name: ClassVar[str] = "barlow"

    def __init__(
        self,
        crystal_width: int,
        *,
        mask_fraction: float = 0.1,
        drop_fraction: float = 0.1,
        sigma: float = 0.03,
        projected: int = 128,
        redundancy: float = 0.0051,
    ) -> None:
        super().__init__(crystal_width, mask_fraction, drop_fraction, sigma)
        positive(redundancy=redundancy)
        self.redundancy = redundancy
        self.projector = projector(crystal_width, projected)

    def compare(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the loss of embeddings (B, F')."""
        a, b = (standardized(self.projector(view)) for view in (one, two))  # (B, P)
        correlations = a.T @ b / len(a)  # (P, P), Eq. 2
        itself = correlations.diagonal()
        others = correlations.square().sum() - itself.square().sum()
        total = (1 - itself).square().sum() + self.redundancy * others  # Eq. 1
        return total / len(itself)
