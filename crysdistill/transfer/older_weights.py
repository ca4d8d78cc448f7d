"""Converts the metadata of weights files that earlier versions wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def upgrade(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a weights file as if this version had written it.

    Format 1 (version 0.1) has one target and one normalizer. Its head records the task,
    and a classifier always has two classes, which are not recorded. Some of its files
    have a list `excluded`, which is always empty. Tensor names have not changed since.

    Args:
        facts: the JSON of the file, of any known format.
    """
    new = dict(facts)
    if new["format"] > 1:
        return new
    provenance = dict(new["provenance"])
    provenance.pop("excluded", None)
    new["provenance"] = provenance
    if "head" in new:
        head = dict(new["head"])
        head.pop("task", None)
        new["head"] = head
    if "target" in new:
        new["targets"] = [new.pop("target")]
    if "normalizer" in new:
        scale = dict(new.pop("normalizer"))
        tasks = [target.get("task") for target in new.get("targets", ())]
        if tasks == ["classification"]:
            scale["classes"] = 2
        new["normalizers"] = [scale]
    return new
