"""CGCNN, the crystal graph convolutional network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs, Work
from crysdistill.graphs.batch import (
    CrystalBatch,
    distances,
    gather_centres,
    gather_neighbours,
    mean_over_atoms,
    sum_over_neighbours,
)
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.kernels.gate.compiled import compiled_gated_sum
from crysdistill.kernels.gate.merged_edges import CompiledEdges, merge_edges
from crysdistill.kernels.gate.table import GaussianTable, read
from crysdistill.kernels.softplus import softplus
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.elements import ElementEmbedding
from crysdistill.layers.normalization import BatchNorm
from crysdistill.layers.settings import at_least, one_of, positive
from crysdistill.structures.elements import element_table


@dataclass(frozen=True)
class PlainEdges:
    """The edges of a batch for PyTorch.

    Args:
        batch: the batch of the edges.
        row: (E,), the first of four rows of the table.
        weights: (E, 4), the weights of those rows.
        rows: (2 M, K), the Gaussians at all knots.
    """

    batch: CrystalBatch
    row: Tensor
    weights: Tensor
    rows: Tensor


def find_edges(batch: CrystalBatch, table: GaussianTable) -> PlainEdges | CompiledEdges:
    """Return the edges of a batch, with the places of their lengths in a table."""
    merged = merge_edges(batch, table)
    if merged is not None:
        return merged
    return PlainEdges(batch, *table.locate(distances(batch)), table.rows)


def gated_sum(
    products: Tensor,
    bias: Tensor,
    table: Tensor,
    edges: PlainEdges | CompiledEdges,
    norms: tuple[BatchNorm, BatchNorm] | None = None,
) -> Tensor:
    """Sum sigmoid(gate) softplus(core) over the neighbours of each atom, (N, F).

    Gate and core are the halves of z_ij = own_i + other_j + table(d_ij) + bias, each
    after its batch norm, if there is one. On the CPU compiled code does the same
    without a row for each edge.

    Args:
        products: (N, 2, 2 F), `own` and `other` of each atom.
        bias: (2 F,).
        table: (2 M, 2 F); see `GaussianTable`.
        edges: the edges of the batch.
        norms: norms of gate and core; training updates their running statistics.
    """
    if isinstance(edges, CompiledEdges):
        return compiled_gated_sum(products, bias, table, edges, norms)
    own, other = products.unbind(1)  # (N, 2 F) each
    along = read(table, edges.row, edges.weights)  # (E, 2 F)
    halves = (part.chunk(2, dim=1) for part in (own + bias, other, along))
    gate, core = (
        gather_centres(of_centre, edges.batch)
        + gather_neighbours(of_neighbour, edges.batch)
        + of_edge
        for of_centre, of_neighbour, of_edge in zip(*halves, strict=True)
    )  # (E, F) each
    if norms is not None:
        gate, core = norms[0](gate), norms[1](core)
    messages = torch.sigmoid(gate) * F.softplus(core)  # (E, F)
    return sum_over_neighbours(messages, edges.batch)


def edge_linear(width: int, basis: int) -> nn.Sequential:
    """Return W [v_i | v_j | u_ij] + b; weights files have its name."""
    linear = nn.Linear(2 * width + basis, width)
    return nn.Sequential(OrderedDict(linear=linear))


class GatedConvolution(nn.Module):
    """Eq. 5 as printed: v_i' = v_i + sum_j sigmoid(z W_f + b_f) * g(z W_s + b_s).

    z = [v_i | v_j | u_ij] is never built. The products with v_i and v_j are the same
    for all edges of an atom, so they are computed once per atom. The product with u_ij
    depends only on the distance and is read from a table.

    Gate and core are two Linears here, and one Linear of twice the width in the
    published code; the numbers are the same.
    """

    def __init__(self, width: int, basis: int) -> None:
        super().__init__()
        self.sizes = [width, width, basis]
        self.gate = edge_linear(width, basis)  # W_f and b_f
        self.core = edge_linear(width, basis)  # W_s and b_s

    def messages(
        self,
        x: Tensor,
        edges: PlainEdges | CompiledEdges,
        norms: tuple[BatchNorm, BatchNorm] | None = None,
        kinds: Tensor | None = None,
    ) -> Tensor:
        """Return the sum over neighbours of gate times core, (N, F).

        Under autocast the products may be in half precision. Everything after them is
        in single precision.

        Args:
            x: vectors of atoms, (N, F); if `kinds` are given, of each kind of atom.
            edges: the edges of the batch.
            norms: norms of gate and core.
            kinds: (N,), the kind of each atom, if atoms of a kind are alike.
        """
        both = zip(self.gate.parameters(), self.core.parameters(), strict=True)
        weight, bias = (torch.cat(parts) for parts in both)
        centre, neighbour, edge = weight.split(self.sizes, dim=1)  # (2 F, F) twice
        products = F.linear(x, torch.cat((centre, neighbour)))  # (N, 4 F)
        if kinds is not None:
            products = products.index_select(0, kinds)
        products = products.to(weight.dtype).unflatten(1, (2, -1))  # (N, 2, 2 F)
        with torch.autocast(x.device.type, enabled=False):
            table = F.linear(edges.rows, edge)  # (2 M, 2 F)
            return gated_sum(products, bias, table, edges, norms)

    def forward(
        self,
        x: Tensor,
        edges: PlainEdges | CompiledEdges,
        kinds: Tensor | None = None,
    ) -> Tensor:
        """Update atoms (N, F); the arguments are those of `messages`."""
        total = self.messages(x, edges, kinds=kinds)
        return total + (x if kinds is None else x.index_select(0, kinds))


class PublishedConvolution(GatedConvolution):
    """Eq. 5 as the published code computes it, with three batch norms.

    v_i' = softplus(v_i + BN(sum_j sigmoid(BN(z W_f + b_f))
                                   * softplus(BN(z W_s + b_s)))).

    Differs from the paper: only the published code has the batch norms and the outer
    softplus.
    """

    def __init__(self, width: int, basis: int) -> None:
        super().__init__(width, basis)
        self.gate_norm = BatchNorm(width)
        self.core_norm = BatchNorm(width)
        self.atom_norm = BatchNorm(width, in_order=True)

    def forward(
        self,
        x: Tensor,
        edges: PlainEdges | CompiledEdges,
        kinds: Tensor | None = None,
    ) -> Tensor:
        """Update atoms (N, F); the arguments are those of `messages`."""
        norms = (self.gate_norm, self.core_norm)
        total = self.messages(x, edges, norms, kinds)  # (N, F)
        if kinds is not None:
            x = x.index_select(0, kinds)
        return softplus(x + self.atom_norm(total))


class SharedConvolution(nn.Module):
    """Eq. 4: v_i' = g((sum_j v_j | u_ij) W_c + v_i W_s + b), one W_c for all j."""

    def __init__(self, width: int, basis: int) -> None:
        super().__init__()
        self.neighbour = nn.Linear(width + basis, width, bias=False)  # W_c
        self.centre = nn.Linear(width, width)  # W_s and b

    def forward(self, x: Tensor, batch: CrystalBatch, u: Tensor) -> Tensor:
        """Update atoms (N, F) with the sums over their edges' Gaussians, (N, K)."""
        neighbours = sum_over_neighbours(gather_neighbours(x, batch), batch)  # (N, F)
        total = torch.cat((neighbours, u), dim=1)
        return F.softplus(self.neighbour(total) + self.centre(x))


CONVOLUTIONS: dict[str, type[nn.Module]] = {
    "published": PublishedConvolution,
    "eq5": GatedConvolution,
    "eq4": SharedConvolution,
}


class CGCNN(Encoder):
    """The encoder of CGCNN and, with five convolutions, of CrysGNN.

    An element vector is mapped to an embedding, convolutions add the messages of the
    neighbours, and the mean over atoms is the crystal's embedding.

    Sources: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
    doi:10.1103/PhysRevLett.120.145301, Eqs. 4 and 5. CrysGNN: K. Das et al., AAAI
    37, 7323 (2023), doi:10.1609/aaai.v37i6.25892.

    Differs from the paper: see `PublishedConvolution`. With `normalize`, as in
    CrysGNN, the mean is taken over atom embeddings of length one.

    Args:
        width: F, of the atom and crystal embeddings.
        convolutions: the number of convolutions.
        convolution: `published` (the code's Eq. 5), `eq5` or `eq4` (as printed).
        elements: the element table, a name in `crysdistill.structures.elements`.
        cutoff: Å, where the Gaussians end; the graph's cutoff.
        spacing: Å, between Gaussians.
        bias: whether the embedding of elements has a bias (CrysGNN has none).
        normalize: whether to average unit vectors.
        token: whether a masked atom has a learned vector of its own; otherwise it has
            the embedding's bias.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "cgcnn"
    NEEDS: ClassVar[Needs] = Needs(graphs=("shells", "nearest", "radius", "cgcnn"))
    SMALL: ClassVar[Mapping[str, Any]] = {"width": 8, "convolutions": 2}

    element_table: Tensor

    def __init__(
        self,
        width: int = 64,
        convolutions: int = 3,
        convolution: Literal["published", "eq5", "eq4"] = "published",
        elements: str = "cgcnn92",
        cutoff: float = 8.0,
        spacing: float = 0.2,
        bias: bool = True,
        normalize: bool = False,
        token: bool = False,
    ) -> None:
        super().__init__()
        one_of("convolution", convolution, CONVOLUTIONS)
        at_least(1, width=width, convolutions=convolutions)
        positive(cutoff=cutoff, spacing=spacing)
        self.width = self.crystal_width = width
        self.normalize = normalize
        self.elements = elements
        self.settings = {
            "width": width,
            "convolutions": convolutions,
            "convolution": convolution,
            "elements": elements,
            "cutoff": cutoff,
            "spacing": spacing,
            "bias": bias,
            "normalize": normalize,
            "token": token,
        }
        self.register_buffer("element_table", torch.from_numpy(element_table(elements)))
        columns = self.element_table.shape[1]
        self.embedding = ElementEmbedding(columns, width, bias, token)
        steps = round(cutoff / spacing)
        self.expansion = Gaussians(0.0, steps * spacing, steps + 1, spacing)
        self.table = GaussianTable(cutoff, spacing)
        self.convolutions = nn.ModuleList(
            CONVOLUTIONS[convolution](width, steps + 1) for _ in range(convolutions)
        )

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """End the Gaussians at the cutoff of the edges."""
        return {"cutoff": graph.cutoff, **settings}

    @classmethod
    def for_properties(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Average atoms without normalising; CGCNN's head expects their lengths."""
        return {**settings, "normalize": False}

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`."""
        # Every atom of an element has the same embedding: one product per element.
        x, elements = self.embedding(self.element_table), batch.atomic_numbers
        passed = [x.index_select(0, elements)] if layers else []  # (N, F) each
        if self.settings["convolution"] == "eq4":
            x = x.index_select(0, elements)  # (N, F)
            u = self.expansion(distances(batch))  # (E, K)
            u = sum_over_neighbours(u, batch)  # (N, K)
            for convolution in self.convolutions:
                x = convolution(x, batch, u)
                passed.append(x)
        else:
            edges = find_edges(batch, self.table)
            for k, convolution in enumerate(self.convolutions):
                # From the first convolution on, every atom has its own vector.
                x = convolution(x, edges, None if k else elements)
                passed.append(x)
        return Embeddings(
            x, self.pool(x, batch), layers=tuple(passed if layers else ())
        )

    def pool(self, atoms: Tensor, batch: CrystalBatch) -> Tensor:
        """Average atom embeddings (N, F) to crystal embeddings (B, F)."""
        if self.normalize:
            atoms = F.normalize(atoms, dim=1)
        return mean_over_atoms(atoms, batch)

    def blocks(self) -> Blocks:
        """Return the embedding and then each convolution."""
        return Blocks(self.embedding, list(self.convolutions))

    def work(self, crystals: int, atoms: int, edges: int) -> Work:
        """Estimate one training step of the compiled gate, norms included.

        Floating-point operations: 8 N F^2 for the products of atoms with the weights
        of centre and neighbour, gate and core, three times (forward, and the
        gradients of both factors); the first convolution has elements instead of
        atoms. A table of M knots takes 8 M K F, twice. Each of E F gates takes 221: z
        four times (4 each), its statistics 10, forward 68, backward 101, statistics
        again 26. An exp is 20 of these, a log 17. Reading the table once for each
        length of a crystal is not counted.

        Bytes: 53 float32 for each of N F numbers (4 F products and their gradients,
        sums, embeddings, each written once and read again unless used at once) and
        12 bytes of each edge in four passes. The numbers of an atom's neighbours are
        assumed to be in the cache.

        Eq. 4 takes 2 N F (2 F + K) for its products, three times, and Gaussians.
        """
        width, layers = self.width, len(self.convolutions)
        basis = self.expansion.count
        if self.settings["convolution"] == "eq4":
            flops = 6.0 * atoms * width * (2 * width + basis) + 2.0 * edges * width
            moved = 4.0 * (24 * atoms * width + 4 * edges * width)
            return Work(layers * flops + 24.0 * edges * basis, layers * moved)
        kinds = len(self.element_table)
        flops = 24.0 * (atoms * (layers - 1) + kinds) * width**2
        flops += layers * 16.0 * self.table.knots * basis * width
        flops += layers * 221.0 * edges * width
        moved = layers * (4.0 * 53 * atoms * width + 4 * 12.0 * edges)
        return Work(flops, moved)
