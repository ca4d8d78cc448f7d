"""How far fine-tuning moved an encoder: its weights, and what its blocks answer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch


def block_names(encoder: Encoder) -> list[str]:
    """Return names for the blocks of an encoder, in their order."""
    blocks = encoder.blocks()
    convolutions = range(1, len(blocks.convolutions) + 1)
    pooling = [] if blocks.pooling is None else ["pooling"]
    return ["embedding", *(f"convolution {k}" for k in convolutions), *pooling]


def weight_drift(before: Encoder, after: Encoder) -> dict[str, float]:
    """Return |after - before| / |before| of the weights of each block.

    Running statistics of batch norms do not count: they are no weights.

    Args:
        before: the pretrained encoder.
        after: the same architecture, fine-tuned.

    Raises:
        InputError: the architectures differ.
    """
    found = {}
    pairs = zip(before.blocks(), after.blocks(), strict=False)
    for name, (old, new) in zip(block_names(before), pairs, strict=False):
        a, b = _weights(old), _weights(new)
        if a.shape != b.shape:
            raise InputError(f"the encoders differ in their {name}; compare alike ones")
        size = a.norm()
        found[name] = float((b - a).norm() / size) if size > 0 else 0.0
    return found


def _weights(block: torch.nn.Module) -> Tensor:
    parts = [parameter.detach().double().flatten() for parameter in block.parameters()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def block_cka(
    before: Encoder, after: Encoder, batches: Iterable[CrystalBatch]
) -> dict[str, float]:
    """Return the linear CKA of both encoders' answers after each block.

    The rows are the atoms of the crystals, after the embedding and each convolution;
    both encoders are put into eval mode. Blocks with weights for pooling have no atoms.

    Args:
        before: the pretrained encoder.
        after: the fine-tuned one.
        batches: some crystals.
    """
    before.eval()
    after.eval()
    pairs = [(before(b, layers=True).layers, after(b, layers=True).layers)
             for b in batches]  # fmt: skip
    return {
        name: linear_cka(
            torch.cat([old[k] for old, _ in pairs]),
            torch.cat([new[k] for _, new in pairs]),
        )
        for k, name in enumerate(block_names(before))
        if k < len(pairs[0][0])
    }


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the similarity of two sets of features of the same n things, 0 to 1.

    |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|), with columns centred and Frobenius norms. It
    does not change with rotation and scale. 0 if one of them does not vary.

    Source: S. Kornblith et al., ICML 2019, arXiv:1905.00414, Section 3.

    Args:
        x: (n, F).
        y: (n, G).
    """
    x, y = (z.double() - z.double().mean(dim=0) for z in (x, y))
    both = (y.T @ x).square().sum()
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return float(both / own) if own > 0 else 0.0
