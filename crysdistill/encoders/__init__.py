"""Encoders: one architecture per file, from crystal graphs to embeddings."""

from __future__ import annotations

import inspect
from typing import Any

from crysdistill.encoders.alignn import ALIGNN
from crysdistill.encoders.attention_cgcnn import AttentionCGCNN
from crysdistill.encoders.cgcnn import CGCNN
from crysdistill.encoders.crysxpp import CrysXPP
from crysdistill.encoders.deeper_gatgnn import DeeperGATGNN
from crysdistill.encoders.encoder import Blocks, Embeddings, Encoder, Needs, Work
from crysdistill.encoders.gatgnn import GATGNN
from crysdistill.encoders.megnet import MEGNet
from crysdistill.encoders.mpnn import MPNN
from crysdistill.encoders.schnet import SchNet
from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.neighbors import GraphSettings

ENCODERS: dict[str, type[Encoder]] = {
    "alignn": ALIGNN,
    "attention_cgcnn": AttentionCGCNN,
    "cgcnn": CGCNN,
    "crysxpp": CrysXPP,
    "deeper_gatgnn": DeeperGATGNN,
    "gatgnn": GATGNN,
    "megnet": MEGNet,
    "mpnn": MPNN,
    "schnet": SchNet,
}
"""Encoders by the name that configurations and weights files use."""

__all__ = [
    "ENCODERS",
    "Blocks",
    "Embeddings",
    "Encoder",
    "Needs",
    "Work",
    "find_encoder",
    "make_encoder",
]


def make_encoder(
    name: str,
    graph: GraphSettings | None = None,
    *,
    source: str = "the store",
    published: bool = False,
    **settings: Any,
) -> Encoder:
    """Return a new encoder with random weights.

    Args:
        name: one of `ENCODERS`.
        graph: the graph that it will read. Settings that are not given, such as a
            cutoff, may follow from it.
        source: the name of the source of that graph, for messages.
        published: whether to start from the published settings instead of ours.
        settings: the settings of the encoder.

    Raises:
        InputError: the name or a setting is not known, a value is out of range, or the
            encoder cannot read the graph.
    """
    kind = find_encoder(name)
    known = inspect.signature(kind).parameters
    for key in settings:
        if key not in known:
            raise InputError(
                f"encoder `{name}` has no setting `{key}`; choose one of "
                f"{', '.join(known)}{did_you_mean(key, known)}"
            )
    if published:
        settings = {**kind.PUBLISHED, **settings}
    if graph is not None:
        kind.check_graph(graph, source)
        settings = kind.for_graph(graph, settings)
    return kind(**settings)


def find_encoder(name: str) -> type[Encoder]:
    """Return the encoder of that name.

    Raises:
        InputError: `name` is not one of `ENCODERS`.
    """
    if name not in ENCODERS:
        raise InputError(
            f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}"
            f"{did_you_mean(name, ENCODERS)}"
        )
    return ENCODERS[name]
