"""CGCNN with attention over neighbours in place of its gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs
from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    gather_centres,
    gather_neighbours,
    mean_over_atoms,
    softmax_over_neighbours,
    sum_over_neighbours,
)
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.layers.atoms import AtomEmbedding
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.distinct import distinct_distances
from crysdistill.layers.group_norm import NORMS
from crysdistill.layers.settings import at_least, one_of, positive

SCORES = ("scaled", "published")


class Lengths(NamedTuple):
    """The Gaussians of edges, many of which are equal.

    Args:
        u: (D, K), the Gaussians of the distinct distances.
        place: (E,) int64, the row of each edge.
    """

    u: Tensor
    place: Tensor


class AttentionConvolution(nn.Module):
    """v_i' = v_i + norm(sum_j c_ij * softplus([v_i | v_j | u_ij] W_s + b_s)).

    The shares c_ij are a softmax over the neighbours of i, of

    <v_i, v_j> <u_ij, u_ij> as published, or, for each head h,
    <v_i, v_j>_h / sqrt(F / H) + w_h . u_ij as mended,

    where a head reads its slice of the vectors and weights that slice of the message.
    Products with v are computed once per atom, products with u once per distance.

    Args:
        width: F.
        basis: K, of edges.
        heads: H.
        scores: `scaled` or `published`.
        norm: one of `crysdistill.layers.group_norm.NORMS`.
    """

    def __init__(
        self, width: int, basis: int, heads: int, scores: str, norm: str
    ) -> None:
        super().__init__()
        self.heads = heads
        self.sizes = [width, width, basis]
        self.core = nn.Linear(2 * width + basis, width)  # W_s and b_s
        self.radial = (
            nn.Linear(basis, heads, bias=False) if scores == "scaled" else None
        )
        self.norm = NORMS[norm](width)

    def scores(self, x: Tensor, lengths: Lengths, batch: CrystalBatch) -> Tensor:
        """Return the scores whose softmax gives the shares, (E, H)."""
        both = gather_centres(x, batch) * gather_neighbours(x, batch)  # (E, F)
        inner = both.unflatten(1, (self.heads, -1)).sum(dim=2)  # (E, H)
        if self.radial is None:
            square = lengths.u.square().sum(dim=1, keepdim=True)  # (D, 1)
            return inner * square.index_select(0, lengths.place)
        scaled = inner * math.sqrt(self.heads / x.shape[1])
        return scaled + self.radial(lengths.u).index_select(0, lengths.place)

    def forward(self, x: Tensor, lengths: Lengths, batch: CrystalBatch) -> Tensor:
        """Update atoms (N, F)."""
        centre, neighbour, edge = self.core.weight.split(self.sizes, dim=1)
        z = F.linear(lengths.u, edge, self.core.bias).index_select(0, lengths.place)
        z = z + gather_centres(F.linear(x, centre), batch)
        z = z + gather_neighbours(F.linear(x, neighbour), batch)  # (E, F)
        shares = softmax_over_neighbours(self.scores(x, lengths, batch), batch)
        messages = F.softplus(z).unflatten(1, (self.heads, -1)) * shares.unsqueeze(2)
        return x + self.norm(sum_over_neighbours(messages.flatten(1), batch))


class AttentionCGCNN(Encoder):
    """CGCNN that weights neighbours by attention instead of a gate.

    A convolution has half the weights of CGCNN's Eq. 5, whose gate is as large as its
    core.

    Source: S. Deng, J. Park and A. Sy, "Transfer Learning and Representations for
    Material Properties", a report of the University of California, Berkeley, section
    4.2. It builds on T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
    doi:10.1103/PhysRevLett.120.145301.

    Differs from the paper:
        - The published exponent <v_i, v_j> <u, u> grows with the width and with the
          sums of the layers. Exponentials overflow; if the largest exponent is
          subtracted first, as here, one neighbour gets the whole weight. And <u, u>
          hardly depends on the distance: if Gaussians are as wide as their spacing, it
          is 1.25 within 1.5 % for all distances except those at both ends. `scaled`
          divides by the root of the width and adds a learned function of the distance.
        - The paper puts several networks side by side and joins them at the end. Here
          several heads do this in each layer, without more weights.
        - The defaults have a batch norm, which the paper does not print. CGCNN's code,
          on which it builds, has one there.

    Args:
        width: F, of the atom and crystal embeddings.
        convolutions: the number of convolutions.
        heads: the number of attention heads; `width` is a multiple of it.
        scores: the scores of the attention, `scaled` or `published`.
        norm: the norm of the sum over neighbours, `batch`, `group` or `none`.
        elements: the element table, a name in `crysdistill.structures.elements`.
        cutoff: Å, where the Gaussians end; the graph's cutoff.
        spacing: Å, between Gaussians, and the width of each.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "attention_cgcnn"
    GRAPH: ClassVar[GraphSettings] = GraphSettings(mode="nearest")
    NEEDS: ClassVar[Needs] = Needs()
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "heads": 1,
        "scores": "published",
        "norm": "none",
    }
    HEAD: ClassVar[Mapping[str, Any]] = {"hidden": 128, "layers": 1}
    SMALL: ClassVar[Mapping[str, Any]] = {"width": 8, "convolutions": 2, "heads": 2}

    def __init__(
        self,
        width: int = 64,
        convolutions: int = 4,
        heads: int = 4,
        scores: Literal["scaled", "published"] = "scaled",
        norm: Literal["batch", "group", "none"] = "batch",
        elements: str = "cgcnn92",
        cutoff: float = 8.0,
        spacing: float = 0.2,
    ) -> None:
        super().__init__()
        at_least(1, width=width, convolutions=convolutions, heads=heads)
        if width % heads:
            raise InputError(
                f"`width` is {width} but must be a multiple of `heads`, {heads}"
            )
        one_of("scores", scores, SCORES)
        one_of("norm", norm, NORMS)
        positive(cutoff=cutoff, spacing=spacing)
        self.settings = {
            "width": width,
            "convolutions": convolutions,
            "heads": heads,
            "scores": scores,
            "norm": norm,
            "elements": elements,
            "cutoff": cutoff,
            "spacing": spacing,
        }
        self.width = self.crystal_width = width
        self.elements = elements
        steps = round(cutoff / spacing)
        self.expansion = Gaussians(0.0, steps * spacing, steps + 1, spacing)
        self.embedding = AtomEmbedding(width, elements)
        self.convolutions = nn.ModuleList(
            AttentionConvolution(width, steps + 1, heads, scores, norm)
            for _ in range(convolutions)
        )

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """End the Gaussians at the cutoff of the edges."""
        return {"cutoff": graph.cutoff, **settings}

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`."""
        return self.encode(*self.features(batch), batch, layers)

    def features(self, batch: CrystalBatch) -> tuple[Tensor, Lengths]:
        """Return the first vectors of atoms, (N, F), and the Gaussians of edges."""
        distance, place = distinct_distances(batch)
        return self.embedding(batch), Lengths(self.expansion(distance), place)

    def encode(
        self, x: Tensor, lengths: Lengths, batch: CrystalBatch, layers: bool = False
    ) -> Embeddings:
        """Encode the result of `features`."""
        passed = [x]
        for convolution in self.convolutions:
            x = convolution(x, lengths, batch)
            passed.append(x)
        crystals = mean_over_atoms(x, batch)
        return Embeddings(x, crystals, layers=tuple(passed if layers else ()))

    def blocks(self) -> Blocks:
        """Return the embedding and then each convolution."""
        return Blocks(self.embedding, list(self.convolutions))
