"""GATGNN, the graph convolutional network with global attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs
from crysdistill.graphs.batch import CrystalBatch, composition, sum_over_atoms
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.layers.attention import (
    AugmentedAttention,
    CompositionAttention,
    Ends,
    find_ends,
)
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.distinct import distinct_distances
from crysdistill.layers.normalization import BatchNorm
from crysdistill.layers.settings import at_least, one_of, positive
from crysdistill.structures.elements import ELEMENT_TABLES, element_table

COMPOSITION = 103
"""Length of the published composition vector: the shares of H to Lr."""


class Embedding(nn.Module):
    """The first vectors: linear for elements, leaky ReLU for edges."""

    element_table: Tensor

    def __init__(self, width: int, elements: str, basis: int) -> None:
        super().__init__()
        one_of("elements", elements, ELEMENT_TABLES)
        table = torch.from_numpy(element_table(elements))  # (101, features)
        self.register_buffer("element_table", table)
        self.atoms = nn.Linear(table.shape[1], width)
        self.edges = nn.Linear(basis, width)

    def embed_atoms(self, batch: CrystalBatch) -> Tensor:
        """Return the first vectors of atoms, (N, F), computed once per element."""
        return self.atoms(self.element_table).index_select(0, batch.atomic_numbers)

    def embed_edges(self, u: Ends) -> Ends:
        """Map Gaussians, K wide, to width F."""
        return u._replace(rows=F.leaky_relu(self.edges(u.rows), 0.2))


class AttentionConvolution(nn.Module):
    """v_i' = softplus(BN(AGAT(v_i)))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = AugmentedAttention(width, heads)
        self.norm = BatchNorm(width)

    def forward(self, x: Tensor, edges: Ends, batch: CrystalBatch) -> Tensor:
        """Update atoms (N, F) with edges F wide."""
        return F.softplus(self.norm(self.attention(x, edges, batch)))


class AttentionPooling(nn.Module):
    """The mean over atoms, with weights that depend on the composition.

    Args:
        width: F, of atoms.
        join: whether to put the embedded composition beside the mean.
    """

    def __init__(self, width: int, join: bool) -> None:
        super().__init__()
        self.attention = CompositionAttention(width, COMPOSITION, (32,))
        self.composition = nn.Linear(COMPOSITION, width) if join else None
        self.width = 2 * width if join else width

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Pool atoms (N, F) to crystals, (B, F) or (B, 2 F)."""
        # Column 0, the share of masked atoms, has no place in the published vector.
        shares = composition(batch, COMPOSITION + 1)[:, 1:].to(x.dtype)
        weights = self.attention(x, shares, batch)  # (N, 1)
        return self.join(sum_over_atoms(x * weights, batch), shares)

    def join(self, pooled: Tensor, shares: Tensor) -> Tensor:
        """Put the embedded composition beside the pooled atoms, if requested."""
        if self.composition is None:
            return pooled
        embedded = F.leaky_relu(self.composition(shares), 0.2)
        return torch.cat((pooled, embedded), dim=1)  # (B, 2 F)


class GATGNN(Encoder):
    """The encoder of GATGNN: attention over neighbours, then over the crystal.

    An element vector is mapped to an embedding. Each convolution replaces an atom by
    the messages of its neighbours, weighted by attention. The crystal is a mean over
    atoms, weighted by an attention that depends on the composition (GI-M1 of the
    paper). Its weights sum to one, so that it does not depend on the cell.

    Source: S.-Y. Louis et al., Phys. Chem. Chem. Phys. 22, 18141 (2020),
    doi:10.1039/D0CP01474E.

    Differs from the paper:
        - `AugmentedAttention` lists the details that only the published code has.
        - If an atom has too few neighbours, the published graph adds edges to atom 0
          and does not hide them from the attention. Ours has no such edges.
        - The global attention by clusters (GI-M2 to GI-M4) is left out. Its clusters
          come from a spectral clustering of the Cartesian coordinates of one cell,
          without periodic images and without a fixed seed, so that a crystal has other
          clusters in another cell or in another run.

    Weights at the published settings, head included: 122,874 with three convolutions
    and 189,834 with five. The published program creates 134,154 and 201,116, because
    it also holds the cluster attention (4,621), the embedding of the composition
    (6,656) and one PReLU per convolution, and uses none of them.

    Args:
        width: F, of the atom embeddings.
        convolutions: the number of convolutions.
        heads: the number of heads of the attention over neighbours.
        elements: the element table, a name in `crysdistill.structures.elements`.
        cutoff: Å, where the Gaussians end; the graph's cutoff.
        spacing: Å, between Gaussians, and the width of each.
        join_composition: whether to put the embedded composition beside the pooled
            atoms (`concat_comp` of the published program); crystals are then 2 F wide,
            and so are the hidden layers of the published head.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "gatgnn"
    NEEDS: ClassVar[Needs] = Needs(composition=True)
    GRAPH: ClassVar[GraphSettings] = GraphSettings(mode="nearest")
    HEAD: ClassVar[Mapping[str, Any]] = {
        "hidden": 64,
        "layers": 2,
        "activation": "softplus",
        "first": False,
    }
    SMALL: ClassVar[Mapping[str, Any]] = {"width": 8, "convolutions": 2, "heads": 2}

    def __init__(
        self,
        width: int = 64,
        convolutions: int = 3,
        heads: int = 4,
        elements: str = "cgcnn92",
        cutoff: float = 8.0,
        spacing: float = 0.2,
        join_composition: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, width=width, convolutions=convolutions, heads=heads)
        positive(cutoff=cutoff, spacing=spacing)
        self.settings = {
            "width": width,
            "convolutions": convolutions,
            "heads": heads,
            "elements": elements,
            "cutoff": cutoff,
            "spacing": spacing,
            "join_composition": join_composition,
        }
        self.width = width
        self.elements = elements
        steps = round(cutoff / spacing)
        self.expansion = Gaussians(0.0, steps * spacing, steps + 1, spacing)
        self.embedding = Embedding(width, elements, steps + 1)
        self.convolutions = nn.ModuleList(
            AttentionConvolution(width, heads) for _ in range(convolutions)
        )
        self.pooling = AttentionPooling(width, join_composition)
        self.crystal_width = self.pooling.width

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """End the Gaussians at the cutoff of the edges."""
        return {"cutoff": graph.cutoff, **settings}

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`."""
        return self.encode(*self.features(batch), batch, layers)

    def features(self, batch: CrystalBatch) -> tuple[Tensor, Ends]:
        """Return the first vectors of atoms, (N, F), and the Gaussians of edges."""
        distance, place = distinct_distances(batch)
        u = self.expansion(distance)  # (D, K)
        return self.embedding.embed_atoms(batch), find_ends(u, place, batch)

    def encode(
        self, x: Tensor, u: Ends, batch: CrystalBatch, layers: bool = False
    ) -> Embeddings:
        """Encode the result of `features`."""
        edges = self.embedding.embed_edges(u)
        passed = [x]
        for convolution in self.convolutions:
            x = convolution(x, edges, batch)
            passed.append(x)
        crystals = self.pooling(x, batch)
        return Embeddings(x, crystals, layers=tuple(passed if layers else ()))

    def blocks(self) -> Blocks:
        """Return the embedding, each convolution and the pooling."""
        return Blocks(self.embedding, list(self.convolutions), self.pooling)
