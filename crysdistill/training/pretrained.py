"""Pretrained weights on the graph of a store."""

from __future__ import annotations

from pathlib import Path

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.store.store import Store
from crysdistill.transfer.weights import load_encoder, read_header


def load_pretrained(path: Path, store: Store) -> Encoder:
    """Load an encoder that learned on the kind of graph that a store holds.

    Raises:
        InputError: the weights cannot be read, or know another graph; the text has the
            command that builds it.
    """
    check_same_graph(read_header(path).graph, path, store)
    return load_encoder(path)


def check_same_graph(graph: GraphSettings, source: str | Path, store: Store) -> None:
    """Refuse a graph that the store does not hold, and say how to build it."""
    if graph != store.graph:
        raise InputError(
            f"{source} learned on another graph than {store.path} holds; build that "
            f"again with `crysdistill build {store.path} -o NEW.h5 {options(graph)}`"
        )


def options(graph: GraphSettings) -> str:
    """Return the options of `build` for a graph."""
    found = f"--graph {graph.mode} --cutoff {graph.cutoff:g}"
    if graph.mode != "radius":
        found += f" --max-neighbors {graph.max_neighbors}"
    return found
