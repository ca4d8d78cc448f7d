"""A comparison: arms x numbers of labels x seeds, resumable cell by cell."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from sklearn.metrics import roc_auc_score

from crysdistill.errors import InputError
from crysdistill.schema import dump_config
from crysdistill.splits import read_split
from crysdistill.store.store import Store
from crysdistill.studies.arms import Arm, make_arm
from crysdistill.studies.baselines import BASELINES
from crysdistill.training.train import TrainConfig
from crysdistill.transfer.seen import seen
from crysdistill.transfer.weights import read_header


@dataclass
class CompareConfig:
    """A comparison of ways to use pretrained weights.

    Args:
        weights: the weights file of the pretrained encoder.
        base: the settings that all arms share: dataset, target, split, optimizer,
            trainer.
        out: the study's folder; every run lies in `OUT/runs/`.
        arms: the arms to compare; see `crysdistill.studies.arms`.
        baselines: predictors without a graph to show beside the arms.
        labels: numbers of training crystals; empty for all of the split.
        seeds: seeds of split, weights and order. All arms use the same seeds.
        workers: the number of runs at a time, each with one thread.
    """

    weights: Path
    base: TrainConfig
    out: Path = Path("runs/study")
    arms: list[str] = field(
        default_factory=lambda: ["scratch", "distilled", "random-teacher", "finetuned"]
    )
    baselines: list[str] = field(default_factory=lambda: ["mean", "forest"])
    labels: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    workers: int = 1

    def __post_init__(self) -> None:
        for name in self.arms:
            make_arm(name)
        for name in self.baselines:
            if name not in BASELINES:
                raise InputError(
                    f"unknown baseline {name!r}; choose of {', '.join(BASELINES)}"
                )
        if not self.seeds or not self.arms:
            raise InputError("a study needs at least one of `arms` and one of `seeds`")
        for name in ("arms", "baselines", "labels", "seeds"):
            values = getattr(self, name)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise InputError(f"`{name}` names {twice[0]} twice; remove one")
        if self.workers < 1:
            raise InputError(f"`workers` is {self.workers} but must be at least 1")
        if self.base.split.draws_test and not self.base.split.test:
            raise InputError(
                "`base.split.test` is 0, but a study compares on test crystals"
            )
        for seed in self.seeds:
            self.base.split.for_seed(seed)  # refuses a seed that has no fold


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    arm: Arm
    labels: int | None
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        labels = "all" if self.labels is None else str(self.labels)
        return f"{self.arm.name}-{labels}-{self.seed}"


def compare(config: CompareConfig, progress: bool = True) -> pd.DataFrame:
    """Run every cell that has not run yet; return one row for each cell.

    All arms of a seed have the same training, validation and test crystals, the same
    optimizer and the same number of epochs. Validation chooses the epoch.

    Args:
        config: the comparison.
        progress: whether to show a progress bar.

    Returns:
        Columns `arm, target, unit, metric, labels, seed, value, validation`.

    Raises:
        InputError: the folder holds a study with other settings or weights.
    """
    cells = list(_cells(config))
    _check_same(config)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "study.json").write_text(json.dumps(_facts(config), indent=2) + "\n")
    results = []
    with Progress(
        SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(),
        disable=not progress,
    ) as bar:  # fmt: skip
        task = bar.add_task("study", total=len(cells))
        jobs = Parallel(n_jobs=config.workers, return_as="generator")(
            delayed(_result)(config, cell) for cell in cells
        )
        with warnings.catch_warnings():
            # A worker whose memory grew is replaced between runs; nothing is lost.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs")
            for cell, result in zip(cells, jobs, strict=True):
                bar.update(task, description=cell.name)
                results.append(result)
                bar.advance(task)
    results += _baselines(config, cells)
    table = pd.DataFrame(results)
    table.to_csv(config.out / "results.csv", index=False)
    return table


def _check_same(config: CompareConfig) -> None:
    """Refuse to add cells with other settings to those that have run."""
    base = replace(
        config.base, out=Path(), seed=0, resume=False, overwrite=False,
        split=config.base.split.for_seed(0),
        trainer=replace(config.base.trainer, progress=False),
    )  # fmt: skip
    if not config.weights.is_file():
        raise InputError(f"{config.weights}: no such weights file")
    digest = hashlib.sha256(config.weights.read_bytes()).hexdigest()
    wanted = f"{dump_config(base)}weights: {config.weights.name} {digest[:16]}\n"
    path = config.out / "shared.yaml"
    if path.exists():
        known = path.read_text("utf-8").splitlines()
        changed = [line.strip() for line in wanted.splitlines() if line not in known]
        if changed:
            raise InputError(
                f"{config.out} holds a study whose runs shared other settings; now "
                f"different: {'; '.join(changed)}; give another `out`"
            )
        return
    config.out.mkdir(parents=True, exist_ok=True)
    path.write_text(wanted, encoding="utf-8")


def about(arms: Sequence[str]) -> dict[str, str]:
    """Return a description of each arm or baseline, in one line."""
    lines = {name: text for name, (text, _) in BASELINES.items()}
    return {n: lines[n] if n in lines else make_arm(n).about for n in arms}


def _facts(config: CompareConfig) -> dict[str, Any]:
    """Return the facts that a report should show about the study."""
    before = read_header(config.weights)
    store = Store.open(config.base.dataset)
    return {
        "dataset": f"{config.base.dataset.name}, {len(store):,} crystals",
        "overlap": seen(before, store.structures_hash)[1],
        "weights": before.provenance.origin,
        "epochs": config.base.trainer.epochs,
        "seeds": config.seeds,
    }


def _cells(config: CompareConfig) -> Iterator[Cell]:
    arms = [make_arm(name) for name in config.arms]
    sizes: Sequence[int | None] = config.labels or [None]
    for labels in sizes:
        for seed in config.seeds:
            for arm in arms:
                yield Cell(arm, labels, seed)


def _result(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """Run a cell, unless its folder already holds a result."""
    folder = config.out / "runs" / cell.name
    path = folder / "results.json"
    if not path.exists():
        trainer = replace(config.base.trainer, progress=False)
        split = config.base.split.for_seed(cell.seed, cell.labels)
        run = replace(
            config.base, out=folder, seed=cell.seed, split=split, trainer=trainer,
            resume=True,
        )  # fmt: skip
        torch.set_flush_denormal(True)
        if config.workers > 1:
            torch.set_num_threads(1)
        with contextlib.redirect_stdout(io.StringIO()):
            cell.arm.run(run, config.weights)
    result = json.loads(path.read_text())
    return {
        "arm": cell.arm.name,
        **{
            name: result[name]
            for name in ("target", "unit", "metric", "labels", "seed")
        },
        "value": result["test"],
        "validation": result["val"],
    }


def _baselines(
    config: CompareConfig, cells: Sequence[Cell]
) -> Iterator[dict[str, Any]]:
    """Yield results of the baselines on the splits of the first arm."""
    store = Store.open(config.base.dataset)
    target = config.base.all_targets[0]
    labels = store.property(target.name)
    for cell in cells:
        if cell.arm.name != config.arms[0]:
            continue
        folder = config.out / "runs" / cell.name
        result = json.loads((folder / "results.json").read_text())
        split = read_split(
            folder / "split.csv", store.material_ids, np.flatnonzero(~np.isnan(labels))
        )
        for name in config.baselines:
            predicted = BASELINES[name][1](store, split, target, cell.seed)
            truth = labels[split.test]
            value = (
                roc_auc_score(truth, predicted)
                if result["metric"] == "auc"
                else np.abs(predicted - truth).mean()
            )
            yield {
                "arm": name,
                **{
                    key: result[key]
                    for key in ("target", "unit", "metric", "labels", "seed")
                },
                "value": float(value),
                "validation": float("nan"),
            }
