"""The first vector of each element."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ElementEmbedding(nn.Linear):
    """W row + b for each row of an element table, and the vector of masked atoms.

    Without a token, a masked atom has only the bias, since its row of the table is
    empty. With a token, it has a learned vector of its own, which starts at zero. The
    weights have the names of `nn.Linear`, with `token` beside them.

    Source: the learned mask of W. Hu et al., ICLR 2020, arXiv:1905.12265.

    Args:
        columns: the number of columns in the element table.
        width: F, the width of the result.
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

        Row 0 is for masked atoms.
        """
        rows = super().forward(table)
        if self.token is None:
            return rows
        return torch.cat((self.token.unsqueeze(0), rows[1:]))
