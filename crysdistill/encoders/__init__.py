"""Encoders: one architecture per file, from crystal graphs to embeddings."""

from __future__ import annotations

from typing import Any

from crysdistill.encoders.cgcnn import CGCNN
from crysdistill.encoders.encoder import Encoder
from crysdistill.errors import InputError, did_you_mean

ENCODERS: dict[str, type[Encoder]] = {"cgcnn": CGCNN}
"""Encoders by the name that configurations and weights files use."""

__all__ = ["CGCNN", "ENCODERS", "Encoder", "make_encoder"]


def make_encoder(name: str, **settings: Any) -> Encoder:
    """Return a new encoder with random weights.

    Raises:
        InputError: `name` is not one of `ENCODERS`.
    """
    if name not in ENCODERS:
        raise InputError(
            f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}"
            f"{did_you_mean(name, ENCODERS)}"
        )
    return ENCODERS[name](**settings)
