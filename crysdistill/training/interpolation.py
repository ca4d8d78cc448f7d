"""Interpolates between two sets of weights; validation chooses how far."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Shares of the way from start to end; of equally good ones the first is taken."""


@torch.no_grad()
def choose_between(
    model: nn.Module,
    start: Mapping[str, Tensor],
    error: Callable[[], float],
) -> tuple[float, dict[float, float]]:
    """Put the best weights between the start and the end of a run into a model.

    Running statistics of batch norms are interpolated like weights.

    Source: M. Wortsman et al., CVPR 2022, doi:10.1109/CVPR52688.2022.00780, Eq. 1.

    Args:
        model: holds the final weights; afterwards it holds the chosen ones.
        start: its state at the start.
        error: returns the model's validation error.

    Returns:
        The share of the way, and the error at each of `SHARES`.
    """
    end = {n: tensor.to("cpu", copy=True) for n, tensor in model.state_dict().items()}
    errors: dict[float, float] = {}
    for share in SHARES:
        model.load_state_dict(between(start, end, share))
        errors[share] = error()
    best = min(SHARES, key=lambda share: errors[share])  # of equal ones the first
    model.load_state_dict(between(start, end, best))
    return best, errors


def between(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Return (1 - share) start + share end; tensors of integers are those of `end`."""
    return {
        name: torch.lerp(start[name].to(last), last, share)
        if last.is_floating_point()
        else last
        for name, last in end.items()
    }
