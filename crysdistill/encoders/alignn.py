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

    Edge-gated convolutions go back and forth between the crystal graph and its line
    graph, so that edges learn of the angles that they enclose with the edges before
    them; then follow some on the crystal graph alone. The mean over atoms is the
    crystal's embedding.

    Source: K. Choudhary and B. DeCost, npj Comput. Mater. 7, 185 (2021),
    doi:10.1038/s41524-021-00650-1. With `norm` = `layer`, width 64 and two
    convolutions of each kind it is the class ALIGNNAtomWise of the published code.

    Differs from the paper:

    - Gated messages are divided by the sum of the gates, to which the published code
      adds 1e-6. Where all neighbours send the same, gates cancel then: all crystals of
      one element, whatever their structure, have one embedding. With `gate_offset` 1
      they do not.
    - A convolution begins on the crystal graph and ends on the line graph, as in the
      published code; the paper has them the other way round.
    - What depends on an angle or a distance alone is worked out once for all that are
      equal to 1e-6 (1e-5 Å), and the batch norms there weigh it by their number.
    - The edges and triplets of the last convolution on each graph, which nobody
      reads, are not made. Their norms are 4 F weights without a gradient: at published
      settings, head included, 4,026,753 numbers are stored there and 4,025,729 here.
    - The paper's graph is undirected. Ours is read as it is, where an atom hears its
      nearest neighbours and need not be among theirs: in the Materials Project that
      has 1.07 times fewer edges and 1.16 times fewer triplets, and every edge keeps
      its place. `symmetric` adds the missing directions in the step. Mode `radius`
      lacks none, but at 8 Å an atom has some 200 edges and 40,000 triplets.
    - The published program stores an edge between two images of one atom twice, and
      such an edge does not hear itself, so that a supercell is another crystal. Here
      it counts once, and hears the one before it in the straight line of images.

    Memory: of each triplet a training step keeps F (2 `convolutions` - 1) numbers, of
    each distinct angle some (angle_functions + 3 hidden + 3 F). On a CPU, with 12
    neighbours, its peak is 2 kB to a triplet (25 kB to an edge), and 16 kB (0.2 MB) at
    published settings; autograd alone takes 6 kB and 44 kB.

    Args:
        width: F, of atoms, edges, triplets and crystals.
        convolutions: how many on both graphs.
        gated_convolutions: how many on the crystal graph alone, after those.
        hidden: the width between the Gaussians and F.
        distance_functions: how many Gaussians expand a distance.
        angle_functions: how many Gaussians expand the cosine of an angle.
        norm: `batch`, or `layer`, which does not depend on the rest of the batch.
        gate_offset: what is added to the sum of the gates that messages are divided by.
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
        """Let the Gaussians end where the edges end."""
        return {"cutoff": graph.cutoff, **settings}

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`. Edges are as the last convolution reads."""
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
        """Return 16 bytes for each triplet, width and convolution, as was measured."""
        degree = batch.neighbor_ptr.diff()  # (N,)
        triplets = int(degree[batch.edge_index[0]].sum())
        return 16 * triplets * self.settings["hidden"] * len(self.convolutions)

    def blocks(self) -> Blocks:
        """Return the embedding and then each convolution."""
        return Blocks(self.embedding, [*self.convolutions, *self.gated_convolutions])
