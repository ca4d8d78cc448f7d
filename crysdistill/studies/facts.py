"""The facts about a study that its report shows, for `study.json`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from crysdistill import __version__
from crysdistill.store.store import Store
from crysdistill.studies.cells import Cell
from crysdistill.studies.fairness import Draw
from crysdistill.transfer.weights import read_header

_PACKAGES = ("torch", "lightning", "numpy", "scikit-learn", "optuna")


def study_facts(
    cells: Sequence[Cell],
    draws: Mapping[str, Draw],
    overlap: Mapping[tuple[str, str], str],
    unfair: Sequence[str],
    command: str,
) -> dict[str, Any]:
    """Return what the report should know beside the results.

    Args:
        cells: of the study.
        draws: their splits by the name of the cell.
        overlap: by task and weights, whether they saw the dataset.
        unfair: comparisons that are not fair.
        command: that runs the study.
    """
    weights = list(dict.fromkeys(path for _, path in overlap))
    arms = {cell.arm.name: cell.arm for cell in cells}
    sentences = list(dict.fromkeys(overlap.values()))
    epochs = {cell.config.trainer.epochs for cell in cells if _trains(cell)}
    facts: dict[str, Any] = {
        "tasks": {task: _task(cells, draws, task, overlap) for task in _tasks(cells)},
        "arms": {name: arm.about for name, arm in arms.items()},
        "controls": [name for name, arm in arms.items() if arm.control],
        "roles": {name: arm.role for name, arm in arms.items() if arm.role},
        "weights": ", ".join(
            dict.fromkeys(read_header(path).provenance.origin for path in weights)
        ),
        "epochs": min(epochs) if epochs else 0,
        "seeds": list(dict.fromkeys(cell.config.seed for cell in cells)),
        "not_fair": list(unfair),
        "command": command,
        "versions": {
            "crysdistill": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }
    if len(facts["tasks"]) == 1:
        facts["dataset"] = next(iter(facts["tasks"].values()))["about"]
    if len(sentences) == 1:
        facts["overlap"] = sentences[0]
    return facts


def _trains(cell: Cell) -> bool:
    return hasattr(cell.config, "trainer")


def _tasks(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.task for cell in cells))


def _task(
    cells: Sequence[Cell],
    draws: Mapping[str, Draw],
    task: str,
    overlap: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    first = next(cell for cell in cells if cell.task == task)
    config, draw = first.config, draws[first.name]
    crystals = len(Store.open(config.dataset))
    said = dict.fromkeys(text for (name, _), text in overlap.items() if name == task)
    found = {
        "dataset": str(config.dataset),
        "about": f"{config.dataset.name}, {crystals:,} crystals",
        "crystals": crystals,
        "target": "+".join(target.name for target in config.all_targets),
        "unit": draw.unit,
        "metric": draw.metric,
        "split": draw.made_by,
        "tested": draw.tested,
    }
    return {**found, "overlap": "; ".join(said)} if said else found
