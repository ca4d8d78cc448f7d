"""ALIGNN, the atomistic line graph neural network: angles between bonds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs
from crysdistill.graphs.batch import CrystalBatch, mean_over_atoms
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.graphs.triplets import (
    Triplets,
    add_reverse_edges,
    distinct_angles,
    find_triplets,
)
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.distinct import distinct_distances
from crysdistill.layers.normalization import BatchNorm
from crysdistill.layers.settings import at_least, one_of, positive
from crysdistill.ranks import gather_rows, sum_over_ranks
from crysdistill.structures.elements import element_table

NORMS: dict[str, type[nn.Module]] = {"batch": BatchNorm, "layer": nn.LayerNorm}
"""Norms by name: of the published classes ALIGNN and ALIGNNAtomWise."""


# ------------------------------------------------- what keeps few rows for each pair


class _Gates(torch.autograd.Function):
    """m_ij = a_i + b_j + c_ij, and sum_j s_ij v_j / (sum_j s_ij + 1e-6), s = sigmoid(m).

    Autograd alone would keep the gates s and the gathered v, a row for each pair. Here
    m stays, which takes the place of c, and the rest is worked out again, block by
    block: nothing else has a row for every pair.
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
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(v.dtype, torch.float32)
        total = torch.zeros_like(v, dtype=wide)
        weight = torch.full_like(total, 1e-6)
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
    def backward(ctx: Any, dm: Tensor | None, d_mean: Tensor) -> Any:
        m, v, sender, receiver, mean, weight = ctx.saved_tensors
        d_total = d_mean / weight  # of sum_j s_ij v_j
        dc = torch.empty_like(m)
        da, db, dv = (torch.zeros_like(mean) for _ in range(3))
        for rows in _in_blocks(m):
            i, j = receiver[rows], sender[rows]
            gate = m[rows].to(mean.dtype).sigmoid()
            slope = d_total.index_select(0, i)
            dv.index_add_(0, j, gate * slope)
            # d mean_i / d s_ij = (v_j - mean_i) / weight_i; d s / d m = s (1 - s)
            slope *= v.index_select(0, j) - mean.index_select(0, i)
            slope.mul_(gate).mul_(gate.neg_().add_(1))
            if dm is not None:
                slope += dm[rows]
            da.index_add_(0, i, slope)
            db.index_add_(0, j, slope)
            dc[rows] = slope
        return da.to(v.dtype), db.to(v.dtype), dc, dv.to(v.dtype), None, None


def _in_blocks(m: Tensor) -> Iterator[slice]:
    """Yield the rows of (S, F) in blocks of half a megabyte; whole on a GPU."""
    count, width = m.shape
    step = max(1, (1 << 17) // width) if m.device.type == "cpu" else count or 1
    for start in range(0, count, step):
        yield slice(start, start + step)


class _SiluOfNorm(torch.autograd.Function):
    """SiLU(norm(x)).

    Autograd alone would keep the normalised values beside x. They are worked out
    again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.norm, ctx.mixed = norm, torch.is_autocast_enabled(x.device.type)
        return F.silu(norm(x), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        again = torch.autocast(x.device.type, enabled=ctx.mixed)
        with torch.enable_grad(), again, _not_followed(ctx.norm):
            x = x.detach().requires_grad_()
            normal = ctx.norm(x)
        asked = [w for w in (x, *weights) if w.requires_grad]
        slope = normal.detach()  # the norm does not need its result any more
        torch.ops.aten.silu_backward.grad_input(dy, slope, grad_input=slope)
        found = iter(torch.autograd.grad(normal, asked, slope))
        dx, *dw = (next(found) if w.requires_grad else None for w in (x, *weights))
        return dx, None, *dw


@contextmanager
def _not_followed(norm: nn.Module) -> Iterator[None]:
    """Let a BatchNorm in training see a batch again without counting it twice."""
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
    """Return SiLU(norm(x)), keeping x alone for the backward pass; (S, F)."""
    return _SiluOfNorm.apply(x, norm, *norm.parameters())


def norm_of_distinct(norm: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    """Return what a norm makes of rows that each stand for several, (D, F).

    Args:
        norm: one of `NORMS`.
        x: (D, F).
        counts: (D,), how often each row occurs.
    """
    if not (isinstance(norm, BatchNorm) and norm.training):
        return norm(x)
    count = sum_over_ranks(counts.sum())
    if not count:
        return x
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        share = counts.to(x.dtype) / count
        mean = _total_of_ranks(share @ x)
        x = x - mean
        var = _total_of_ranks(share @ x.square())
        norm.follow(count, mean, var)
        return x * ((var + norm.eps).rsqrt() * norm.weight) + norm.bias


def _total_of_ranks(sums: Tensor) -> Tensor:
    """Add up (F,) of all ranks, with gradients."""
    return gather_rows(sums.unsqueeze(0))[0].sum(0)


# ------------------------------------------------------------------------ the layers


class Dense(nn.Module):
    """SiLU(norm(W x + b))."""

    def __init__(self, inputs: int, width: int, norm: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norm = NORMS[norm](width)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Map rows (D, inputs), each of which occurs so often, to (D, F)."""
        return F.silu(norm_of_distinct(self.norm, self.linear(x), counts))


class Scalars(nn.Module):
    """Distances or cosines as vectors: Gaussians, and two dense layers.

    The Gaussians are exp(-(x - mu)^2 / spacing); others divide by the square of the
    spacing, which has the unit.
    """

    def __init__(
        self, start: float, stop: float, count: int, hidden: int, width: int, norm: str
    ) -> None:
        super().__init__()
        spacing = (stop - start) / (count - 1)
        self.gaussians = Gaussians(start, stop, count, math.sqrt(spacing))
        self.hidden = Dense(count, hidden, norm)
        self.dense = Dense(hidden, width, norm)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Map values (D,), each of which occurs so often, to (D, F)."""
        return self.dense(self.hidden(self.gaussians(x), counts), counts)


class Embedding(nn.Module):
    """The first vectors of atoms, edges and triplets.

    Args:
        features: of the element table.
        width: F.
        hidden: the width between Gaussians and F.
        distance_functions: how many Gaussians from 0 to `cutoff`.
        angle_functions: how many Gaussians from -1 to 1, for cosines.
        cutoff: Å.
        norm: one of `NORMS`.
    """

    def __init__(
        self,
        features: int,
        width: int,
        hidden: int,
        distance_functions: int,
        angle_functions: int,
        cutoff: float,
        norm: str,
    ) -> None:
        super().__init__()
        self.atoms = Dense(features, width, norm)
        self.edges = Scalars(0.0, cutoff, distance_functions, hidden, width, norm)
        self.triplets = Scalars(-1.0, 1.0, angle_functions, hidden, width, norm)


class EdgeGatedConvolution(nn.Module):
    """The edge-gated graph convolution, on any graph of senders and receivers.

    m_ij = A x_i + B x_j + C e_ij, whose gates are s_ij = sigmoid(m_ij);
    x_i' = x_i + SiLU(norm(U x_i + sum_j s_ij V x_j / (sum_j s_ij + 1e-6)));
    e_ij' = e_ij + SiLU(norm(m_ij)). Each of the five maps has a bias.

    Source: X. Bresson and T. Laurent, arXiv:1711.07553; V. P. Dwivedi et al.,
    arXiv:2003.00982.

    Args:
        width: F, of nodes and edges alike.
        norm: one of `NORMS`.
        last: whether nobody reads e', which is then neither made nor has weights.
    """

    def __init__(self, width: int, norm: str, last: bool = False) -> None:
        super().__init__()
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
        """Update R nodes and S edges; the last convolution returns e as it is.

        Args:
            x: of nodes, (R, F).
            e: of edges, (S, F), or (D, F) where they share rows.
            sender: (S,), the node j of each edge.
            receiver: (S,), the node i of each edge.
            place: (S,), the row of each edge, where they share rows.
        """
        c = self.edge_gate(e)
        m, heard = _Gates.apply(
            self.receiver_gate(x),
            self.sender_gate(x),
            c if place is None else c.index_select(0, place),
            self.message(x),
            sender,
            receiver,
        )  # (S, F), (R, F)
        x = x + silu_of_norm(self.node_norm, self.own(x) + heard)
        if self.edge_norm is not None:
            if place is not None:
                e = e.index_select(0, place)  # (S, F)
            e = e + silu_of_norm(self.edge_norm, m)
        return x, e


class AlignnConvolution(nn.Module):
    """An edge-gated convolution on the crystal graph, then one on its line graph.

    The nodes of the line graph are the edges of the crystal graph; its edges are the
    triplets.
    """

    def __init__(self, width: int, norm: str, last: bool) -> None:
        super().__init__()
        self.atoms = EdgeGatedConvolution(width, norm)
        self.edges = EdgeGatedConvolution(width, norm, last)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        batch: CrystalBatch,
        triplets: Triplets,
        place: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update atoms (N, F), edges (E, F) and triplets (P, F), or (D, F) at first."""
        x, y = self.atoms(x, y, *batch.edge_index)
        y, z = self.edges(y, z, triplets.first, triplets.second, place)
        return x, y, z


class ALIGNN(Encoder):
    """The atomistic line graph neural network.

    Edge-gated convolutions go back and forth between the crystal graph and its line
    graph, so that edges learn of the angles that they enclose with the edges before
    them; then follow some on the crystal graph alone. The mean over atoms is the
    crystal's embedding.

    Source: K. Choudhary and B. DeCost, npj Comput. Mater. 7, 185 (2021),
    doi:10.1038/s41524-021-00650-1. With `norm` = `layer`, width 64 and two
    convolutions of each kind it is the class ALIGNNAtomWise of the published code.

    Differs from the paper:

    - A convolution begins on the crystal graph and ends on the line graph, as in the
      published code; the paper has them the other way round.
    - What depends on an angle or a distance alone is worked out once for all that are
      equal to 1e-6 (1e-5 Å), and the batch norms there weigh it by their number.
    - The edges and triplets of the last convolution on each graph, which nobody
      reads, are not made. Their norms are 4 F weights without a gradient: at published
      settings, head included, 4,026,753 numbers are stored there and 4,025,729 here.
    - The paper's graph is undirected. Ours is read as it is, where an atom hears its
      nearest neighbours and need not be among theirs: that has 1.08 times fewer edges
      and 1.16 times fewer triplets, and shares every edge with other encoders.
      `symmetric` adds the missing directions in the step. Mode `radius` lacks none,
      but at 8 Å it has some 200 edges to an atom and 40,000 triplets.
    - The published program stores a bond between two images of one atom twice in
      each direction. Here it counts once.

    Memory: a training step keeps F (2 `convolutions` - 1) numbers of each triplet, and
    some (angle_functions + 3 hidden + 3 F) of each distinct angle.

    Args:
        width: F, of atoms, edges, triplets and crystals.
        convolutions: how many on both graphs.
        gated_convolutions: how many on the crystal graph alone, after those.
        hidden: the width between the Gaussians and F.
        distance_functions: how many Gaussians expand a distance.
        angle_functions: how many Gaussians expand the cosine of an angle.
        norm: `batch`, or `layer`, which does not depend on the rest of the batch.
        symmetric: whether to add the reverse of edges that have none.
        elements: the element table, a name in `crysdistill.structures.elements`.
        cutoff: Å, where the Gaussians of distances end; the graph's cutoff.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "alignn"
    NEEDS: ClassVar[Needs] = Needs(triplets=True)
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "width": 256,
        "convolutions": 4,
        "gated_convolutions": 4,
        "symmetric": True,
    }
    HEAD: ClassVar[Mapping[str, Any]] = {"layers": 0, "first": False}
    SMALL: ClassVar[Mapping[str, Any]] = {
        "width": 8,
        "convolutions": 2,
        "gated_convolutions": 1,
        "hidden": 8,
        "distance_functions": 20,
        "angle_functions": 10,
    }

    element_table: Tensor

    def __init__(
        self,
        width: int = 64,
        convolutions: int = 2,
        gated_convolutions: int = 2,
        hidden: int = 64,
        distance_functions: int = 80,
        angle_functions: int = 40,
        norm: Literal["batch", "layer"] = "batch",
        symmetric: bool = False,
        elements: str = "cgcnn92",
        cutoff: float = 8.0,
    ) -> None:
        super().__init__()
        at_least(
            1,
            width=width,
            convolutions=convolutions,
            gated_convolutions=gated_convolutions,
            hidden=hidden,
        )
        at_least(
            2, distance_functions=distance_functions, angle_functions=angle_functions
        )
        one_of("norm", norm, NORMS)
        positive(cutoff=cutoff)
        self.width = self.crystal_width = width
        self.symmetric = symmetric
        self.elements = elements
        self.settings = {
            "width": width,
            "convolutions": convolutions,
            "gated_convolutions": gated_convolutions,
            "hidden": hidden,
            "distance_functions": distance_functions,
            "angle_functions": angle_functions,
            "norm": norm,
            "symmetric": symmetric,
            "elements": elements,
            "cutoff": cutoff,
        }
        self.register_buffer("element_table", torch.from_numpy(element_table(elements)))
        self.embedding = Embedding(
            self.element_table.shape[1],
            width,
            hidden,
            distance_functions,
            angle_functions,
            cutoff,
            norm,
        )
        self.convolutions = nn.ModuleList(
            AlignnConvolution(width, norm, last=k == convolutions - 1)
            for k in range(convolutions)
        )
        self.gated_convolutions = nn.ModuleList(
            EdgeGatedConvolution(width, norm, last=k == gated_convolutions - 1)
            for k in range(gated_convolutions)
        )

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Let the Gaussians end where the edges end."""
        return {"cutoff": graph.cutoff, **settings}

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`. Edges are as the last convolution read them."""
        before = None
        if self.symmetric:
            batch, before = add_reverse_edges(batch)
        triplets = find_triplets(batch)
        x, y, (z, place) = self.embed(batch, triplets)
        passed = [x]
        for convolution in self.convolutions:
            x, y, z = convolution(x, y, z, batch, triplets, place)
            place = None  # from the first on, every triplet has its own row
            passed.append(x)
        for gated in self.gated_convolutions:
            x, y = gated(x, y, *batch.edge_index)
            passed.append(x)
        return Embeddings(
            x,
            mean_over_atoms(x, batch),
            edges=y if before is None else y.index_select(0, before),
            layers=tuple(passed if layers else ()),
        )

    def embed(
        self, batch: CrystalBatch, triplets: Triplets
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the first vectors of atoms, edges, and distinct angles.

        Returns:
            (N, F); (E, F); (D, F) and the row of each triplet, (P,).
        """
        kinds, kind, counts = torch.unique(
            batch.atomic_numbers, return_inverse=True, return_counts=True
        )
        x = self.embedding.atoms(self.element_table[kinds], counts)  # (kinds, F)
        distance = distinct_distances(batch)
        counts = torch.bincount(distance.place, minlength=len(distance.distances))
        y = self.embedding.edges(distance.distances, counts)  # (distances, F)
        angle = distinct_angles(triplets)
        z = self.embedding.triplets(angle.cosine, angle.counts)  # (D, F)
        return (
            x.index_select(0, kind),
            y.index_select(0, distance.place),
            (z, angle.place),
        )

    def blocks(self) -> Blocks:
        """Return the embedding and then each convolution."""
        return Blocks(self.embedding, [*self.convolutions, *self.gated_convolutions])
