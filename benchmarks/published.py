"""The published layout of CGCNN and CrysGNN in plain PyTorch, for comparison.

This is our own re-implementation of the published computation and of its layout:
neighbours padded to twelve, Gaussians stored per edge, [v_i | v_j | u_ij] concatenated
for every edge, one Linear over all of them, a Python loop over crystals when pooling.
Nothing in the package uses it.

Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
doi:10.1103/PhysRevLett.120.145301, and the code published with it.
"""

from __future__ import annotations

import numpy as np
import torch
from pymatgen.core import Structure
from torch import Tensor, nn


def published_graph(
    structure: Structure, radius: float = 8.0, max_neighbors: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Return neighbours (N, 12) and distances (N, 12) as the published code does."""
    index, distance = [], []
    for neighbors in structure.get_all_neighbors(radius):
        nearest = sorted(neighbors, key=lambda n: n.nn_distance)[:max_neighbors]
        missing = max_neighbors - len(nearest)
        index.append([n.index for n in nearest] + [0] * missing)
        distance.append([n.nn_distance for n in nearest] + [radius + 1.0] * missing)
    return np.array(index), np.array(distance)


def published_gaussians(distance: np.ndarray) -> np.ndarray:
    """Expand distances (..., 12) to (..., 12, 41)."""
    centres = np.arange(0, 8.2, 0.2)
    return np.exp(-((distance[..., None] - centres) ** 2) / 0.2**2)


class PublishedConvolution(nn.Module):
    """Concatenate, one Linear, batch norm, gate, sum, batch norm, softplus."""

    def __init__(self, width: int = 64, basis: int = 41) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(2 * width + basis, 2 * width)
        self.edge_norm = nn.BatchNorm1d(2 * width)
        self.atom_norm = nn.BatchNorm1d(width)
        self.softplus = nn.Softplus()

    def forward(self, x: Tensor, u: Tensor, neighbor: Tensor) -> Tensor:
        """Update atoms (N, F) from edges (N, 12, 41) and neighbours (N, 12)."""
        n, k = neighbor.shape
        z = torch.cat((x.unsqueeze(1).expand(n, k, -1), x[neighbor], u), dim=2)
        z = self.linear(z)  # (N, 12, 2F)
        z = self.edge_norm(z.view(-1, 2 * self.width)).view(n, k, -1)
        gate, core = z.chunk(2, dim=2)
        total = (torch.sigmoid(gate) * self.softplus(core)).sum(dim=1)  # (N, F)
        return self.softplus(x + self.atom_norm(total))


class PublishedCGCNN(nn.Module):
    """Embedding, convolutions, mean pooling by a loop, softplus, two Linears."""

    def __init__(
        self, convolutions: int = 3, width: int = 64, hidden: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(92, width)
        self.convolutions = nn.ModuleList(
            PublishedConvolution(width) for _ in range(convolutions)
        )
        self.conv_to_fc = nn.Linear(width, hidden)
        self.fc_out = nn.Linear(hidden, 1)
        self.softplus = nn.Softplus()

    def forward(
        self, elements: Tensor, u: Tensor, neighbor: Tensor, crystals: list[Tensor]
    ) -> Tensor:
        """Predict (B, 1) from element vectors (N, 92) and the padded graph."""
        x = self.embedding(elements)
        for convolution in self.convolutions:
            x = convolution(x, u, neighbor)
        pooled = torch.cat([x[rows].mean(dim=0, keepdim=True) for rows in crystals])
        hidden = self.softplus(self.conv_to_fc(self.softplus(pooled)))
        return self.fc_out(hidden)
