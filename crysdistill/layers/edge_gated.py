"""The edge-gated graph convolution, which keeps few rows for each pair of nodes.

On a line graph, pairs are triplets, a dozen for every edge. The numbers that autograd
keeps for each triplet decide how many crystals fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crysdistill.layers.normalization import BatchNorm

__all__ = ["NORMS", "EdgeGatedConvolution"]

NORMS: dict[str, type[nn.Module]] = {"batch": BatchNorm, "layer": nn.LayerNorm}
"""Norms of nodes and edges by name."""


class EdgeGatedConvolution(nn.Module):
    """The edge-gated graph convolution, on any graph of senders and receivers.

    m_ij = A x_i + B x_j + C e_ij, whose gates are s_ij = sigmoid(m_ij);
    x_i' = x_i + SiLU(norm(U x_i + sum_j s_ij V x_j / (sum_j s_ij + w)));
    e_ij' = e_ij + SiLU(norm(m_ij)). Each of the five maps has a bias.

    Source: X. Bresson and T. Laurent, arXiv:1711.07553; V. P. Dwivedi et al.,
    arXiv:2003.00982.

    Args:
        width: F, of nodes and edges alike.
        norm: one of `NORMS`.
        offset: w, which is published as 1e-6.
        last: whether e' is not needed; then it is not computed and has no weights.
    """

    def __init__(
        self, width: int, norm: str, offset: float = 1e-6, last: bool = False
    ) -> None:
        super().__init__()
        self.offset = offset
        self.receiver_gate = nn.Linear(width, width)  # A
        self.sender_gate = nn.Linear(width, width)  # B
        self.edge_gate = nn.Linear(width, width)  # C
        self.own = nn.Linear(width, width)  # U
        self.message = nn.Linear(width, width)  # V
        self.node_norm = NORMS[norm](width)
        self.edge_norm = None if last else NORMS[norm](width)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        sender: Tensor,
        receiver: Tensor,
        place: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update R nodes and S edges; the last convolution returns e unchanged.

        Args:
            x: vectors of nodes, (R, F).
            e: vectors of edges, (S, F), or (D, F) if edges share rows.
            sender: (S,), the node j of each edge.
            receiver: (S,), the node i of each edge.
            place: (S,), the row of each edge, if edges share rows.
        """
        c = self.edge_gate(e)
        m, heard = _Gates.apply(
            self.receiver_gate(x),
            self.sender_gate(x),
            c if place is None else c.index_select(0, place),
            self.message(x),
            sender,
            receiver,
            self.offset,
        )  # (S, F), (R, F)
        x = x + silu_of_norm(self.node_norm, self.own(x) + heard)
        if self.edge_norm is not None:
            if place is not None:
                e = e.index_select(0, place)  # (S, F)
            e = e + silu_of_norm(self.edge_norm, m)
        return x, e


class _Gates(torch.autograd.Function):
    """m_ij = a_i + b_j + c_ij, and sum_j s_ij v_j / (sum_j s_ij + w).

    s_ij = sigmoid(m_ij).

    Plain autograd would keep the gates s and the gathered v, a row for each pair. Here
    only m, which overwrites c, has a row for every pair. The backward pass computes the
    rest again, block by block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        v: Tensor,
        sender: Tensor,
        receiver: Tensor,
        offset: float,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(v.dtype, torch.float32)
        total = torch.zeros_like(v, dtype=wide)
        weight = torch.full_like(total, offset)
        for rows in _in_blocks(c):
            i, j = receiver[rows], sender[rows]
            m = c[rows].add_(a.index_select(0, i)).add_(b.index_select(0, j))
            gate = m.to(wide).sigmoid()
            weight.index_add_(0, i, gate)
            total.index_add_(0, i, gate.mul_(v.index_select(0, j)))
        mean = total.div_(weight)
        ctx.mark_dirty(c)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(c, v, sender, receiver, mean, weight)
        return c, mean.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor | None, d_mean: Tensor | None) -> Any:
        m, v, sender, receiver, mean, weight = ctx.saved_tensors
        d_total = mean.new_zeros(mean.shape) if d_mean is None else d_mean / weight
        dc = torch.empty_like(m)
        da, db, dv = (torch.zeros_like(mean) for _ in range(3))
        for rows in _in_blocks(m):
            i, j = receiver[rows], sender[rows]
            gate = m[rows].to(mean.dtype).sigmoid()
            slope = d_total.index_select(0, i)
            dv.index_add_(0, j, gate * slope)
            # d mean_i / d s_ij = (v_j - mean_i) / weight_i; ds / dm = s (1 - s)
            slope *= v.index_select(0, j) - mean.index_select(0, i)
            slope.mul_(gate).mul_(gate.neg_().add_(1))
            if dm is not None:
                slope += dm[rows]
            da.index_add_(0, i, slope)
            db.index_add_(0, j, slope)
            dc[rows] = slope
        return da.to(v.dtype), db.to(v.dtype), dc, dv.to(v.dtype), None, None, None


def _in_blocks(m: Tensor) -> Iterator[slice]:
    """Yield the rows of (S, F) in blocks of half a megabyte; in one block on a GPU."""
    count, width = m.shape
    step = max(1, (1 << 17) // width) if m.device.type == "cpu" else count or 1
    for start in range(0, count, step):
        yield slice(start, start + step)


class _SiluOfNorm(torch.autograd.Function):
    """SiLU(norm(x)).

    Plain autograd would keep the normalised values beside x. The backward pass computes
    them again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.norm, ctx.mixed = norm, torch.is_autocast_enabled(x.device.type)
        normal = norm(x)  # without rows, a norm returns its input itself
        return F.silu(normal, inplace=normal is not x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        again = torch.autocast(x.device.type, enabled=ctx.mixed)
        with torch.enable_grad(), again, _not_followed(ctx.norm):
            x = x.detach().requires_grad_()
            normal = ctx.norm(x)
        asked = [w for w in (x, *weights) if w.requires_grad]
        # The norm no longer needs its result; but see above for no rows.
        slope = normal.detach() if len(x) else torch.empty_like(x)
        torch.ops.aten.silu_backward.grad_input(dy, slope, grad_input=slope)
        found = iter(torch.autograd.grad(normal, asked, slope, allow_unused=True))
        dx, *dw = (next(found) if w.requires_grad else None for w in (x, *weights))
        return dx, None, *dw


@contextmanager
def _not_followed(norm: nn.Module) -> Iterator[None]:
    """Let a BatchNorm in training see a batch again, but count it only once."""
    if not (isinstance(norm, BatchNorm) and norm.training):
        yield
        return
    followed, mean = norm.track_running_stats, norm.running_mean
    norm.track_running_stats, norm.running_mean = False, None
    try:
        yield
    finally:
        norm.track_running_stats, norm.running_mean = followed, mean


def silu_of_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Return SiLU(norm(x)), (S, F), and keep only x for the backward pass."""
    return _SiluOfNorm.apply(x, norm, *norm.parameters())
