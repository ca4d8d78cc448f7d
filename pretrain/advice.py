"""`python -m pretrain.advice --data FOLDER` asks how good `fit` and its advice are.

`fit` makes candidates with the weights of the package, advises from a probe whether
fine-tuning will help, and chooses by validation. This recipe runs it on every
development task with some hundred labels. It compares the test error of the choice with
that of the network from scratch, and with the control: what `fit` chooses without
pretrained weights. With `--teachers`, it also runs `fit` with these foreign models. And
it compares the advice with what fine-tuning then gave.

    python -m pretrain.advice --data data/ --seeds 2 --teachers chgnet

FOLDER holds the tasks of `pretrain.tasks`. A task with crystals that the weights
learned from is marked `seen`; to compare other `--weights`, give another `--out`. All
choices of a task share the same networks. After an interruption, or with more seeds,
tasks or teachers, run it again: it does only what is missing. `--smoke` runs every step
on a few alloys that it makes itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import rich
import torch
from rich.progress import track
from rich.table import Table

from crysdistill import FitConfig, SplitSettings, TrainerSettings, fit
from crysdistill.encoders import ENCODERS, make_encoder
from crysdistill.files import write_whole
from crysdistill.schema import dump_config
from crysdistill.store.store import Store
from crysdistill.studies.recipe import at_least_one, results_of_run, run_recipe
from crysdistill.teachers.live import LIVE
from crysdistill.training.candidates import TOGETHER
from crysdistill.training.probe import HELPFUL
from crysdistill.transfer.weights import read_header, save_weights
from pretrain.tasks import ALLOYS, TASKS, Task, alloys, task_stores

MOST_TESTED = 1_500
"""The most test crystals of a task; a teacher is asked about all of them."""


@dataclass(frozen=True)
class Trial:
    """The tasks to run `fit` on.

    Args:
        tasks: by name.
        datasets: the store of each task.
        seeds: of split, weights and order.
        labels: the number of training labels.
        epochs: passes over the labels.
        settings: further settings of every `fit`.
        teachers: foreign models of a further `fit`; empty for none.
    """

    tasks: Mapping[str, Task]
    datasets: Mapping[str, Path]
    seeds: Sequence[int]
    labels: int
    epochs: int
    settings: Mapping[str, Any]
    teachers: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fit` on every task, and print what its choice and its advice were worth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="folder of the tasks")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--weights", nargs="+", type=Path, help="those of the package if absent")
    add("--teachers", nargs="+", choices=list(LIVE), default=[])
    add("--labels", type=at_least_one, default=500, help="training labels of each task")
    add("--seeds", type=at_least_one, default=1, help="number of repeats")
    add("--epochs", type=at_least_one, default=60, help="passes over the labels")
    add("--out", type=Path, default=Path("runs/advice"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(
        parser,
        argv,
        _full,
        _small,
        needs=("data",),
        called="`--data FOLDER`",
    )


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    stores = task_stores(args.data, args.out)
    tasks = {name: TASKS[name] for name in args.tasks}
    datasets = {name: stores[task.folder] for name, task in tasks.items()}
    trial = Trial(
        tasks,
        datasets,
        seeds=range(args.seeds),
        labels=args.labels,
        epochs=args.epochs,
        settings={} if args.weights is None else {"weights": args.weights},
        teachers=args.teachers,
    )
    run(trial, args.out)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    run(_alloys(folder), folder)


def run(trial: Trial, out: Path) -> pd.DataFrame:
    """Run the missing runs, print the table, and return one row for each run.

    Args:
        trial: what to run.
        out: the folder for all runs; `results.csv` in it holds the table.
    """
    cells = [(task, seed) for seed in trial.seeds for task in trial.tasks]
    rows = []
    for task, seed in track(cells, "tasks"):
        rows.append(_result(trial, task, seed, out))
        pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    results = pd.DataFrame(rows)
    rich.print(_table(results))
    rich.print(_summary(results))
    rich.print(f"runs and results.csv: {out}")
    return results


def _result(trial: Trial, task: str, seed: int, out: Path) -> dict[str, Any]:
    """Run `fit` in every way, unless the folders hold the results."""
    name = f"{task}-{trial.labels}-{seed}".replace(" ", "-")
    folder = out / "runs" / name
    found = _fitted(trial, task, seed, folder, **trial.settings)
    network = read_header(folder / f"scratch-{seed}" / "weights.safetensors").encoder
    same = {"name": network["name"], **network["settings"]}
    control = _fitted(
        trial, task, seed, out / "controls" / name, folder, weights=[], encoder=same
    )
    tests = {
        kind: json.loads((folder / f"{kind}-{seed}" / "results.json").read_text())
        for kind in ("scratch", "finetuned")
    }
    scratch, tuned = tests["scratch"]["test"], tests["finetuned"]["test"]
    probe = dict(found["probe"])
    without = min(probe.pop("composition"), probe.pop("untrained"))
    probe.pop(TOGETHER, None)  # a network starts from one of the weights
    row = {
        "task": task,
        "seed": seed,
        "unit": found["unit"],
        "scratch": scratch,
        "control": control["test"],
        "fine-tuned": tuned,
        "chosen": found["chosen"],
        "test": found["test"],
        "change": found["test"] / scratch - 1,
        "against_control": found["test"] / control["test"] - 1,
        "weights": min(probe, key=lambda name: probe[name]),
        "seen": not tests["finetuned"]["overlap"].startswith("clean"),
        "advice": 1 - min(probe.values()) / without > HELPFUL,
        "helped": tuned < scratch,
    }
    if trial.teachers:
        asked = {**trial.settings, "teachers": list(trial.teachers)}
        where = out / "-".join(["with", *trial.teachers]) / name
        taught = _fitted(trial, task, seed, where, folder, **asked)
        row["taught"] = taught["test"]
        row["taught_change"] = taught["test"] / scratch - 1
        row["taught_chosen"] = taught["chosen"]
    return row


def _fitted(
    trial: Trial,
    task: str,
    seed: int,
    folder: Path,
    networks: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run one `fit`, unless its folder already holds a result; return the result.

    Args:
        trial: the settings of all.
        task: its name.
        seed: of split, weights and order.
        folder: of the run.
        networks: the folder of a finished `fit` whose networks are used again.
        settings: further settings.
    """
    torch.set_num_threads(1)
    dataset = trial.datasets[task]
    config = FitConfig(
        dataset=dataset,
        target=trial.tasks[task].target,
        out=folder,
        seed=seed,
        split=SplitSettings(
            train=trial.labels,
            val=max(1, trial.labels // 4),
            test=min(len(Store.open(dataset)) // 5, MOST_TESTED),
            seed=seed,
        ),
        trainer=TrainerSettings(
            epochs=trial.epochs, accelerator="cpu", progress=False, threads=1
        ),
        **settings,
    )
    if networks is not None and not folder.exists():
        partial = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        for part in networks.glob(f"*-{seed}"):
            shutil.copytree(part, partial / part.name)
        write_whole(partial / "config.yaml", dump_config(config).encode())
        partial.rename(folder)
    return results_of_run(fit, config)


def _summary(results: pd.DataFrame) -> str:
    """Return the means over all runs, in words."""
    told = results["advice"] == results["helped"]
    words = [f"mean change against scratch: {results['change'].mean():+.1%}"]
    if "taught_change" in results:
        words.append(f"with teachers: {results['taught_change'].mean():+.1%}")
    words += [
        f"against the control: {results['against_control'].mean():+.1%}",
        f"worse than scratch in {(results['change'] > 0).sum()} of {len(results)} runs",
        f"the advice was right in {told.sum()} of {len(results)}",
    ]
    return "; ".join(words)


def _table(results: pd.DataFrame) -> Table:
    """Return a table with the test errors of each run; `results.csv` has more."""
    table = Table(title="`fit` with pretrained weights: test errors")
    table.add_column("task")
    columns = {"scratch": "scratch", "control": "control", "test": "fit"}
    if "taught" in results:
        columns["taught"] = "with teachers"
    for head in ("seed", *columns.values(), "advice", "helped"):
        table.add_column(head, justify="right", no_wrap=True)
    for _, row in results.iterrows():
        mark = ", seen" if row["seen"] else ""
        table.add_row(
            f"{row['task']} ({row['unit']}){mark}",
            f"{row['seed']}",
            *(f"{row[name]:.4g}" for name in columns),
            *("yes" if row[name] else "no" for name in ("advice", "helped")),
        )
    table.caption = (
        "advice: whether to fine-tune; helped: whether that was better than scratch"
    )
    return table


def _alloys(folder: Path) -> Trial:
    """Return a small trial on alloys, with weights that know nothing."""
    _, store = alloys(folder, corpus_size=1)
    graph = Store.open(store).graph
    torch.manual_seed(0)
    encoder = make_encoder("cgcnn", graph, **ENCODERS["cgcnn"].SMALL)
    weights = save_weights(folder / "known.safetensors", encoder, graph)
    settings = {"weights": [weights]}
    teachers = [name for name in ("dftd4",) if find_spec(name)]
    return Trial(ALLOYS, {"alloys": store}, (0,), 24, 2, settings, teachers)


if __name__ == "__main__":
    raise SystemExit(main())
