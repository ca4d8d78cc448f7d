"""CrysXPP's predictor in the plainest form of its published layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainCrysXPP(nn.Module):
    """Atoms after each block, from the published tensors under their published names.

    For each of an atom's twelve edges, the vectors of both atoms and the Gaussians are
    concatenated before one product.

    Args:
        weights: `mask`, `embedding.weight`, `convs.0.fc_full.weight` and so on.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        width, features = weights["embedding.weight"].shape
        full = weights["convs.0.fc_full.weight"].shape[1]
        layers = len([name for name in weights if name.endswith("fc_full.weight")])
        self.mask = nn.Parameter(torch.ones(features))
        self.embedding = nn.Linear(features, width, "embedding.bias" in weights)
        self.convs = nn.ModuleList(_Convolution(width, full) for _ in range(layers))
        own = self.state_dict()
        self.load_state_dict({name: weights.get(name, own[name]) for name in own})

    def forward(
        self, atoms: Tensor, gaussians: Tensor, neighbours: Tensor
    ) -> list[Tensor]:
        """Return the atoms after each block, (N, F) each.

        Args:
            atoms: their element vectors, (N, A).
            gaussians: of edges, (N, 12, K).
            neighbours: (N, 12).
        """
        passed = [self.embedding(atoms * self.mask)]
        for layer in self.convs:
            passed.append(layer(passed[-1], gaussians, neighbours))
        return passed


class _Convolution(nn.Module):
    def __init__(self, width: int, full: int) -> None:
        super().__init__()
        self.fc_full = nn.Linear(full, 2 * width)
        self.bn1 = nn.BatchNorm1d(2 * width)
        self.bn2 = nn.BatchNorm1d(width)

    def forward(self, x: Tensor, gaussians: Tensor, neighbours: Tensor) -> Tensor:
        n, m = neighbours.shape
        own = x.unsqueeze(1).expand(n, m, x.shape[1])
        z = self.fc_full(torch.cat((own, x[neighbours], gaussians), dim=2))
        z = self.bn1(z.view(n * m, -1)).view(n, m, -1)
        gate, core = z.chunk(2, dim=2)
        total = (torch.sigmoid(gate) * F.softplus(core)).sum(dim=1)
        return F.softplus(x + self.bn2(total))
