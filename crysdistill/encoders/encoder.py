"""The interface of encoders: their declarations and their results."""

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
    """The embeddings of a batch.

    Args:
        atoms: (N, F).
        crystals: (B, F'), from the encoder's own pooling.
        edges: (E, any width), if the encoder updates edges; else None.
        state: (B, any width), if it has a state of the crystal; else None.
        layers: the atoms after the embedding and after each convolution, (N, F) each;
            empty unless requested.
    """

    atoms: Tensor
    crystals: Tensor
    edges: Tensor | None = None
    state: Tensor | None = None
    layers: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """All weights of an encoder, in the order in which a batch passes them.

    Freezing, learning rates by layer, and drift by layer use these blocks. Every weight
    of the encoder belongs to exactly one block.

    Args:
        embedding: the module that makes the first vectors of atoms, edges and state.
        convolutions: one module for each convolution.
        pooling: the module that pools atoms to crystals; None if it has no weights.
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
    """The inputs that an encoder needs.

    Args:
        graphs: the modes of `GraphSettings` that it can read, the best first.
        triplets: whether it reads angles, which need a row for every pair of edges.
        composition: whether it reads the shares of the elements in the whole crystal.
    """

    graphs: tuple[str, ...] = ("shells", "nearest", "radius")
    triplets: bool = False
    composition: bool = False


@dataclass(frozen=True)
class Work:
    """The least work of a training step, to compare with the limits of a machine.

    Args:
        flops: floating-point operations; a multiply-add counts as two.
        bytes: bytes moved from and to memory.
    """

    flops: float
    bytes: float


class Encoder(nn.Module, ABC):
    """Turns a batch of crystals into embeddings of its atoms and crystals.

    A subclass is one file. The arguments of its constructor are its settings. Keys of
    configurations and the JSON of weights files follow from them, and it gets no other
    arguments.

    Attributes:
        name: the key in `ENCODERS`.
        NEEDS: the inputs that it reads.
        GRAPH: our graph that is nearest to the published one.
        PUBLISHED: settings that reproduce the published program; the defaults may
            correct its faults.
        HEAD: the settings of `PropertyHead` with which it was published.
        SMALL: settings of a network that trains in seconds, for tests and trials.
        width: F, of the atom embeddings.
        crystal_width: F', of the crystal embeddings.
        settings: the arguments that rebuild this encoder, as plain values.
        elements: the name of its element table; None if it has none.
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
        """Return the settings, completed from the graph.

        Args:
            graph: the graph of the store that the encoder will read.
            settings: the given settings, which take precedence.
        """
        return dict(settings)

    @classmethod
    def for_properties(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings to use pretrained weights for a property.

        The shapes of all weights must stay.
        """
        return dict(settings)

    @classmethod
    def check_graph(cls, graph: GraphSettings, source: str) -> None:
        """Refuse a graph that this encoder cannot read.

        Args:
            graph: the graph of a store or of batches.
            source: the store, for the message.

        Raises:
            InputError: the graph cannot be read; the text names suitable graphs and the
                command that builds one.
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
            batch: crystals with a graph that `NEEDS` names.
            layers: whether to return the atoms after each block as well.
        """

    @abstractmethod
    def blocks(self) -> Blocks:
        """Return all weights, block by block."""

    def memory(self, batch: CrystalBatch) -> int | None:
        """Estimate the bytes that a training step needs; None if they are few.

        Encoders override this if their rows can be many times the edges. If memory runs
        out on a CPU, there is no error: the system ends the process.
        """
        return None

    def work(self, crystals: int, atoms: int, edges: int) -> Work | None:
        """Estimate one training step, forward and backward; None if not known.

        Args:
            crystals: B, the number in the batch.
            atoms: N, the number in the batch.
            edges: E, the number in the batch.
        """
        return None
