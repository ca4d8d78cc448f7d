"""Losses balanced without tuning: their geometric mean."""

from __future__ import annotations

import torch
from torch import Tensor

from crysdistill.ranks import sum_over_ranks


def geometric_mean(shares: Tensor, weights: Tensor) -> Tensor:
    """Return this rank's share of the weighted geometric mean of several losses.

    The shares of all ranks add up to it, and so do their gradients. Only the relative
    change of each loss counts, not its scale. A loss of 0 is left out; an objective has
    it if it learns nothing from a batch.

    Source: S. Chennupati, G. Sistu, S. Yogamani and S. Rawashdeh, CVPR Workshops 2019,
    arXiv:1904.08492.

    Args:
        shares: (L,), this rank's shares of losses that are never negative.
        weights: (L,); only their ratios matter.
    """
    whole = sum_over_ranks(shares.detach())  # (L,)
    known = (whole > 0) & (weights > 0)
    whole = torch.where(known, whole, torch.ones_like(whole))
    power = weights * known
    power = power / power.sum().clamp(min=torch.finfo(power.dtype).tiny)
    return (power * whole.log()).sum().exp() * (power * shares / whole).sum()
