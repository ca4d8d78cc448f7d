"""Pretrained weights on the graph of a store."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.store.store import Store
from crysdistill.transfer.side_by_side import SideBySide
from crysdistill.transfer.weights import load_encoder, read_header


def load_pretrained(path: Path, store: Store) -> Encoder:
    """Load an encoder that was trained on the same kind of graph as in a store.

    Raises:
        InputError: the weights cannot be read, are of several encoders, or need another
            graph; the text has the command that builds it.
    """
    check_same_graph(read_header(path).graph, path, store)
    encoder = load_encoder(path)
    if isinstance(encoder, SideBySide):
        raise InputError(
            f"{path} holds {len(encoder.parts)} encoders side by side, and a run "
            "starts from one; give the weights that they came from"
        )
    return encoder


def check_same_graph(graph: GraphSettings, source: str | Path, store: Store) -> None:
    """Refuse a graph that differs from the store's; the error says how to build it."""
    if graph != store.graph:
        new = store.path.with_name(f"{store.path.stem}-{graph.mode}.h5")
        raise InputError(
            f"{source} learned on another graph ({described(graph)}) than {store.path} "
            f"holds ({described(store.graph)}); build that again with `crysdistill "
            f"build {quote(str(store.path))} -o {quote(str(new))} {options(graph)}`"
        )


def described(graph: GraphSettings) -> str:
    """Return a description of a graph in words."""
    most = "" if graph.mode == "radius" else f", {graph.max_neighbors} neighbours"
    return f"`{graph.mode}` within {graph.cutoff:g} Å{most}"


def options(graph: GraphSettings) -> str:
    """Return the options of `build` for a graph."""
    found = f"--graph {graph.mode} --cutoff {graph.cutoff:g}"
    if graph.mode != "radius":
        found += f" --max-neighbors {graph.max_neighbors}"
    return found
