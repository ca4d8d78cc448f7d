"""MEGNet, the graph network of atoms, bonds and a state of the whole crystal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs
from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    gather_crystals,
    mean_over_atoms,
    mean_over_edges,
    mean_over_neighbours,
)
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.layers.atoms import AtomEmbedding
from crysdistill.layers.basis import Gaussians
from crysdistill.layers.dense import ACTIVATIONS, Dense
from crysdistill.layers.distinct import DistinctEdges, distinct_edges
from crysdistill.layers.group_norm import NORMS
from crysdistill.layers.pooling import Set2Set, edges_as_atoms
from crysdistill.layers.settings import at_least, one_of, positive

ABSENT = {"none": (), "mp2018": (84, 85, 86, 87, 88, *range(95, 101))}
"""Elements without an embedding; the published weights lack Po to Ra and beyond Pu."""


class Inputs(NamedTuple):
    """The inputs of the embeddings: N atoms, D kinds of edges, B crystals.

    Args:
        atoms: (N, atom width).
        edges: (D, K), the Gaussians of each kind of edge.
        state: (B, numbers of the state).
        kinds: the kind of each edge; None if each edge is its own kind, in order.
            Edges of a kind have the same length, the same atoms and the same state.
    """

    atoms: Tensor
    edges: Tensor
    state: Tensor
    kinds: DistinctEdges | None = None


class Embedding(nn.Module):
    """The first vectors of atoms, edges and the state, all of width F.

    Args:
        settings: those of `MEGNet`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        s, activation = settings, settings["activation"]
        width, hidden, inputs = s["width"], s["hidden"], s["state_inputs"]
        self.dense = s["embedding"] == "dense"
        self.activation = ACTIVATIONS[activation]
        self.elements = AtomEmbedding(
            s["atom_width"],
            s["elements"],
            s["degrees"],
            bias=self.dense,
            absent=ABSENT[s["absent"]],
        )
        self.atoms = Dense((s["atom_width"], hidden, width), activation)
        self.edges = Dense((s["gaussians"], hidden, width), activation)
        self.state = (
            Dense((inputs, hidden, width), activation)
            if inputs
            else LearnedStart(width)
        )

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return atoms (N, F), edges (D, F) by kind, and states (B, F)."""
        x = self.activation(inputs.atoms) if self.dense else inputs.atoms
        return self.atoms(x), self.edges(inputs.edges), self.state(inputs.state)


class LearnedStart(nn.Module):
    """The same learned vector for every crystal, if nothing is known of its state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(width))

    def forward(self, state: Tensor) -> Tensor:
        """Map (B, 0) to (B, F)."""
        return self.start.expand(len(state), -1)


class Block(nn.Module):
    """The MEGNet block: it updates edges, then atoms, then the state.

    e_ij' = phi_e(v_j, v_i, e_ij, u)                             (Eq. 1)
    v_i'  = phi_v(v_i, mean over neighbours of e_ij', u)         (Eqs. 2 and 3)
    u'    = phi_u(mean of e', mean of v', u)                     (Eqs. 4 to 6)

    The input of the block is added to its output. Except in the first block, each input
    of phi first passes a dense layer.

    Args:
        settings: those of `MEGNet`.
        first: whether this is the first block.
    """

    def __init__(self, settings: Mapping[str, Any], first: bool) -> None:
        super().__init__()
        width, hidden = settings["width"], settings["hidden"]
        activation, norm = settings["activation"], settings["norm"]
        self.atom_by_atom = settings["edge_mean"] == "atoms"
        # In the first block, edges of a kind have equal inputs, and so equal outputs,
        # unless a norm counts the edges.
        self.keeps_kinds = first and norm == "none"
        self.dense = nn.ModuleDict(
            {
                name: Dense((width, hidden, width), activation)
                for name in (() if first else ("atoms", "edges", "state"))
            }
        )
        after = [hidden] * (settings["layers"] - 1) + [width]
        more = (activation, norm, settings["skip"])
        self.edges = Dense((4 * width, *after), *more)
        self.atoms = Dense((3 * width, *after), *more)
        self.state = Dense((3 * width, *after), *more)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        u: Tensor,
        batch: CrystalBatch,
        kinds: DistinctEdges | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, DistinctEdges | None]:
        """Update atoms (N, F), edges (E, F) and states (B, F).

        With `kinds` of edges, `e` has a row for each kind, (D, F). The result has such
        rows, too, as long as edges of a kind stay equal.
        """
        before = (x, e, u)
        if self.dense:
            x, e, u = (
                self.dense[name](value)
                for name, value in (("atoms", x), ("edges", e), ("state", u))
            )
        e = self.update_edges(x, e, u, batch, kinds)
        if kinds is not None and not self.keeps_kinds:
            before = (before[0], before[1].index_select(0, kinds.place), before[2])
            kinds = None
        every = e if kinds is None else e.index_select(0, kinds.place)  # (E, F)
        heard = mean_over_neighbours(every, batch)  # (N, F)
        x = self.atoms(torch.cat((x, heard, gather_crystals(u, batch)), dim=1))
        if self.atom_by_atom:
            edges = mean_over_atoms(heard, batch)  # (B, F)
        else:
            edges = mean_over_edges(every, batch)
        u = self.state(torch.cat((edges, mean_over_atoms(x, batch), u), dim=1))
        return before[0] + x, before[1] + e, before[2] + u, kinds

    def update_edges(
        self,
        x: Tensor,
        e: Tensor,
        u: Tensor,
        batch: CrystalBatch,
        kinds: DistinctEdges | None,
    ) -> Tensor:
        """Return phi_e of [v_j | v_i | e_ij | u], (E, F), or (D, F) of kinds that stay.

        The first layer multiplies v_j, v_i and u once per atom and crystal, and e_ij
        once per kind.
        """
        first: Any = self.edges.linears[0]
        neighbour, centre, edge, state = first.weight.chunk(4, dim=1)
        there = F.linear(x, neighbour)  # (N, F_h)
        here = F.linear(x, centre, first.bias)
        here = here + gather_crystals(F.linear(u, state), batch)
        z = F.linear(e, edge)  # (E, F_h) or (D, F_h)
        ends = batch.edge_index
        if kinds is not None:
            if self.keeps_kinds:
                ends = ends[:, kinds.example]
            else:
                z = z.index_select(0, kinds.place)
        z += there.index_select(0, ends[0])
        z += here.index_select(0, ends[1])
        return self.edges.finish(z)


class Readout(nn.Module):
    """Pools atoms, edges and state to one vector, [atoms | edges | state].

    Args:
        settings: those of `MEGNet`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width, steps = settings["width"], settings["steps"]
        reads = settings["pooling"] == "set2set"
        self.atom_by_atom = settings["edge_mean"] == "atoms"
        self.atoms = Set2Set(width, steps) if reads else None
        self.edges = Set2Set(width, steps) if reads else None
        self.width = (5 if reads else 3) * width

    def forward(self, x: Tensor, e: Tensor, u: Tensor, batch: CrystalBatch) -> Tensor:
        """Return (B, 5 F), or (B, 3 F) for means."""
        if self.atoms and self.edges:
            atoms = self.atoms(x, batch)  # (B, 2 F)
            edges = self.edges(e, edges_as_atoms(batch))
        else:
            atoms = mean_over_atoms(x, batch)  # (B, F)
            if self.atom_by_atom:
                edges = mean_over_atoms(mean_over_neighbours(e, batch), batch)
            else:
                edges = mean_over_edges(e, batch)
        return torch.cat((atoms, edges, u), dim=1)


class MEGNet(Encoder):
    """MEGNet, in the form of its authors or of MatDeepLearn.

    Sources: C. Chen et al., Chem. Mater. 31, 3564 (2019),
    doi:10.1021/acs.chemmater.9b01294; `PUBLISHED` reads the weights that its authors
    publish with matgl. V. Fung et al., npj Comput. Mater. 7, 84 (2021),
    doi:10.1038/s41524-021-00554-0, whose program (MatDeepLearn) `MATDEEPLEARN`
    reproduces. The deep form: S. S. Omee et al., Patterns 3, 100491 (2022),
    doi:10.1016/j.patter.2022.100491.

    Differs from the paper:
        - By default the state starts from a learned vector. The published programs
          start from numbers that are zero for every crystal (`state_inputs`), so that
          their weights learn nothing: 128 in matgl, 300 in MatDeepLearn.
        - `PUBLISHED` has the Gaussians of matgl, whose width of 0.5 multiplies the
          square; in the paper it divides the square. It has embeddings for 89 elements;
          others look like a masked atom.
        - Edges are averaged at the atom where they arrive, as in the paper and in the
          matgl of the published weights. Later versions of matgl average them at the
          atom where they start.
        - `MATDEEPLEARN` has a batch norm after each activation, the number of
          neighbours beside the element, means in place of set2set, and means over
          edges atom by atom. Its own graph is not rebuilt: it has one edge for each
          pair of atoms at their shortest distance, and one from each atom to itself;
          the smallest and largest distance of the whole data set scale all distances.
          It averages where edges start, which is the same with reversed edges.
        - In the deep form (`norm="group"`, `skip=True`) one skip connection passes each
          block. The published program adds the input of a block twice, so that it
          doubles with every block.

    Args:
        width: F, of atoms, edges and state.
        hidden: F_h, of the hidden layers.
        convolutions: the number of blocks.
        layers: the number of layers in each update network.
        elements: the element table.
        absent: elements without an embedding, `none` or `mp2018`.
        embedding: the embedding of elements, `lookup`, or `dense` with bias and
            activation.
        atom_width: the width of that embedding.
        degrees: columns for the number of neighbours; see `AtomEmbedding`.
        state_inputs: the number of zeros in the first state; 0 for a learned vector.
        cutoff: Å, the cutoff of the graph.
        gaussians: K, the number of Gaussians.
        gaussian_width: Å, w in exp(-((d - mu) / w)^2).
        beyond: Å, how far the Gaussians extend beyond the cutoff.
        activation: `shifted_softplus` or `relu`.
        norm: the norm in the update networks, `none`, `batch` or `group`.
        skip: whether skip connections pass the layers of the update networks.
        edge_mean: the mean of a crystal's edges, over its `edges` or first at each of
            its `atoms`.
        pooling: the pooling of atoms and edges to crystals, `set2set` or `mean`.
        steps: the number of steps of set2set.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "megnet"
    NEEDS: ClassVar[Needs] = Needs(graphs=("radius", "shells", "nearest"))
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "absent": "mp2018",
        "state_inputs": 2,
        "cutoff": 4.0,
        "gaussian_width": math.sqrt(2),
    }
    MATDEEPLEARN: ClassVar[Mapping[str, Any]] = {
        "width": 100,
        "hidden": 100,
        "convolutions": 4,
        "layers": 2,
        "embedding": "dense",
        "atom_width": 100,
        "degrees": 14,
        "state_inputs": 3,
        "cutoff": 8.0,
        "gaussians": 50,
        "gaussian_width": 8.0 * 0.2 * math.sqrt(2),
        "beyond": 0.0,
        "activation": "relu",
        "norm": "batch",
        "edge_mean": "atoms",
        "pooling": "mean",
    }
    """The settings of the program MatDeepLearn."""
    HEAD: ClassVar[Mapping[str, Any]] = {
        "hidden": 32,
        "layers": 2,
        "activation": "shifted_softplus",
        "first": False,
    }
    SMALL: ClassVar[Mapping[str, Any]] = {
        "width": 8,
        "hidden": 8,
        "convolutions": 2,
        "layers": 2,
        "atom_width": 8,
    }

    def __init__(
        self,
        width: int = 32,
        hidden: int = 64,
        convolutions: int = 3,
        layers: int = 3,
        elements: str = "onehot",
        absent: Literal["none", "mp2018"] = "none",
        embedding: Literal["lookup", "dense"] = "lookup",
        atom_width: int = 16,
        degrees: int = 0,
        state_inputs: int = 0,
        cutoff: float = 4.0,
        gaussians: int = 100,
        gaussian_width: float = 0.5,
        beyond: float = 1.0,
        activation: Literal["shifted_softplus", "relu"] = "shifted_softplus",
        norm: Literal["none", "batch", "group"] = "none",
        skip: bool = False,
        edge_mean: Literal["edges", "atoms"] = "edges",
        pooling: Literal["set2set", "mean"] = "set2set",
        steps: int = 2,
    ) -> None:
        super().__init__()
        at_least(1, width=width, hidden=hidden, convolutions=convolutions)
        at_least(1, layers=layers, atom_width=atom_width, steps=steps)
        at_least(2, gaussians=gaussians)
        at_least(0, state_inputs=state_inputs)
        positive(cutoff=cutoff, gaussian_width=gaussian_width)
        if not beyond >= 0:
            raise InputError(f"`beyond` is {beyond} but must not be negative")
        for name, value, known in (
            ("absent", absent, ABSENT),
            ("embedding", embedding, ("lookup", "dense")),
            ("activation", activation, ACTIVATIONS),
            ("norm", norm, NORMS),
            ("edge_mean", edge_mean, ("edges", "atoms")),
            ("pooling", pooling, ("set2set", "mean")),
        ):
            one_of(name, value, known)
        self.settings = {
            "width": width,
            "hidden": hidden,
            "convolutions": convolutions,
            "layers": layers,
            "elements": elements,
            "absent": absent,
            "embedding": embedding,
            "atom_width": atom_width,
            "degrees": degrees,
            "state_inputs": state_inputs,
            "cutoff": cutoff,
            "gaussians": gaussians,
            "gaussian_width": gaussian_width,
            "beyond": beyond,
            "activation": activation,
            "norm": norm,
            "skip": skip,
            "edge_mean": edge_mean,
            "pooling": pooling,
            "steps": steps,
        }
        self.width = width
        self.elements = elements
        self.state_inputs = state_inputs
        self.expansion = Gaussians(0.0, cutoff + beyond, gaussians, gaussian_width)
        self.embedding = Embedding(self.settings)
        self.convolutions = nn.ModuleList(
            Block(self.settings, first=k == 0) for k in range(convolutions)
        )
        self.pooling = Readout(self.settings)
        self.crystal_width = self.pooling.width

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """End the Gaussians beyond the cutoff of the edges."""
        return {"cutoff": graph.cutoff, **settings}

    def features(self, batch: CrystalBatch) -> Inputs:
        """Return the inputs of the embeddings."""
        elements = self.embedding.elements
        kinds = distinct_edges(batch, elements.kinds(batch))
        return Inputs(
            elements(batch),
            self.expansion(kinds.distances),
            batch.cell.new_zeros(batch.num_graphs, self.state_inputs),
            kinds,
        )

    def encode(
        self, inputs: Inputs, batch: CrystalBatch, layers: bool = False
    ) -> Embeddings:
        """Encode the result of `features`."""
        x, e, u = self.embedding(inputs)
        passed, kinds = [x], inputs.kinds
        for convolution in self.convolutions:
            x, e, u, kinds = convolution(x, e, u, batch, kinds)
            passed.append(x)
        if kinds is not None:
            e = e.index_select(0, kinds.place)  # (E, F)
        return Embeddings(
            atoms=x,
            crystals=self.pooling(x, e, u, batch),
            edges=e,
            state=u,
            layers=tuple(passed if layers else ()),
        )

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; see `Encoder`."""
        return self.encode(self.features(batch), batch, layers)

    def blocks(self) -> Blocks:
        """Return the embedding, each block, and the pooling if it has weights."""
        pooling = self.pooling if self.pooling.atoms else None
        return Blocks(self.embedding, list(self.convolutions), pooling)
