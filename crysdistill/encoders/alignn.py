"""ALIGNN, the atomistic line graph neural network: angles between bonds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from crysdistill.layers.edge_gated import NORMS, EdgeGatedConvolution
from crysdistill.layers.normalization import BatchNorm
from crysdistill.layers.settings import at_least, one_of, positive
from crysdistill.ranks import gather_rows, sum_over_ranks
from crysdistill.structures.elements import ELEMENT_TABLES, element_table


def norm_of_distinct(norm: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    """Normalise distinct rows, each of which occurs several times, (D, F).

    Args:
        norm: one of `NORMS`.
        x: (D, F), the distinct rows.
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
    """Add up sums (F,) over all ranks, with gradients."""
    return gather_rows(sums.unsqueeze(0))[0].sum(0)


class Dense(nn.Module):
    """SiLU(norm(W x + b))."""

    def __init__(self, inputs: int, width: int, norm: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norm = NORMS[norm](width)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Map distinct rows (D, inputs), which occur `counts` times, to (D, F)."""
        return F.silu(norm_of_distinct(self.norm, self.linear(x), counts))


class Scalars(nn.Module):
    """Distances or cosines as vectors: Gaussians, and two dense layers.

    The Gaussians are exp(-(x - mu)^2 / spacing). Other networks divide by the square of
    the spacing, which has the right unit.
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
        """Map distinct values (D,), which occur `counts` times, to (D, F)."""
        return self.dense(self.hidden(self.gaussians(x), counts), counts)


class Embedding(nn.Module):
    """The first vectors of atoms, edges and triplets.

    Args:
        features: the number of features in the element table.
        width: F.
        hidden: the width between Gaussians and F.
        distance_functions: the number of Gaussians from 0 to `cutoff`.
        angle_functions: the number of Gaussians from -1 to 1, for cosines.
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


class AlignnConvolution(nn.Module):
    """An edge-gated convolution on the crystal graph, then one on its line graph.

    The nodes of the line graph are the edges of the crystal graph; its edges are the
    triplets.
    """

    def __init__(self, width: int, norm: str, offset: float, last: bool) -> None:
        super().__init__()
        self.atoms = EdgeGatedConvolution(width, norm, offset)
        self.edges = EdgeGatedConvolution(width, norm, offset, last)

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

    Edge-gated convolutions alternate between the crystal graph and its line graph, so
    that edges receive the angles to the edges before them. Further convolutions follow
    on the crystal graph alone. The mean over atoms is the crystal's embedding.

    Source: K. Choudhary and B. DeCost, npj Comput. Mater. 7, 185 (2021),
    doi:10.1038/s41524-021-00650-1. With `norm` = `layer`, width 64 and two
    convolutions of each kind it is the class ALIGNNAtomWise of the published code.

    Differs from the paper:

    - Gated messages are divided by the sum of the gates, to which the published code
      adds 1e-6. If all neighbours send the same message, the gates then cancel: all
      crystals of one element have the same embedding, whatever their structure. With
      `gate_offset` 1 they do not.
    - A convolution begins on the crystal graph and ends on the line graph, as in the
      published code; the paper has them the other way round.
    - Numbers that depend only on an angle or a distance are computed once for all
      values equal within 1e-6 (1e-5 Å); batch norms there weight them by their count.
    - The last convolution on each graph does not update its edges and triplets,
      because nothing reads them. Their norms are 4 F weights without a gradient: at
      published settings, head included, the published program stores 4,026,753 numbers
      and ours 4,025,729.
    - The paper's graph is undirected. Our graph is directed: an atom receives from its
      nearest neighbours, but need not be among theirs. In the Materials Project this
      gives 1.07 times fewer edges and 1.16 times fewer triplets, and every edge keeps
      its place. `symmetric` adds the missing directions in the step. Mode `radius`
      lacks none, but at 8 Å an atom has some 200 edges and 40,000 triplets.
    - The published program stores an edge between two images of one atom twice. Such an
      edge does not receive from itself, so a supercell is another crystal. Here it
      counts once, and receives from the edge before it in the straight line of images.

    Memory: a training step keeps F (2 `convolutions` - 1) numbers for each triplet, and
    about (angle_functions + 3 hidden + 3 F) for each distinct angle. On a CPU, with 12
    neighbours, its peak is 2 kB per triplet (25 kB per edge), and 16 kB (0.2 MB) at
    published settings. Plain autograd takes 6 kB and 44 kB.

    Args:
        width: F, of atoms, edges, triplets and crystals.
        convolutions: the number of convolutions on both graphs.
        gated_convolutions: the number of later convolutions on the crystal graph alone.
        hidden: the width between the Gaussians and F.
        distance_functions: the number of Gaussians that expand a distance.
        angle_functions: the number of Gaussians that expand the cosine of an angle.
        norm: `batch`, or `layer`, which does not depend on the rest of the batch.
        gate_offset: a number added to the sum of gates, which divides the messages.
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
        "gate_offset": 1e-6,
        "symmetric": True,
    }
    HEAD: ClassVar[Mapping[str, Any]] = {"layers": 0, "first": False}
    SMALL: ClassVar[Mapping[str, Any]] = {
        "width": 16,
        "convolutions": 2,
        "gated_convolutions": 1,
        "hidden": 16,
        "distance_functions": 40,
        "angle_functions": 20,
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
        gate_offset: float = 1.0,
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
        one_of("elements", elements, ELEMENT_TABLES)
        one_of("norm", norm, NORMS)
        positive(cutoff=cutoff, gate_offset=gate_offset)
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
            "gate_offset": gate_offset,
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
            AlignnConvolution(width, norm, gate_offset, last=k == convolutions - 1)
            for k in range(convolutions)
        )
        self.gated_convolutions = nn.ModuleList(
            EdgeGatedConvolution(
                width, norm, gate_offset, last=k == gated_convolutions - 1
            )
            for k in range(gated_convolutions)
        )

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """End the Gaussians at the cutoff of the edges."""
        return {"cutoff": graph.cutoff, **settings}

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`. Edges are those the last convolution reads."""
        before = None
        if self.symmetric:
            batch, before = add_reverse_edges(batch)
        found = self.encode(batch, find_triplets(batch), layers)
        if before is None or found.edges is None:
            return found
        return dataclasses.replace(found, edges=found.edges.index_select(0, before))

    def encode(
        self, batch: CrystalBatch, triplets: Triplets, layers: bool = False
    ) -> Embeddings:
        """Encode a batch whose triplets are known."""
        x, y, (z, place) = self.embed(batch, triplets)
        passed = [x]
        for k, convolution in enumerate(self.convolutions):
            # From the first convolution on, every triplet has its own row.
            x, y, z = convolution(x, y, z, batch, triplets, None if k else place)
            passed.append(x)
        for gated in self.gated_convolutions:
            x, y = gated(x, y, *batch.edge_index)
            passed.append(x)
        return Embeddings(
            x,
            mean_over_atoms(x, batch),
            edges=y,
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

    def memory(self, batch: CrystalBatch) -> int:
        """Return the measured 16 bytes for each triplet, width and convolution."""
        degree = batch.neighbor_ptr.diff()  # (N,)
        triplets = int(degree[batch.edge_index[0]].sum())
        return 16 * triplets * self.settings["hidden"] * len(self.convolutions)

    def blocks(self) -> Blocks:
        """Return the embedding and then each convolution."""
        return Blocks(self.embedding, [*self.convolutions, *self.gated_convolutions])
