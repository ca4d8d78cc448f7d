"""What every encoder declares and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.graphs.neighbors import GraphSettings


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What an encoder made of a batch.

    Args:
        atoms: (N, F).
        crystals: (B, F'), from the encoder's own pooling.
        edges: (E, any width), where the encoder updates edges; else None.
        state: (B, any width), where it has a state of the crystal; else None.
        layers: the atoms after the embedding and after each convolution, (N, F) each;
            empty unless they were asked for.
    """

    atoms: Tensor
    crystals: Tensor
    edges: Tensor | None = None
    state: Tensor | None = None
    layers: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """All weights of an encoder, in the order in which a batch meets them.

    Freezing, learning rates by layer, and drift by layer read this. Every weight of
    the encoder belongs to exactly one block.

    Args:
        embedding: what makes the first vectors of atoms, edges and state.
        convolutions: one module for each.
        pooling: from atoms to crystals; None where that has no weights.
    """

    embedding: nn.Module
    convolutions: Sequence[nn.Module]
    pooling: nn.Module | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        """Yield the blocks in order."""
        yield self.embedding
        yield from self.convolutions
        if self.pooling is not None:
            yield self.pooling


@dataclass(frozen=True, slots=True)
class Needs:
    """What an encoder wants to be given.

    Args:
        graphs: the modes of `GraphSettings` that it can read, the best first.
        triplets: whether it reads angles, which cost a row for every pair of edges.
        composition: whether it reads the shares of the elements in the whole crystal.
    """

    graphs: tuple[str, ...] = ("shells", "nearest", "radius")
    triplets: bool = False
    composition: bool = False


@dataclass(frozen=True)
class Work:
    """What a training step must do at least, to compare it with a machine's ceiling.

    Args:
        flops: floating-point operations; a multiply-add counts as two.
        bytes: moved from and to memory.
    """

    flops: float
    bytes: float


class Encoder(nn.Module, ABC):
    """From a batch of crystals to embeddings of its atoms and crystals.

    A subclass is one file. Its constructor's arguments are its settings: keys of
    configurations and the JSON of weights files follow from them, and nothing is
    passed that it does not name.

    Attributes:
        name: the key in `ENCODERS`.
        NEEDS: what it reads of a batch.
        GRAPH: the graph with which it was published, as near as our modes come.
        PUBLISHED: settings that reproduce the published program; the defaults may
            mend it.
        HEAD: the settings of `PropertyHead` with which it was published.
        SMALL: settings of a network that trains in seconds, for tests and trials.
        width: F, of the atom embeddings.
        crystal_width: F', of the crystal embeddings.
        settings: the arguments that rebuild this encoder, as plain values.
        elements: the name of its element table; None where it has none.
    """

    name: ClassVar[str]
    NEEDS: ClassVar[Needs] = Needs()
    GRAPH: ClassVar[GraphSettings] = GraphSettings()
    PUBLISHED: ClassVar[Mapping[str, Any]] = {}
    HEAD: ClassVar[Mapping[str, Any]] = {}
    SMALL: ClassVar[Mapping[str, Any]] = {}
    width: int
    crystal_width: int
    settings: dict[str, Any]
    elements: str | None = None

    @classmethod
    def for_graph(
        cls, graph: GraphSettings, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return settings in which what was left open follows from the graph.

        Args:
            graph: that of the store which the encoder will read.
            settings: what was given; it stands.
        """
        return dict(settings)

    @classmethod
    def for_properties(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings with which pretrained weights go on to a property.

        The shapes of all weights must stay.
        """
        return dict(settings)

    @classmethod
    def check_graph(cls, graph: GraphSettings, source: str) -> None:
        """Refuse a graph that this encoder cannot read.

        Args:
            graph: that of a store or of batches.
            source: the store, for the message.

        Raises:
            InputError: the text names the graphs that would do, and the command.
        """
        wanted = cls.NEEDS.graphs
        if graph.mode not in wanted:
            raise InputError(
                f"encoder `{cls.name}` reads graphs of mode {' or '.join(wanted)}, but "
                f"{source} holds mode {graph.mode}; build one with `crysdistill build "
                f"{source} -o NEW.h5 --graph {wanted[0]} --cutoff {graph.cutoff:g}`"
            )

    @abstractmethod
    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch.

        Args:
            batch: of crystals, with a graph that `NEEDS` names.
            layers: whether to return the atoms after each block as well.
        """

    @abstractmethod
    def blocks(self) -> Blocks:
        """Return all weights, block by block."""

    def memory(self, batch: CrystalBatch) -> int | None:
        """Estimate the bytes that a training step needs; None where that is little.

        For encoders whose rows can be many times the edges: a CPU does not say that it
        runs out of memory, the system ends the process.
        """
        return None

    def work(self, crystals: int, atoms: int, edges: int) -> Work | None:
        """Estimate one training step, forward and backward; None where not known.

        Args:
            crystals: B, in the batch.
            atoms: N, in the batch.
            edges: E, in the batch.
        """
        return None
