"""Metrics that look for the nearest of all validation embeddings, over all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

__all__ = ["NearestIsAlike", "OwnIsBest"]

_AT_ONCE = 1024  # rows of scores, which bounds the memory
_DIGIT = 1 << 20  # a label is two numbers below this, which float32 holds exactly


class _Rows(Metric):
    """Rows of numbers of all batches and ranks.

    Args:
        columns: how many numbers a row has.
    """

    full_state_update = False
    entries: list[Tensor] | Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        # Flat, so that the empty state of a rank without rows concatenates with others.
        self.add_state("entries", [], dist_reduce_fx="cat")

    def _add(self, rows: Tensor) -> None:
        """Add rows, (n, columns)."""
        if not isinstance(self.entries, list):
            raise TypeError("the state is in sync; `unsync` it before `update`")
        self.entries.append(rows.float().reshape(-1))

    def _all(self) -> Tensor:
        """Return all rows, (n, columns)."""
        empty = torch.zeros(0, device=self.device)
        flat = dim_zero_cat(self.entries) if len(self.entries) else empty
        return flat.reshape(-1, self.columns)

    def _unknown(self) -> tuple[Tensor, Tensor]:
        """Return the result of fewer than two rows."""
        undefined = torch.tensor(float("nan"), device=self.device)
        return undefined, undefined


class NearestIsAlike(_Rows):
    """How often the nearest other embedding has the same label, and the chance level.

    Args:
        width: F, of the embeddings.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width + 2)
        self.width = width

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add embeddings (B, F) with labels (B,), leaving out labels below 0."""
        known = labels >= 0
        own = labels[known]
        digits = torch.stack((own // _DIGIT, own % _DIGIT), dim=1).float()  # (n, 2)
        self._add(torch.cat((F.normalize(embeddings[known].float()), digits), dim=1))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return precision@1 and its chance level; NaN for fewer than two entries."""
        rows = self._all()
        if len(rows) < 2:
            return self._unknown()
        x, digits = rows[:, : self.width], rows[:, self.width :].long()
        labels = digits[:, 0] * _DIGIT + digits[:, 1]
        right = (labels[_best(x, x, itself=False)] == labels).sum()
        counts = torch.unique(labels, return_counts=True)[1].double()
        n = len(x)
        # sum_c p_c^2, for drawing without replacement
        chance = (counts * (counts - 1)).sum() / (n * (n - 1))
        return right.double() / n, chance


class OwnIsBest(_Rows):
    """How often a row's own partner gives its highest product, and the chance level.

    Args:
        width: P, of rows and partners.
    """

    def __init__(self, width: int) -> None:
        super().__init__(2 * width)

    def update(self, rows: Tensor, partners: Tensor) -> None:
        """Add rows and their partners, both (n, P)."""
        self._add(torch.cat((rows, partners), dim=1))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the accuracy and its chance level; NaN for fewer than two rows."""
        rows, partners = self._all().chunk(2, dim=1)
        if len(rows) < 2:
            return self._unknown()
        own = torch.arange(len(rows), device=rows.device)
        right = (_best(rows, partners) == own).sum()
        chance = torch.tensor(1 / len(rows), dtype=torch.float64)
        return right.double() / len(rows), chance


def _best(rows: Tensor, others: Tensor, itself: bool = True) -> Tensor:
    """Return for each row which other has the highest product with it, (n,).

    Args:
        rows: (n, F).
        others: (m, F).
        itself: whether row k may choose other k.
    """
    found = []
    for start in range(0, len(rows), _AT_ONCE):
        scores = rows[start : start + _AT_ONCE] @ others.T
        if not itself:
            here = torch.arange(len(scores), device=scores.device)
            scores[here, here + start] = -torch.inf
        found.append(scores.argmax(dim=1))
    return torch.cat(found)
