"""SchNet in the plainest form of its published layout, on the blocks of PyG."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import global_max_pool, global_mean_pool
from torch_geometric.nn.models.schnet import InteractionBlock

from crysdistill.encoders.schnet import SchNet
from crysdistill.graphs.batch import CrystalBatch, distances
from crysdistill.layers.basis import Gaussians

NAMES = {
    "mlp.0": "filter_in",
    "mlp.2": "filter_out",
    "conv.nn.0": "filter_in",
    "conv.nn.2": "filter_out",
    "conv.lin1": "before",
    "conv.lin2": "after",
    "lin": "last",
}
"""Our names for the layers of a PyG block, which holds its filter network twice."""


class PlainSchNet(nn.Module):
    """One filter for each edge, and x' = BN(x + I(x)); the weights of our encoder.

    Args:
        encoder: with a batch norm and without `skip`.
    """

    def __init__(self, encoder: SchNet) -> None:
        super().__init__()
        s = encoder.settings
        self.pool = {"mean": global_mean_pool, "max": global_max_pool}[s["pooling"]]
        self.gaussians = Gaussians(
            0.0, s["cutoff"], s["gaussians"], s["gaussian_width"]
        )
        self.degrees = s["degrees"]
        self.embedding = nn.Linear(encoder.embedding.linear.in_features, s["width"])
        self.blocks = nn.ModuleList(
            InteractionBlock(s["width"], s["gaussians"], s["filters"], s["cutoff"])
            for _ in encoder.convolutions
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(s["width"]) for _ in self.blocks)
        self.embedding.load_state_dict(encoder.embedding.linear.state_dict())
        for theirs, norm, ours in zip(
            self.blocks, self.norms, encoder.convolutions, strict=True
        ):
            for name, own in NAMES.items():
                layer = theirs.get_submodule(name)
                layer.load_state_dict(ours.get_submodule(own).state_dict())
            norm.load_state_dict(ours.norm.state_dict())

    def forward(self, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return atoms (N, F) and crystals (B, F)."""
        length = distances(batch)  # (E,)
        u = self.gaussians(length)  # (E, K)
        x = F.one_hot(batch.atomic_numbers, 101)[:, 1:].to(u.dtype)  # (N, 100)
        if self.degrees:
            raise NotImplementedError("the plain form reads elements only")
        x = F.relu(self.embedding(x))  # (N, F)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x, batch.edge_index, length, u))
        return x, self.pool(x, batch.batch, batch.num_graphs)
