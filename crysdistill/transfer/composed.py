"""Encoders that no configuration names, rebuilt from a weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from crysdistill.encoders import Encoder, find_encoder
from crysdistill.transfer.side_by_side import SideBySide

BUILDERS: dict[str, Callable[..., Encoder]] = {}
"""By name, what makes such an encoder from its settings. A module that defines one adds
it here."""

_ADDED_BY = {"teacher": "crysdistill.teachers.frozen"}
# That module needs weights files itself; so it is imported when a file needs it.


def build_encoder(recipe: Mapping[str, Any]) -> Encoder:
    """Return the encoder that a weights file describes, with random weights.

    Args:
        recipe: `name` and `settings`.

    Raises:
        InputError: there is no encoder of that name, or it cannot be built here.
        KeyError, TypeError: the settings do not fit.
    """
    name, settings = str(recipe.get("name")), recipe.get("settings", {})
    if name == SideBySide.name:
        return SideBySide([build_encoder(one) for one in settings["encoders"]])
    if name in _ADDED_BY:
        import_module(_ADDED_BY[name])
        return BUILDERS[name](**settings)
    # Random weights are replaced later: leave the caller's random state alone.
    with torch.random.fork_rng(devices=[]):
        return find_encoder(name)(**settings)
