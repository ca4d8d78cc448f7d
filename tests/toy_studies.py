"""Small studies on small crystals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crysdistill.encoders import make_encoder
from crysdistill.studies.study import StudyConfig
from crysdistill.transfer.weights import save_weights
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH

BASE: dict[str, Any] = {
    "target": {"name": "density", "unit": "1/Å³"},
    "encoder": SMALL_ENCODER,
    "head": {"hidden": 8},
    "split": {"train": 20, "val": 8, "test": 8},
    "trainer": {"epochs": 2, "batch_size": 8, "accelerator": "cpu"},
}


def pretrained(path: Path, width: int = 6) -> Path:
    """Write weights whose architecture differs from that of `SMALL_ENCODER`."""
    torch.manual_seed(7)  # not the seed of a network from scratch
    settings = {**SMALL_ENCODER, "width": width, "bias": False, "normalize": True}
    encoder = make_encoder(**settings, cutoff=SMALL_GRAPH.cutoff)
    return save_weights(path, encoder, SMALL_GRAPH)


def with_base(config: StudyConfig, **keys: Any) -> StudyConfig:
    """Return a study with changed keys of `base`; a section is replaced whole."""
    return replace(config, base={**config.base, **keys})


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text("utf-8"))


def cell_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cell.json").read_text("utf-8"))
