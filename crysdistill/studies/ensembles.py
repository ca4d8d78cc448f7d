"""Ensembles: several networks of one kind, whose mean predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from crysdistill.schema import dump_config
from crysdistill.splits import make_split
from crysdistill.store.store import Store
from crysdistill.studies.readouts import judged_elsewhere
from crysdistill.training.engine import device_of
from crysdistill.training.judging import (
    one_column,
    results_of,
    subsets_of,
    tested,
    write_predictions,
)
from crysdistill.training.labelled import LabelledConfig
from crysdistill.training.runs import open_run
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.scores import Scores
from crysdistill.transfer.spread import Watched, fit_factor
from crysdistill.transfer.stack import Stack
from crysdistill.transfer.weights import load_predictor, read_header, save_weights

_KEPT = (
    *("labels", "dataset", "overlap", "overlap_at_most"),
    *("split", "split_by", "test_set"),
)


def run_ensemble(
    run_one: Callable[[Any], Path], config: LabelledConfig, repeats: int
) -> Path:
    """Train networks that differ in their seeds, and judge their mean.

    All have the same split. Networks that an interrupted run has trained are reused.

    Args:
        run_one: trains one network.
        config: of the networks; `out` is the folder of the ensemble.
        repeats: the number of networks.

    Returns:
        The path of the weights file.

    Raises:
        InputError: the dataset or a setting cannot be used.
    """
    store, names = Store.open(config.dataset), [t.name for t in config.all_targets]
    labels = np.stack([store.property(name) for name in names], axis=1)
    split = make_split(store, config.split, one_column(labels))
    text = dump_config(config)
    with open_run(config.out, text, config.resume, config.overwrite, parts=True) as run:
        split.write(run.path / "split.csv", store.material_ids)
        folders = [run.path / f"network-{k}" for k in range(repeats)]
        for k, folder in enumerate(folders):
            if not (folder / "results.json").exists():
                own = {"out": folder, "seed": config.seed * 1000 + k, "resume": True}
                run_one(replace(config, **own))  # type: ignore[arg-type]
        members = [load_predictor(f / "weights.safetensors") for f in folders]
        stack = Stack([one for one in members if isinstance(one, Predictor)])
        device, outputs = device_of(config.trainer), stack.outputs
        stack.to(device)
        other = judged_elsewhere(config, store, split, outputs)
        found, kinds = {}, Scores(outputs).kinds
        factors: dict[str, float] = {}
        for name, subset in subsets_of(store, split, names, other).items():
            watched = Watched(stack)
            scores, output, known = tested(watched, subset.batches(device))
            found[name], sd = scores.compute(), watched.sd()
            if name == "val" and sd is not None:
                factors = _factors(outputs, sd, known, output)
            if name == "test":
                write_predictions(run, subset, outputs, known, output, sd)
        one = json.loads((folders[0] / "results.json").read_text("utf-8"))
        about = {name: one[name] for name in _KEPT if name in one}
        about |= {"seed": config.seed, "networks": repeats, "sd_factor": factors}
        run.write_json("results.json", {**about, **results_of(outputs, kinds, found)})
        provenance = read_header(folders[0] / "weights.safetensors").provenance
        return save_weights(run.weights, stack.to("cpu"), provenance=provenance)


def _factors(
    outputs: Outputs, sd: Tensor, known: Tensor, output: Tensor
) -> dict[str, float]:
    """Return for each target by what its spread must be multiplied to be right."""
    errors = outputs.predictions(output) - known  # (B, T)
    pairs = zip(outputs.names, sd.unbind(1), errors.unbind(1), strict=True)
    found = {name: fit_factor(spread, error) for name, spread, error in pairs}
    return {name: factor for name, factor in found.items() if factor is not None}
