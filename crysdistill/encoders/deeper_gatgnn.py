"""DeeperGATGNN, the graph attention network of 5 to 50 layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs
from crysdistill.graphs.batch import (
    CrystalBatch,
    composition,
    gather_crystals,
    sum_over_atoms,
)
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.layers.atoms import AtomEmbedding
from crysdistill.layers.attention import (
    AugmentedAttention,
    CompositionAttention,
    Ends,
    find_ends,
)
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.distinct import distinct_distances
from crysdistill.layers.group_norm import NORMS
from crysdistill.layers.pooling import Set2Set
from crysdistill.layers.settings import at_least, one_of, positive

COMPOSITION = 108
"""Length of the published composition vector; its first share is of masked atoms."""

POOLINGS = ("attention", "set2set", "published_set2set")


class Embedding(nn.Module):
    """The first vectors of atoms and edges, each after a leaky ReLU."""

    def __init__(self, width: int, elements: str, degrees: int, basis: int) -> None:
        super().__init__()
        self.atoms = AtomEmbedding(width, elements, degrees)
        self.edges = nn.Linear(basis, width)

    def embed_edges(self, u: Ends) -> Ends:
        """Map Gaussians, K wide, to width F."""
        return u._replace(rows=F.leaky_relu(self.edges(u.rows), 0.2))


class DeepConvolution(nn.Module):
    """v_i' = norm(AGAT(v_i)) + v_i; without `skip`, only the first term."""

    def __init__(self, width: int, heads: int, norm: str, skip: bool) -> None:
        super().__init__()
        self.attention = AugmentedAttention(width, heads)
        self.norm = NORMS[norm](width)
        self.skip = skip

    def forward(self, x: Tensor, edges: Ends, batch: CrystalBatch) -> Tensor:
        """Update atoms (N, F) with edges F wide."""
        heard = self.norm(self.attention(x, edges, batch))
        return x + heard if self.skip else heard


class GlobalPooling(nn.Module):
    """The attention over the atoms of a crystal, and their pooling.

    Args:
        width: F, of atoms.
        kind: one of `POOLINGS`.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attention = CompositionAttention(width, COMPOSITION, (width, width))
        self.set2set = None if kind == "attention" else Set2Set(width)
        self.width = self.set2set.width if self.set2set else width

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """Pool atoms (N, F) to crystals (B, F), or (B, 2 F) by set2set."""
        shares = composition(batch, COMPOSITION).to(x.dtype)  # (B, COMPOSITION)
        weights = self.attention(x, shares, batch)  # (N, 1), Eq. 2
        if self.set2set is None:
            return sum_over_atoms(x * weights, batch)
        if self.kind == "set2set":
            # The mean of the weights is one, not their sum, so that a supercell has the
            # same weights as its cell.
            atoms = (batch.ptr[1:] - batch.ptr[:-1]).to(weights.dtype).unsqueeze(1)
            weights = weights * gather_crystals(atoms, batch)
        return self.set2set(x * weights, batch)


class DeeperGATGNN(Encoder):
    """The encoder of DeeperGATGNN: many layers of GATGNN's attention.

    Averaging over many layers makes atoms alike. Two measures prevent this: a
    normalisation within learned groups of atoms, and a skip connection around each
    layer. The normalisation changes atoms little: with fresh weights, atoms grow a
    thousandfold over 30 layers, and tenfold with `norm="batch"`. With `skip=False`,
    that norm gives the GATGNN that the paper compares with.

    Source: S. S. Omee et al., Patterns 3, 100491 (2022),
    doi:10.1016/j.patter.2022.100491; equation numbers are those of this paper.

    Differs from the paper:
        - The default Gaussians are about as wide as their spacing. `PUBLISHED` has the
          published Gaussians, which are 14 times as wide, and the number of neighbours
          beside the element.
        - The published graph is not rebuilt: it has one edge for each pair of atoms at
          their shortest distance, and one of length zero from each atom to itself; the
          smallest and largest distance of the whole data set scale all distances.
        - `set2set` reads atoms whose weights are one on average. In the published
          program they sum to one, so that its result depends on the number of atoms in
          the cell: `published_set2set`.
        - Eq. 2 is printed without an exponential; as in the published code, it is the
          softmax over atoms of a network with two hidden layers.

    Weights at the published settings, head included: 731,426 with 20 convolutions,
    907,786 with 25 and 1,084,146 with 30. The published program creates 5,760 more:
    three group norms in the global attention, which it never uses.

    Args:
        width: F, of the atom embeddings.
        convolutions: the number of convolutions.
        heads: the number of heads of the attention over neighbours.
        elements: the element table, a name in `crysdistill.structures.elements`.
        degrees: columns for the number of neighbours; see `AtomEmbedding`.
        cutoff: Å, where the Gaussians end; the graph's cutoff.
        gaussians: K, the number of Gaussians.
        gaussian_width: Å, w in exp(-((d - mu) / w)^2).
        norm: the norm of atoms, `group`, `batch` or `none`.
        skip: whether a skip connection passes each convolution.
        pooling: `attention` sums atoms with weights that sum to one; `set2set` reads
            the weighted atoms (see above).

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "deeper_gatgnn"
    NEEDS: ClassVar[Needs] = Needs(composition=True)
    GRAPH: ClassVar[GraphSettings] = GraphSettings(mode="nearest")
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "degrees": 14,
        "gaussian_width": 8.0 * 0.2 * math.sqrt(2),
    }
    HEAD: ClassVar[Mapping[str, Any]] = {"hidden": 64, "layers": 0, "first": False}
    SMALL: ClassVar[Mapping[str, Any]] = {"width": 8, "convolutions": 2, "heads": 2}

    def __init__(
        self,
        width: int = 64,
        convolutions: int = 20,
        heads: int = 4,
        elements: str = "onehot",
        degrees: int = 0,
        cutoff: float = 8.0,
        gaussians: int = 50,
        gaussian_width: float = 0.2,
        norm: Literal["group", "batch", "none"] = "group",
        skip: bool = True,
        pooling: Literal["attention", "set2set", "published_set2set"] = "attention",
    ) -> None:
        super().__init__()
        at_least(1, width=width, convolutions=convolutions, heads=heads)
        at_least(2, gaussians=gaussians)
        positive(cutoff=cutoff, gaussian_width=gaussian_width)
        one_of("norm", norm, NORMS)
        one_of("pooling", pooling, POOLINGS)
        self.settings = {
            "width": width,
            "convolutions": convolutions,
            "heads": heads,
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
        self.expansion = Gaussians(0.0, cutoff, gaussians, gaussian_width)
        self.embedding = Embedding(width, elements, degrees, gaussians)
        self.convolutions = nn.ModuleList(
            DeepConvolution(width, heads, norm, skip) for _ in range(convolutions)
        )
        self.pooling = GlobalPooling(width, pooling)
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
        return self.embedding.atoms(batch), find_ends(u, place, batch)

    def encode(
        self, x: Tensor, u: Ends, batch: CrystalBatch, layers: bool = False
    ) -> Embeddings:
        """Encode the result of `features`."""
        x, edges = F.leaky_relu(x, 0.2), self.embedding.embed_edges(u)
        passed = [x]
        for convolution in self.convolutions:
            x = convolution(x, edges, batch)
            if layers:
                passed.append(x)
        crystals = self.pooling(x, batch)
        return Embeddings(x, crystals, layers=tuple(passed if layers else ()))

    def blocks(self) -> Blocks:
        """Return the embedding, each convolution and the pooling."""
        return Blocks(self.embedding, list(self.convolutions), self.pooling)
