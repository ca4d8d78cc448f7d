"""MPNN in the plainest form of its published layout, on the layers of PyG."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import NNConv, global_mean_pool

from crysdistill.encoders.mpnn import MPNN
from crysdistill.graphs.batch import CrystalBatch, distances
from crysdistill.layers.basis import Gaussians


class PlainMPNN(nn.Module):
    """One matrix for each edge; the weights of our encoder.

    Args:
        encoder: with a batch norm, the mean over atoms, and no `degrees`.
    """

    def __init__(self, encoder: MPNN) -> None:
        super().__init__()
        s = encoder.settings
        width = s["width"]
        self.skip = s["skip"]
        self.gaussians = Gaussians(
            0.0, s["cutoff"], s["gaussians"], s["gaussian_width"]
        )
        self.embedding = nn.Linear(100, width)
        self.embedding.load_state_dict(encoder.embedding.linear.state_dict())
        self.messages, self.norms, self.units = (nn.ModuleList() for _ in range(3))
        for ours in encoder.convolutions:
            network = nn.Sequential(
                nn.Linear(s["gaussians"], s["hidden"]),
                nn.ReLU(),
                nn.Linear(s["hidden"], width * width),
            )
            message = NNConv(width, width, network, aggr="mean")
            # After `NNConv`, because that draws new weights for the network.
            network[0].load_state_dict(ours.message.first.state_dict())
            network[2].load_state_dict(ours.message.second.state_dict())
            message.lin.weight.data.copy_(ours.message.root.weight)
            message.bias.data.copy_(ours.message.root.bias)
            norm, unit = nn.BatchNorm1d(width), nn.GRU(width, width)
            norm.load_state_dict(ours.norm.state_dict())
            unit.load_state_dict(
                {f"{name}_l0": t for name, t in ours.update.state_dict().items()}
            )
            self.messages.append(message)
            self.norms.append(norm)
            self.units.append(unit)

    def forward(self, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return atoms (N, F) and crystals (B, F)."""
        u = self.gaussians(distances(batch))  # (E, K)
        x = F.one_hot(batch.atomic_numbers, 101)[:, 1:].to(u.dtype)  # (N, 100)
        x = F.relu(self.embedding(x))  # (N, F)
        memory = x.unsqueeze(0)
        for message, norm, unit in zip(
            self.messages, self.norms, self.units, strict=True
        ):
            m = F.relu(norm(message(x, batch.edge_index, u)))
            out, memory = unit(m.unsqueeze(0), memory)
            x = out.squeeze(0) + x if self.skip else out.squeeze(0)
        return x, global_mean_pool(x, batch.batch, batch.num_graphs)
