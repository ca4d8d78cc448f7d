"""SchNet, the network of continuous-filter convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.layers.atoms import AtomEmbedding
from crysdistill.layers.basis import Gaussians, cosine_cutoff, shifted_softplus
from crysdistill.layers.distinct import distinct_distances
from crysdistill.layers.group_norm import NORMS
from crysdistill.layers.pooling import Pooling
from crysdistill.layers.settings import at_least, one_of, positive


class Lengths(NamedTuple):
    """The inputs of the filters: D distances, E edges.

    Args:
        u: (D, K), the Gaussians of each distance.
        cutoff: (D,), the cosine that reaches zero at the cutoff.
        place: (E,) int64, the distance of each edge.
    """

    u: Tensor
    cutoff: Tensor
    place: Tensor


class _FilteredSum(torch.autograd.Function):
    """y_i = sum_j x_j * W(d_ij) over the edges that arrive at i.

    Edges are processed in blocks, so that the rows of a block stay in the cache and no
    tensor has a row for each edge. The backward pass gathers again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filters: Tensor, edges: Tensor, place: Tensor
    ) -> Tensor:
        y = x.new_zeros(x.shape)
        for rows in _blocks(edges, x):
            j, i = edges[:, rows]
            message = x.index_select(0, j)
            message *= filters.index_select(0, place[rows])
            y.index_add_(0, i, message)
        ctx.save_for_backward(x, filters, edges, place)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, filters, edges, place = ctx.saved_tensors
        dx, d_filters = torch.zeros_like(x), torch.zeros_like(filters)
        for rows in _blocks(edges, x):
            (j, i), at = edges[:, rows], place[rows]
            message = dy.index_select(0, i)
            d_filters.index_add_(0, at, message * x.index_select(0, j))
            message *= filters.index_select(0, at)
            dx.index_add_(0, j, message)
        return dx, d_filters, None, None


def _blocks(edges: Tensor, x: Tensor) -> Iterator[slice]:
    """Yield the edges in blocks of half a megabyte; in one block on a GPU."""
    count = edges.shape[1]
    step = max(1, (1 << 17) // x.shape[1]) if x.device.type == "cpu" else count or 1
    for start in range(0, count, step):
        yield slice(start, start + step)


class Interaction(nn.Module):
    """The interaction block: x_i' = BN(x_i + I(x)_i).

    I(x) = W_3 ssp(W_2 sum_j (W_1 x_j) * W(d_ij) + b_2) + b_3, where the filter is
    W(d) = C(d) (V_2 ssp(V_1 u(d) + c_1) + c_2), C the cosine cutoff, and ssp the
    shifted softplus. With `skip` it is x_i + BN(I(x)_i).

    Args:
        width: F, of atoms.
        filters: the width of the filters.
        gaussians: K.
        norm: one of `NORMS`.
        skip: whether a skip connection passes the norm.
    """

    def __init__(
        self, width: int, filters: int, gaussians: int, norm: str, skip: bool
    ) -> None:
        super().__init__()
        self.skip = skip
        self.filter_in = nn.Linear(gaussians, filters)  # V_1
        self.filter_out = nn.Linear(filters, filters)  # V_2
        self.before = nn.Linear(width, filters, bias=False)  # W_1
        self.after = nn.Linear(filters, width)  # W_2
        self.last = nn.Linear(width, width)  # W_3
        self.norm = NORMS[norm](width)
        for linear in (self.filter_in, self.filter_out, self.after):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.before.weight)
        nn.init.zeros_(self.last.bias)

    def interact(self, x: Tensor, lengths: Lengths, batch: CrystalBatch) -> Tensor:
        """Return the messages to each atom from its neighbours, (N, F)."""
        hidden = shifted_softplus(self.filter_in(lengths.u))  # (D, filters)
        filters = self.filter_out(hidden) * lengths.cutoff.unsqueeze(1)
        x = self.before(x)  # (N, filters)
        # In float32 or wider: half precision cannot add up many neighbours.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = _FilteredSum.apply(
            x.to(wide), filters.to(wide), batch.edge_index, lengths.place
        )  # (N, filters)
        return self.last(shifted_softplus(self.after(y)))  # (N, F)

    def forward(self, x: Tensor, lengths: Lengths, batch: CrystalBatch) -> Tensor:
        """Update atoms (N, F)."""
        heard = self.interact(x, lengths, batch)
        return x + self.norm(heard) if self.skip else self.norm(x + heard)


class SchNet(Encoder):
    """SchNet as MatDeepLearn and the DeeperGATGNN study train it on crystals.

    Sources: K. T. Schütt et al., NIPS 2017, arXiv:1706.08566, and J. Chem. Phys. 148,
    241722 (2018), doi:10.1063/1.5019779. V. Fung et al., npj Comput. Mater. 7, 84
    (2021), doi:10.1038/s41524-021-00554-0 (MatDeepLearn, whose program `PUBLISHED`
    reproduces). The deep form: S. S. Omee et al., Patterns 3, 100491 (2022),
    doi:10.1016/j.patter.2022.100491.

    Differs from the paper:
        - As in MatDeepLearn, the element embedding passes a ReLU, filters are
          multiplied by the cosine cutoff, their last layer has no activation, a batch
          norm follows each block, and the crystal is pooled before the dense layers of
          the head, not after them.
        - `PUBLISHED` has MatDeepLearn's odd choices: the number of neighbours beside
          the element, Gaussians that are 14 times as wide as their spacing, and the
          maximum over atoms as the crystal. The defaults have the paper's Gaussians and
          the mean.
        - MatDeepLearn's own graph is not rebuilt: it has one edge for each pair of
          atoms at their shortest distance, and one from each atom to itself; the
          smallest and largest distance of the whole data set scale all distances.
        - In the deep form (`norm="group"`, `skip=True`) a skip connection passes the
          norm. The published program adds the atoms both inside and outside it,
          x + DGN(x + I(x)), so that they double with every block.

    Args:
        width: F, of the atoms.
        filters: the width of the filters.
        convolutions: the number of interaction blocks.
        elements: the element table.
        degrees: columns for the number of neighbours; see `AtomEmbedding`.
        cutoff: Å, where filters and Gaussians end; the graph's cutoff.
        gaussians: K, the number of Gaussians.
        gaussian_width: Å, w in exp(-((d - mu) / w)^2).
        norm: the norm of atoms, `batch`, `group` or `none`.
        skip: whether a skip connection passes the norm.
        pooling: the pooling of atoms to crystals, `mean`, `max`, `set2set`, or `sum`.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "schnet"
    NEEDS: ClassVar[Needs] = Needs(graphs=("radius", "shells", "nearest"))
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "width": 100,
        "filters": 150,
        "convolutions": 4,
        "degrees": 14,
        "cutoff": 8.0,
        "gaussians": 50,
        "gaussian_width": 8.0 * 0.2 * math.sqrt(2),
        "pooling": "max",
    }
    HEAD: ClassVar[Mapping[str, Any]] = {
        "hidden": 100,
        "layers": 3,
        "activation": "relu",
        "first": False,
    }
    SMALL: ClassVar[Mapping[str, Any]] = {"width": 8, "filters": 8, "convolutions": 2}

    def __init__(
        self,
        width: int = 64,
        filters: int = 64,
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
        at_least(1, width=width, filters=filters, convolutions=convolutions)
        at_least(2, gaussians=gaussians)
        positive(cutoff=cutoff, gaussian_width=gaussian_width)
        one_of("norm", norm, NORMS)
        self.settings = {
            "width": width,
            "filters": filters,
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
        self.elements = elements
        self.cutoff = cutoff
        self.embedding = AtomEmbedding(width, elements, degrees)
        self.expansion = Gaussians(0.0, cutoff, gaussians, gaussian_width)
        self.convolutions = nn.ModuleList(
            Interaction(width, filters, gaussians, norm, skip)
            for _ in range(convolutions)
        )
        self.pooling = Pooling(pooling, width)
        self.crystal_width = self.pooling.width

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """End the filters at the cutoff of the edges."""
        return {"cutoff": graph.cutoff, **settings}

    def features(self, batch: CrystalBatch) -> tuple[Tensor, Lengths]:
        """Return the first vectors of atoms, (N, F), and the inputs of the filters."""
        distance, place = distinct_distances(batch)
        u = self.expansion(distance)  # (D, K)
        lengths = Lengths(u, cosine_cutoff(distance, self.cutoff), place)
        return self.embedding(batch), lengths

    def encode(
        self, x: Tensor, lengths: Lengths, batch: CrystalBatch, layers: bool = False
    ) -> Embeddings:
        """Encode the result of `features`."""
        x = F.relu(x)  # (N, F)
        passed = [x]
        for convolution in self.convolutions:
            x = convolution(x, lengths, batch)
            passed.append(x)
        return Embeddings(
            x, self.pooling(x, batch), layers=tuple(passed if layers else ())
        )

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`."""
        return self.encode(*self.features(batch), batch, layers)

    def blocks(self) -> Blocks:
        """Return the embedding, each interaction, and the pooling if it has weights."""
        pooling = self.pooling if self.pooling.set2set else None
        return Blocks(self.embedding, list(self.convolutions), pooling)
