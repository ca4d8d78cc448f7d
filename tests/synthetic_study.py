"""Studies with invented numbers, in the files that `crysdistill study` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ARMS = {"scratch": 1.0, "finetuned": 0.85, "distilled": 0.95, "random-teacher": 0.99}
ABOUT = {name: f"what {name} does" for name in ARMS}
BLOCKS = ("embedding", "convolution 1", "convolution 2")


def write_study(
    folder: Path,
    *,
    arms: Mapping[str, float] = ARMS,
    tasks: Sequence[str] = ("modulus", "gap"),
    labels: Sequence[int] = (100, 200, 400),
    seeds: int = 3,
    frozen: Sequence[int | str] = (),
    tested: int = 20,
    names: Sequence[str] = (),
    dataset: Path | None = None,
    failed: int = 0,
    factor: float = 1.0,
    same_test: bool = False,
) -> Path:
    """Write a study and return its folder.

    Args:
        folder: its folder.
        arms: each arm's error as a multiple of the reference arm's.
        tasks: names of tasks.
        labels: numbers of labels.
        seeds: the number of seeds.
        frozen: values of `freeze.convolutions` of the arm `finetuned`.
        tested: test crystals of a run.
        names: material ids of the dataset; invented if empty.
        dataset: the store named in the runs.
        failed: how many of the last runs crashed.
        factor: multiplies all errors.
        same_test: whether all seeds have the same test crystals.
    """
    rng = np.random.default_rng(0)
    pool = np.array(names or [f"m-{i}" for i in range(5 * max(tested, 20))])
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for size in labels:
            for seed in range(seeds):
                luck = rng.normal(1, 0.05)
                order = np.random.default_rng(0 if same_test else seed)
                test = order.permutation(pool)[:tested]
                for arm, share in arms.items():
                    for count in frozen if frozen and arm == "finetuned" else [None]:
                        name = f"{len(rows):04d}"
                        row: dict[str, Any] = {"arm": arm, "task": task}
                        row |= {"target": f"{task}_value", "unit": "eV"}
                        row |= {"metric": "mae", "labels": size, "seed": seed}
                        if frozen:
                            row["freeze.convolutions"] = count
                        cost = 0.0 if count is None else 0.02 * (str(count) == "all")
                        error = factor * (share + cost) * luck * size**-0.5
                        error *= rng.normal(1, 0.01)
                        row |= {"value": error, "validation": error}
                        row |= {"processor": 10.0 * share, "run": f"runs/{name}"}
                        rows.append({**row, "error": ""})
                        _write_run(folder / "runs" / name, row, test, pool, dataset)
    for row in rows[len(rows) - failed :]:
        row |= {"value": np.nan, "error": "out of memory"}
    table = pd.DataFrame(rows)
    table.to_csv(folder / "results.csv", index=False)
    facts = {
        "command": "crysdistill study configs/study.yaml",
        "arms": {arm: f"what {arm} does" for arm in arms},
        "controls": ["random-teacher"],
        "tasks": {
            task: {"dataset": f"{task}.h5", "crystals": len(pool)}
            | {"target": f"{task}_value", "unit": "eV", "split": "random"}
            | {"overlap": f"clean of {task}.h5 (3 left out)"}
            for task in tasks
        },
        "epochs": 5,
        "not_fair": ["the arms of gap have different splits"],
        "tune": {"trials": 8, "chosen": {"runs/0000": {"optimizer.lr": 0.00321}}},
    }
    (folder / "study.json").write_text(json.dumps(facts))
    return folder


def _write_run(
    folder: Path,
    row: Mapping[str, Any],
    test: np.ndarray,
    pool: np.ndarray,
    dataset: Path | None,
) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(test))
    truth = rng.normal(2, 1, len(test))
    signs = np.sign(rng.normal(size=len(test)))
    found = {"material_id": test, "truth": truth}
    found["prediction"] = truth + row["value"] * signs
    if row["arm"] == "finetuned":
        found["sd"] = np.abs(rng.normal(row["value"], 0.1, len(test)))
    pd.DataFrame(found).to_csv(folder / "predictions.csv", index=False)
    epochs = np.arange(5)
    log = {"epoch": epochs, "train_loss": 1 / (1 + epochs), "val_mae": row["value"]}
    pd.DataFrame(log).to_csv(folder / "metrics.csv", index=False)
    subset = np.where(np.isin(pool, test), "test", "train")
    split = pd.DataFrame({"material_id": pool, "subset": subset})
    split.to_csv(folder / "split.csv", index=False)
    results = {
        "labels": row["labels"],
        "drift": {block: 0.1 * i for i, block in enumerate(BLOCKS)},
        "cka": {block: 1 - 0.1 * i for i, block in enumerate(BLOCKS)},
    }
    (folder / "results.json").write_text(json.dumps(results))
    config = {"dataset": str(dataset)} if dataset else {}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text('{"torch": "2.13.0"}')
