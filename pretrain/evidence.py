"""`python -m pretrain.evidence CORPUS --data FOLDER` asks which pretraining helps.

Every arm pretrains the same encoder on the same corpus in its own way, and fine-tunes
it on the same small tasks: some hundred labels, several seeds. Validation chooses the
epoch, and test crystals are predicted once. The corpus is built without the crystals of
any task. The controls are a network from scratch, one that trains twice as long, and a
teacher with random weights.

    python -m pretrain.evidence mp_corpus/ --data data/ --arms fingerprint bank

FOLDER holds the tasks of `pretrain.tasks`, each as a source of `build`. The recipe
prints the change of the test error against scratch for each task, and ranks the arms by
the mean change. After an interruption, or with more arms, tasks or seeds, run it again:
it does only the missing runs. `--smoke` runs every step on a few alloys that it makes
itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich
import torch
from joblib import Parallel, delayed
from rich.progress import track
from rich.table import Table

from crysdistill import (
    FinetuneConfig,
    PretrainConfig,
    SplitSettings,
    TrainConfig,
    TrainerSettings,
    finetune,
    pretrain,
    train,
)
from crysdistill.encoders import ENCODERS
from crysdistill.errors import InputError
from crysdistill.objectives import CRYSGNN
from crysdistill.schema import dump_config
from crysdistill.store.checks import find_check
from crysdistill.store.store import Store
from crysdistill.studies.recipe import at_least_one, narrow_tables
from crysdistill.studies.statistics import t_interval
from crysdistill.training.runs import check_same_run
from crysdistill.transfer.weights import read_header
from pretrain.tasks import (
    ALLOYS,
    TASKS,
    Task,
    add_settings,
    alloys,
    clean_corpus,
    corpus_parser,
    run_on_corpus,
    task_stores,
)

CHGNET = {"max_atoms": 20, "max_crystals": 18_000}
"""The crystals of the corpus for which a slow teacher is evaluated."""

ALONE = ("denoising", "barlow", "vicreg", "simsiam", "infomax", "joint_embedding",
         "surrogate")  # fmt: skip
"""Objectives that are arms of their own, with their default settings."""

ARMS: dict[str, dict[str, Any]] = {
    "crysgnn": {name: {"weight": 0.25} for name in CRYSGNN},
    "fingerprint": {"fingerprint": {}},
    "bank": {"bank": {}},
    "bank, elements": {"bank": {}, "node_features": {}},
    "chgnet": {"teacher": {"teachers": ["chgnet"], **CHGNET}},
    "random teacher": {"teacher": {"teachers": ["random"], **CHGNET}},
    "chgnet, bank": {"teacher": {"teachers": ["chgnet"], **CHGNET}, "bank": {}},
    "dftd4, ewald": {"teacher": {"teachers": ["dftd4", "ewald"], **CHGNET}},
    "dftd4, ewald, bank": {
        "teacher": {"teachers": ["dftd4", "ewald"], **CHGNET},
        "bank": {},
    },
    **{name: {name: {}} for name in ALONE},
}
"""Objectives by arm. `random teacher` is the control of the teachers."""

WEIGHTS = """further arms: encoders that are already pretrained, on the tasks whose
crystals their corpus was cleared of"""

SCRATCH, LONGER = "scratch", "scratch, twice as long"


@dataclass(frozen=True)
class Evidence:
    """A comparison of ways to pretrain.

    Args:
        corpus: the store to pretrain on.
        datasets: the store of each task.
        tasks: the tasks by name.
        arms: names of `ARMS`.
        labels: the number of training labels of each task.
        seeds: seeds of split, weights and order.
        pretrain_epochs: passes over the corpus.
        epochs: passes over the labels.
        encoder: the encoder of all arms.
        subset: pretrain on this many crystals; None for all.
        workers: the number of runs at a time, of one thread each.
        weights: further arms by name, each an encoder that is already pretrained.
        longer: whether to also train twice as long from scratch, as a control.
    """

    corpus: Path
    datasets: dict[str, Path]
    tasks: dict[str, Task]
    arms: Sequence[str]
    labels: int
    seeds: Sequence[int]
    pretrain_epochs: int
    epochs: int
    encoder: dict[str, Any]
    subset: int | None = None
    workers: int = 1
    weights: dict[str, Path] = field(default_factory=dict)
    longer: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain every arm, run every task, print the ranked table."""
    parser = corpus_parser(__doc__)
    add = parser.add_argument
    add("--arms", nargs="*", choices=list(ARMS), default=["fingerprint", "bank"])
    add("--weights", nargs="+", type=Path, default=[], metavar="FILE", help=WEIGHTS)
    add("--subset", type=at_least_one, help="pretrain on this many crystals")
    add("--width", type=at_least_one, default=64, help="width of the encoder")
    add("--convolutions", type=at_least_one, default=3, help="its convolutions")
    add_settings(parser)
    return run_on_corpus(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    evidence = replace(
        from_settings(args, args.arms, cgcnn(args.width, args.convolutions)),
        subset=args.subset,
        weights=_by_name(args.weights),
    )
    table = run(evidence, args.out, args.out / "results.csv")
    rich.print(*ranked(table, evidence))
    rich.print(f"runs and results.csv: {args.out}")


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    evidence = small(folder, ["bank", "random teacher"])
    rich.print(*ranked(run(evidence, folder), evidence))


def from_settings(
    args: argparse.Namespace, arms: Sequence[str], encoder: dict[str, Any]
) -> Evidence:
    """Build the missing stores, and return a comparison.

    Args:
        args: of a parser with `add_settings`.
        arms: names of `ARMS`.
        encoder: the encoder of all arms.

    Raises:
        InputError: a source cannot be read.
    """
    stores = task_stores(args.data, args.out)
    tasks = {name: TASKS[name] for name in args.tasks}
    return Evidence(
        corpus=clean_corpus(args.corpus, args.out, args.max_atoms, stores.values()),
        datasets={name: stores[task.folder] for name, task in tasks.items()},
        tasks=tasks,
        arms=arms,
        labels=args.labels,
        seeds=range(args.seeds),
        pretrain_epochs=args.pretrain_epochs,
        epochs=args.epochs,
        encoder=encoder,
        workers=args.workers,
    )


def cgcnn(width: int, convolutions: int) -> dict[str, Any]:
    """Return the settings of a CGCNN."""
    return {"name": "cgcnn", "width": width, "convolutions": convolutions}


def run(evidence: Evidence, out: Path, table: Path | None = None) -> pd.DataFrame:
    """Run the missing runs, and return one row for each run.

    Args:
        evidence: the comparison.
        out: the folder for all runs.
        table: a CSV file of the rows so far; None writes none.

    Raises:
        InputError: the corpus was not cleared of a task, or the folder holds runs with
            another configuration.
    """
    torch.set_flush_denormal(True)  # tails of Gaussians slow a CPU down
    weights = {
        arm: pretrained(evidence, arm, out) for arm in track(evidence.arms, "pretrain")
    }
    controls = [SCRATCH, LONGER] if evidence.longer else [SCRATCH]
    starts: dict[str, Path | None] = dict.fromkeys(controls)
    starts |= {**weights, **evidence.weights}
    unfair = {task: _unfair(evidence, starts, task) for task in evidence.tasks}
    cells = [
        (arm, task, seed)
        for seed in evidence.seeds
        for task in evidence.tasks
        for arm, start in starts.items()
        if arm not in unfair[task]
    ]
    jobs = Parallel(n_jobs=evidence.workers, return_as="generator")(
        delayed(_result)(evidence, arm, starts[arm], task, seed, out)
        for arm, task, seed in cells
    )
    rows = []
    for row in track(jobs, "tasks", total=len(cells)):
        rows.append(row)
        if table is not None:
            pd.DataFrame(rows).to_csv(table, index=False)
    return pd.DataFrame(rows)


def _by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Return weights files by their names."""
    found: dict[str, Path] = {}
    for file in files:
        name = _named(file)
        if name in found or name in ARMS:
            raise InputError(
                f"{file} would be called {name}, as another arm is; rename it"
            )
        found[name] = file
    return found


def _named(weights: Path) -> str:
    """Return the name of the weights' folder, or of the file if it has its own."""
    return weights.parent.name if weights.stem == "weights" else weights.stem


def _unfair(evidence: Evidence, starts: dict[str, Path | None], task: str) -> list[str]:
    """Return the arms whose corpus may hold crystals of a task.

    Only weights from elsewhere may: our own corpus is built without the tasks.
    """
    hashed = Store.open(evidence.datasets[task]).structures_hash
    found = []
    for arm, start in starts.items():
        if start is None:
            continue
        check = find_check(read_header(start).provenance.checks, hashed)
        if check is None or check.kept:
            found.append(arm)
    for arm in found:
        if arm in evidence.arms:
            raise InputError(
                f"{evidence.corpus} was not cleared of {evidence.datasets[task]}; "
                "remove the corpus, and what was pretrained on it, and run this again"
            )
    return found


def pretrained(evidence: Evidence, arm: str, out: Path) -> Path:
    """Pretrain an arm, or continue its pretraining, unless it is done.

    Args:
        evidence: the corpus, the encoder and the epochs.
        arm: one of `ARMS`.
        out: the folder for all runs.

    Returns:
        The weights file.

    Raises:
        InputError: the folder holds a run with another configuration.
    """
    size = "all" if evidence.subset is None else f"{evidence.subset}"
    name = f"{arm}-{evidence.pretrain_epochs}-epochs-{size}".replace(", ", "-and-")
    folder = out / "pretrained" / name.replace(" ", "-")
    weights = folder / "weights.safetensors"
    config = PretrainConfig(
        corpus=evidence.corpus,
        out=folder,
        encoder={"normalize": True, **evidence.encoder},
        objectives={
            name: {"weight": 1.0, **given} for name, given in ARMS[arm].items()
        },
        subset=evidence.subset,
        trainer=TrainerSettings(
            epochs=evidence.pretrain_epochs, batch_size=128, threads=evidence.workers
        ),
        resume=folder.exists(),
    )
    if weights.exists():
        check_same_run(folder, dump_config(config))
        return weights
    return pretrain(config)


def _result(
    evidence: Evidence, arm: str, weights: Path | None, task: str, seed: int, out: Path
) -> dict[str, Any]:
    """Run one cell, unless its folder already holds a result."""
    before = "" if weights is None else f"-{_named(weights)}"
    kind = "longer" if arm == LONGER else ("scratch" if weights is None else "tuned")
    what = f"{task}-{evidence.labels}-{evidence.epochs}-epochs".replace(" ", "-")
    folder = out / "runs" / what / f"{kind}{before}-{seed}"
    cost = folder / "cost.json"
    shared = {
        "dataset": evidence.datasets[task],
        "target": evidence.tasks[task].target,
        "out": folder,
        "seed": seed,
        "split": SplitSettings(
            train=evidence.labels,
            val=max(1, evidence.labels // 4),
            test=0.2,
            seed=seed,
        ),
        "trainer": TrainerSettings(
            epochs=evidence.epochs * (2 if arm == LONGER else 1),
            accelerator="cpu",
            progress=False,
            threads=1,
        ),
        "overwrite": True,
    }
    config = (
        TrainConfig(**shared, encoder=evidence.encoder)
        if weights is None
        else FinetuneConfig(**shared, weights=weights)
    )
    if cost.exists():
        check_same_run(folder, dump_config(config))
    else:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        begun = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            train(config) if isinstance(config, TrainConfig) else finetune(config)
        spent = time.process_time() - begun
        cost.write_text(json.dumps({"processor": spent}))
    found = json.loads((folder / "results.json").read_text())
    return {
        "arm": arm,
        "task": task,
        "seed": seed,
        "test": found["test"],
        "validation": found["val"],
        "unit": found["unit"],
        "overlap": found["overlap"],
        **json.loads(cost.read_text()),
    }


def changes(results: pd.DataFrame) -> pd.DataFrame:
    """Return the change of the test error against scratch, for the same task and seed.

    Args:
        results: the result of `run`.

    Returns:
        Columns `arm, task, seed, change`; -0.1 is ten per cent less error.
    """
    keys = ["task", "seed"]
    scratch = results[results["arm"] == SCRATCH].set_index(keys)["test"]
    against = results.set_index(keys).index.map(scratch)
    return results.assign(change=results["test"] / against - 1)[
        ["arm", "task", "seed", "change"]
    ]


def ranked(results: pd.DataFrame, evidence: Evidence) -> list[Table]:
    """Return tables of the arms by their mean change, the best first.

    The interval is of the mean over tasks, from its spread over seeds.

    Args:
        results: the result of `run`.
        evidence: what was run.
    """
    found = changes(results)
    by_task = found.groupby(["arm", "task"])["change"].mean().unstack()
    by_seed = found.groupby(["arm", "seed"])["change"].mean().unstack()
    columns = {}
    for arm in by_task.mean(axis=1).sort_values().index:
        if arm == SCRATCH:
            continue
        cells = {task: f"{by_task.loc[arm, task]:+.1%}" for task in evidence.tasks}
        low, high = t_interval(by_seed.loc[arm].to_numpy())
        columns[str(arm)] = {
            **cells,
            "mean": f"{by_task.loc[arm].mean():+.1%}",
            "95 %, from": "" if np.isnan(low) else f"{low:+.1%}",
            "to": "" if np.isnan(high) else f"{high:+.1%}",
        }
    return narrow_tables(
        f"Change of the test error against scratch, {evidence.labels} labels",
        columns,
        f"seeds: {len(evidence.seeds)}; epochs: {evidence.epochs}, "
        f"of pretraining: {evidence.pretrain_epochs}",
    )


def small(folder: Path, arms: Sequence[str], longer: bool = True) -> Evidence:
    """Return a small comparison, of alloys.

    Args:
        folder: for its stores.
        arms: names of `ARMS`.
        longer: whether to train twice as long too.
    """
    corpus, dataset = alloys(folder)
    return Evidence(
        corpus=corpus,
        datasets={"alloys": dataset},
        tasks=ALLOYS,
        arms=arms,
        labels=24,
        seeds=(0, 1),
        pretrain_epochs=1,
        epochs=2,
        encoder={"name": "cgcnn", **ENCODERS["cgcnn"].SMALL},
        longer=longer,
    )


if __name__ == "__main__":
    raise SystemExit(main())
