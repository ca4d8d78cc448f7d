"""Objective: SimSiam, which predicts one view from the other."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.layers.settings import at_least
from crysdistill.objectives.spread import Standardize
from crysdistill.objectives.two_views import TwoViews

__all__ = ["SimSiam"]


class SimSiam(TwoViews):
    """Predict the projected embedding of one view from that of the other.

    1 - (cos(p_1, z_2) + cos(p_2, z_1)) / 2, with z the projected embeddings and
    p = predictor(z). No gradient flows through z in this formula, and z is standardised
    over the batch; together these two keep the embeddings from collapsing. The loss is
    1 for unrelated views.

    Number: `simsiam_retrieval`; see `TwoViews`.

    Sources: X. Chen and K. He, CVPR 2021, arXiv:2011.10566, Eqs. 1 to 4; for
    crystals, R. Magar, Y. Wang and A. Barati Farimani, npj Comput. Mater. 8, 231
    (2022), doi:10.1038/s41524-022-00921-5 (Crystal Twins).

    Differs from the papers:

    - The loss is 1 plus that of the paper.
    - z is standardised over the batch, in validation as well, without the running
      statistics of a batch norm. Hidden layers have a layer norm, because several batch
      norms in a row amplify rounding errors in small batches.
    - The projector has one hidden layer; the paper has two.

    Args:
        crystal_width: F', the width of crystal embeddings.
        mask_fraction: the chance that an atom is hidden; if it is not 0, at least one
            atom is.
        drop_fraction: the chance that a bond is left out.
        sigma: Å, how far atoms are moved along each axis.
        projected: P, the width of the projected embeddings.
        hidden: the width of the predictor's hidden layer.

    Raises:
        InputError: a setting is out of range, or the two views would be the same.
    """

    name: ClassVar[str] = "simsiam"

    def __init__(
        self,
        crystal_width: int,
        *,
        mask_fraction: float = 0.1,
        drop_fraction: float = 0.1,
        sigma: float = 0.03,
        projected: int = 128,
        hidden: int = 32,
    ) -> None:
        super().__init__(crystal_width, mask_fraction, drop_fraction, sigma)
        at_least(2, projected=projected, hidden=hidden)
        # A bias would have no effect before a standardisation.
        self.projector = nn.Sequential(
            nn.Linear(crystal_width, projected),
            nn.LayerNorm(projected),
            nn.ReLU(),
            nn.Linear(projected, projected, bias=False),
            Standardize(),
        )
        self.predictor = nn.Sequential(
            nn.Linear(projected, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, projected),
        )

    def compare(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the loss of embeddings (B, F')."""
        z = [self.projector(view) for view in (one, two)]  # (B, P) each
        p = [self.predictor(view) for view in z]
        alike = [
            F.cosine_similarity(p[k], z[1 - k].detach()).mean()  # Eqs. 1, 3
            for k in (0, 1)
        ]
        return 1 - (alike[0] + alike[1]) / 2  # Eqs. 2, 4
