"""A penalty on the distance from pretrained weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crysdistill.ranks import world_size


class Anchor(nn.Module):
    """L2-SP: strength / 2 * |w - w0|^2, with the starting point w0 as the anchor.

    The penalty replaces weight decay for these weights.

    Source: X. Li, Y. Grandvalet and F. Davoine, ICML 2018, arXiv:1802.01483, Eq. 2,
    whose second term, on the head, is the optimizer's weight decay here.

    Args:
        blocks: their present weights become the anchor.
        strength: alpha of the paper.
    """

    def __init__(self, blocks: Sequence[nn.Module], strength: float) -> None:
        super().__init__()
        self.strength = strength
        # A tuple hides them from `parameters()`: they belong to the encoder.
        self.held = tuple(p for block in blocks for p in block.parameters())
        for number, parameter in enumerate(self.held):
            # Not saved: a resumed run starts from the same weights file.
            self.register_buffer(
                f"start_{number}", parameter.detach().clone(), persistent=False
            )

    def forward(self) -> Tensor:
        """Return this rank's share of the penalty; all ranks have the same weights."""
        squares = [
            (parameter - start).square().sum()
            for parameter, start in zip(self.held, self.buffers(), strict=True)
        ]
        return self.strength / 2 * torch.stack(squares).sum() / world_size()
