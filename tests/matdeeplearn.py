"""What tests of MatDeepLearn's published outputs share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.layers.atoms import AtomEmbedding
from crysdistill.layers.basis import Gaussians
from tests.reference_outputs import Reference


def head(weights: dict[str, Tensor], pooled: Tensor, layers: int = 2) -> list[Tensor]:
    """Return the input of the last layer, and the outputs (B,)."""
    for k in range(layers):
        name = f"post_lin_list.{k}"
        pooled = F.relu(
            F.linear(pooled, weights[f"{name}.weight"], weights[f"{name}.bias"])
        )
    last = F.linear(pooled, weights["lin_out.weight"], weights["lin_out.bias"])
    return [pooled, last.squeeze(1)]


def check_features(reference: Reference, embedding: AtomEmbedding) -> None:
    """Check that our features equal the inputs of the published program.

    Args:
        reference: its edges belong to the atom whose neighbours were searched.
        embedding: with the published weights.
    """
    _, inputs, _, batch = reference
    given = F.linear(inputs["x"], embedding.linear.weight, embedding.linear.bias)
    # Our graphs have no edge from an atom to itself.
    found = embedding(without_loops(batch))
    torch.testing.assert_close(found, given, rtol=0, atol=1e-5)
    length = inputs["edge_weight"]
    longest = length.max().item()
    gaussians = Gaussians(0.0, longest, 50, longest * 0.2 * math.sqrt(2))
    torch.testing.assert_close(
        gaussians(length), inputs["edge_attr"], rtol=0, atol=1e-5
    )


def without_loops(batch: CrystalBatch) -> CrystalBatch:
    """Return the atoms and their numbers of edges, each reduced by one."""
    counts = batch.neighbor_ptr.diff() - 1
    ptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return CrystalBatch(atomic_numbers=batch.atomic_numbers, neighbor_ptr=ptr)


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
