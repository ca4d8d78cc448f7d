"""MPNN, the message passing network with edge networks and gated recurrent units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs
from crysdistill.graphs.batch import (
    CrystalBatch,
    gather_neighbours,
    mean_over_neighbours,
)
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.layers.atoms import AtomEmbedding
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.distinct import distinct_distances
from crysdistill.layers.group_norm import NORMS
from crysdistill.layers.pooling import Pooling
from crysdistill.layers.settings import at_least, one_of, positive

_CACHED = 1 << 19
"""The most numbers in a group of atoms on a CPU, so that they fit the cache."""


class Lengths(NamedTuple):
    """The inputs of the edge networks: D distances, E edges.

    Args:
        u: (D, K), the Gaussians of each distance.
        place: (E,) int64, the distance of each edge.
    """

    u: Tensor
    place: Tensor


class Group(NamedTuple):
    """Atoms with about as many neighbours each, A of them with up to M.

    Args:
        atoms: (A,) int64.
        neighbours: (A, M) int64; N, one more than the last atom, marks a missing one.
        places: (A, M) int64, the distances to them.
    """

    atoms: Tensor
    neighbours: Tensor
    places: Tensor


def group_atoms(batch: CrystalBatch, place: Tensor, size: int) -> list[Group]:
    """Group the atoms that have neighbours by their number of neighbours.

    Args:
        batch: the batch of the atoms.
        place: (E,) int64, the distance of each edge.
        size: the most atoms in a group.
    """
    ptr = batch.neighbor_ptr
    counts, order = (ptr[1:] - ptr[:-1]).sort(stable=True)  # (N,)
    groups = []
    for count, atoms in zip(counts.split(size), order.split(size), strict=True):
        most = int(count[-1]) if len(count) else 0
        if not most:
            continue
        steps = torch.arange(most, device=ptr.device)
        there = steps < count.unsqueeze(1)  # (A, M)
        edges = torch.where(there, ptr[atoms].unsqueeze(1) + steps, 0)
        neighbours = torch.where(there, batch.edge_index[0][edges], batch.num_nodes)
        groups.append(Group(atoms, neighbours, place[edges]))
    return groups


class _MatrixSum(torch.autograd.Function):
    """m_i = sum_j x_j A(d_ij) over neighbours, A(d) = sum_k h_k(d) W_k.

    As A is linear in h, m_i = sum_fk S_i[f, k] W[f, k], S_i = sum_j x_j h(d_ij)^T. So
    the large product is computed once per atom, not once per edge, and A is never
    built. The backward pass computes S, (A, F, H) for a group of atoms, again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, weight: Tensor, groups: list[Group]
    ) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(x, h, weight)
        padded = F.pad(x, (0, 0, 0, 1))  # (N + 1, F), zeros where there is no neighbour
        m = x.new_zeros(len(x), weight.shape[1])
        for group in groups:
            s = padded[group.neighbours].mT @ h[group.places]  # (A, F, H)
            m[group.atoms] = s.flatten(1) @ weight
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> Any:
        x, h, weight = ctx.saved_tensors
        padded = F.pad(x, (0, 0, 0, 1))
        dx, dh = torch.zeros_like(padded), torch.zeros_like(h)
        d_weight = torch.zeros_like(weight)
        for group in ctx.groups:
            at, hidden = padded[group.neighbours], h[group.places]  # (A, M, F or H)
            d_sum = dm[group.atoms]  # (A, F)
            s = at.mT @ hidden  # (A, F, H)
            d_weight.addmm_(s.flatten(1).mT, d_sum)
            ds = (d_sum @ weight.mT).view_as(s)
            dx.index_add_(0, group.neighbours.flatten(), (hidden @ ds.mT).flatten(0, 1))
            dh.index_add_(0, group.places.flatten(), (at @ ds).flatten(0, 1))
        return dx[:-1], dh, d_weight, None


class EdgeNetwork(nn.Module):
    """m_i = mean over neighbours j of x_j A(d_ij), plus x_i R + b.

    A(d) is a matrix, V_2 relu(V_1 u(d) + c_1) + c_2. Building it takes H F^2
    multiplications for each edge; `_MatrixSum` takes H F for an edge and H F^2 for an
    atom.

    Args:
        width: F, of atoms and messages.
        hidden: H, of the network that makes the matrix.
        gaussians: K.
    """

    def __init__(self, width: int, hidden: int, gaussians: int) -> None:
        super().__init__()
        self.first = nn.Linear(gaussians, hidden)  # V_1
        self.second = nn.Linear(hidden, width * width)  # V_2, rows f F + o
        self.root = nn.Linear(width, width)  # R and b

    def forward(
        self, x: Tensor, u: Tensor, groups: list[Group], batch: CrystalBatch
    ) -> Tensor:
        """Return the messages to atoms, (N, F).

        Args:
            x: (N, F).
            u: (D, K), the Gaussians of each distance.
            groups: the groups of atoms; see `group_atoms`.
            batch: the batch of the atoms.
        """
        width = x.shape[1]
        h = F.relu(self.first(u))  # (D, H)
        weight = self.second.weight.view(width, width, -1)  # (F, F, H), from, to, k
        weight = weight.transpose(1, 2).flatten(0, 1)  # (F H, F)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, self.root.weight.dtype)
            total = _MatrixSum.apply(x.to(wide), h.to(wide), weight.to(wide), groups)
        ptr = batch.neighbor_ptr
        mean = total / (ptr[1:] - ptr[:-1]).clamp(min=1).unsqueeze(1)
        average = mean_over_neighbours(gather_neighbours(x, batch), batch)  # (N, F)
        constant = average @ self.second.bias.view(width, width)  # what c_2 adds
        return mean + constant + self.root(x)


class Convolution(nn.Module):
    """The message, a norm, a ReLU, and one step of a gated recurrent unit.

    Args:
        width: F.
        hidden: H, of the edge network.
        gaussians: K.
        norm: one of `NORMS`.
    """

    def __init__(self, width: int, hidden: int, gaussians: int, norm: str) -> None:
        super().__init__()
        self.message = EdgeNetwork(width, hidden, gaussians)
        self.norm = NORMS[norm](width)
        self.update = nn.GRUCell(width, width)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        u: Tensor,
        groups: list[Group],
        batch: CrystalBatch,
    ) -> Tensor:
        """Return the next memory of atoms, (N, F), from x and memory, (N, F)."""
        message = self.message(x, u, groups, batch)
        return self.update(F.relu(self.norm(message)), memory)


class MPNN(Encoder):
    """The message passing network with edge networks, as MatDeepLearn trains it.

    Sources: J. Gilmer et al., ICML 2017, arXiv:1704.01212, section 5. V. Fung et al.,
    npj Comput. Mater. 7, 84 (2021), doi:10.1038/s41524-021-00554-0 (MatDeepLearn,
    whose program `PUBLISHED` reproduces). The deep form: S. S. Omee et al., Patterns
    3, 100491 (2022), doi:10.1016/j.patter.2022.100491.

    Differs from the paper:
        - As in MatDeepLearn, messages are averaged, not summed. An atom also sends a
          message to itself (R), messages pass a batch norm and a ReLU, and every step
          has its own weights. The crystal is the mean over atoms; the paper's set2set
          is `pooling="set2set"`.
        - `PUBLISHED` has MatDeepLearn's odd inputs: the number of neighbours beside the
          element, and Gaussians 14 times as wide as their spacing.
        - MatDeepLearn's own graph is not rebuilt: it has one edge for each pair of
          atoms at their shortest distance, and one from each atom to itself; the
          smallest and largest distance of the whole data set scale all distances.

    Args:
        width: F, of the atoms.
        hidden: H, of the edge networks, which have H F^2 weights each.
        convolutions: the number of convolutions.
        elements: the element table.
        degrees: columns for the number of neighbours; see `AtomEmbedding`.
        cutoff: Å, where Gaussians end; the graph's cutoff.
        gaussians: K, the number of Gaussians.
        gaussian_width: Å, w in exp(-((d - mu) / w)^2).
        norm: the norm of messages, `batch`, `group` or `none`.
        skip: whether the input of a convolution is added to its output. The memory of
            the recurrent unit has no skip connection.
        pooling: the pooling of atoms to crystals, `mean`, `max`, `set2set`, or `sum`.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "mpnn"
    NEEDS: ClassVar[Needs] = Needs(graphs=("shells", "nearest", "radius"))
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "width": 100,
        "hidden": 100,
        "convolutions": 4,
        "degrees": 14,
        "cutoff": 8.0,
        "gaussians": 50,
        "gaussian_width": 8.0 * 0.2 * math.sqrt(2),
    }
    HEAD: ClassVar[Mapping[str, Any]] = {
        "hidden": 100,
        "layers": 3,
        "activation": "relu",
        "first": False,
    }
    SMALL: ClassVar[Mapping[str, Any]] = {"width": 8, "hidden": 8, "convolutions": 2}

    def __init__(
        self,
        width: int = 64,
        hidden: int = 64,
        convolutions: int = 4,
        elements: str = "onehot",
        degrees: int = 0,
        cutoff: float = 8.0,
        gaussians: int = 50,
        gaussian_width: float = 0.3,
        norm: Literal["batch", "group", "none"] = "batch",
        skip: bool = False,
        pooling: Literal["mean", "max", "set2set", "sum"] = "mean",
    ) -> None:
        super().__init__()
        at_least(1, width=width, hidden=hidden, convolutions=convolutions)
        at_least(2, gaussians=gaussians)
        positive(cutoff=cutoff, gaussian_width=gaussian_width)
        one_of("norm", norm, NORMS)
        self.settings = {
            "width": width,
            "hidden": hidden,
            "convolutions": convolutions,
            "elements": elements,
            "degrees": degrees,
            "cutoff": cutoff,
            "gaussians": gaussians,
            "gaussian_width": gaussian_width,
            "norm": norm,
            "skip": skip,
            "pooling": pooling,
        }
        self.width = width
        self.hidden = hidden
        self.skip = skip
        self.elements = elements
        self.embedding = AtomEmbedding(width, elements, degrees)
        self.expansion = Gaussians(0.0, cutoff, gaussians, gaussian_width)
        self.convolutions = nn.ModuleList(
            Convolution(width, hidden, gaussians, norm) for _ in range(convolutions)
        )
        self.pooling = Pooling(pooling, width)
        self.crystal_width = self.pooling.width

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """End the Gaussians at the cutoff of the edges."""
        return {"cutoff": graph.cutoff, **settings}

    def features(self, batch: CrystalBatch) -> tuple[Tensor, Lengths]:
        """Return the first vectors of atoms, (N, F), and edge networks' inputs."""
        distance, place = distinct_distances(batch)
        return self.embedding(batch), Lengths(self.expansion(distance), place)

    def encode(
        self, x: Tensor, lengths: Lengths, batch: CrystalBatch, layers: bool = False
    ) -> Embeddings:
        """Encode the result of `features`."""
        size = _CACHED // (self.width * self.hidden)
        if x.device.type != "cpu":
            size *= 64
        groups = group_atoms(batch, lengths.place, max(1, size))
        memory = x = F.relu(x)  # (N, F)
        passed = [x]
        for convolution in self.convolutions:
            memory = convolution(x, memory, lengths.u, groups, batch)
            x = memory + x if self.skip else memory
            passed.append(x)
        return Embeddings(
            x, self.pooling(x, batch), layers=tuple(passed if layers else ())
        )

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`."""
        return self.encode(*self.features(batch), batch, layers)

    def blocks(self) -> Blocks:
        """Return the embedding, each convolution, and the pooling if it has weights."""
        pooling = self.pooling if self.pooling.set2set else None
        return Blocks(self.embedding, list(self.convolutions), pooling)
