"""The first vector of each element."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ElementEmbedding(nn.Linear):
    """W row + b for each row of an element table, and what a hidden element is.

    Without a token a masked atom has the bias alone, since its row of the table is
    empty. With one it has a vector of its own, which learns and starts at zero. The
    weights are called as those of `nn.Linear`, with `token` beside them.

    Source: the learned mask of W. Hu et al., ICLR 2020, arXiv:1905.12265.

    Args:
        columns: of the element table.
        width: F, of the result.
        bias: whether there is a b.
        token: whether a masked atom has its own vector.
    """

    token: nn.Parameter | None

    def __init__(
        self, columns: int, width: int, bias: bool = True, token: bool = False
    ) -> None:
        super().__init__(columns, width, bias)
        self.token = nn.Parameter(torch.zeros(width)) if token else None

    def forward(self, table: Tensor) -> Tensor:
        """Embed the rows of an element table: (elements, columns) to (elements, F).

        Row 0 is that of a masked atom.
        """
        rows = super().forward(table)
        if self.token is None:
            return rows
        return torch.cat((self.token.unsqueeze(0), rows[1:]))
