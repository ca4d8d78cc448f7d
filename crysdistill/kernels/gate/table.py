"""Functions of the distance, read from a table instead of computed for each edge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KNOTS = 16
"""Knots per spacing of the Gaussians."""

REACH = 6.5
"""Widths after the last Gaussian at which the table is zero: exp(-6.5^2) = 4e-19."""


class GaussianTable(nn.Module):
    """Values and slopes of Gaussians at knots, and cubic polynomials between.

    The Gaussians u_k(d) = exp(-((d - mu_k) / spacing)^2), mu_k = 0, spacing, ...,
    cutoff, are smooth on the scale of their spacing. So any W u(d) is read from W times
    the table, four rows for each distance, and costs the same for one Gaussian as for a
    hundred. Between knots the value is a cubic Hermite polynomial. With h the distance
    of knots, its error is below h^4 / 384 times the fourth derivative: 5e-7 for a
    Gaussian of height 1, the same as from rounding a distance to float32. Beyond
    `cutoff` the Gaussians decay, and then all values are zero.

    Args:
        cutoff: Å, the last centre.
        spacing: Å, between centres, and the width of each Gaussian.
    """

    rows: Tensor
    """(2 M, K): value, and slope times the knots' distance, at each knot."""

    def __init__(self, cutoff: float, spacing: float) -> None:
        super().__init__()
        count = round(cutoff / spacing) + 1
        self.step = spacing / KNOTS  # Å
        self.knots = round((count - 1 + REACH) * KNOTS) + 1
        at = torch.arange(self.knots, dtype=torch.float64).unsqueeze(1) / KNOTS
        steps = at - torch.arange(count)  # (M, K)
        values = torch.exp(-steps.square())
        slopes = -2 * steps * values / KNOTS
        rows = torch.stack((values, slopes), dim=1)  # (M, 2, K)
        rows[-1] = 0.0
        self.register_buffer("rows", rows.flatten(0, 1).float(), persistent=False)

    def locate(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first of four rows for each distance, and their weights.

        Args:
            distance: (E,), Å.

        Returns:
            (E,) int64, and (E, 4), with gradients to the distance.
        """
        # In double precision: the place between two knots is a small difference.
        wide = distance if distance.device.type == "mps" else distance.double()
        x = (wide / self.step).clamp(max=self.knots - 1)
        # NaN has no row but must reach the result: the weights carry it.
        first = x.detach().nan_to_num(0.0).floor().clamp(0, self.knots - 2)
        t = x - first
        return 2 * first.long(), hermite(t).to(distance.dtype)

    def excerpt(self, distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that some distances need, and their places in these rows.

        Args:
            distance: (L,), Å, on the CPU.

        Returns:
            (2 M, K), fewer than all; the first of four rows for each distance, (L,);
            and their weights, (L, 4).
        """
        row, weights = self.locate(distance)
        knot = row // 2
        used = torch.zeros(self.knots, dtype=torch.bool)
        used[knot] = used[knot + 1] = True
        rows = self.rows.unflatten(0, (-1, 2))[used].flatten(0, 1)
        return rows, 2 * (used.cumsum(0) - 1)[knot], weights


def hermite(t: Tensor) -> Tensor:
    """Return weights of value, slope, next value and next slope: (E,) to (E, 4)."""
    rest = 1 - t
    return torch.stack(
        (
            (1 + 2 * t) * rest * rest,
            t * rest * rest,
            t * t * (3 - 2 * t),
            -t * t * rest,
        ),
        dim=1,
    )


def read(table: Tensor, row: Tensor, weights: Tensor) -> Tensor:
    """Read a table (2 M, F) at the rows and weights of `locate`: (E, F)."""
    four = row.unsqueeze(1) + torch.arange(4, device=row.device)  # (E, 4)
    return F.embedding_bag(
        four, table, per_sample_weights=weights.to(table.dtype), mode="sum"
    )
