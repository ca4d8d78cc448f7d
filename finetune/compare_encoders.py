"""`python -m finetune.compare_encoders STRUCTURES --target NAME --unit UNIT` compares.

It trains every encoder at its published settings, on the same crystals, splits and
schedule. STRUCTURES is a labelled source of `crysdistill build`. The recipe builds a
store for each kind of published graph. Validation chooses the epoch, and test crystals
are predicted once. After an interruption, run the same command again to continue.

    python -m finetune.compare_encoders mp36k/ --target formation_energy_per_atom \
        --unit eV/atom --labels 500

Prints errors and processor time beside the published errors. `--ours` takes our default
settings, `--smoke` runs every step on a few alloys that it makes itself.

Differs from the papers: all encoders have our optimizer, schedule and splits, so that
architectures are compared, not recipes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich
from rich.progress import track
from rich.table import Table

from crysdistill import (
    GraphSettings,
    OptimizerSettings,
    SplitSettings,
    Target,
    TrainConfig,
    TrainerSettings,
    build,
    train,
)
from crysdistill.demo import demo_sets
from crysdistill.encoders import ENCODERS, make_encoder
from crysdistill.studies.recipe import run_recipe

PUBLISHED = {
    "cgcnn": (0.039, 57.8),
    "crysxpp": (0.041, None),
    "gatgnn": (0.039, None),
    "deeper_gatgnn": (None, 33.1),
    "schnet": (0.035, 39.0),
    "megnet": (0.028, 28.8),
    "alignn": (0.022, 29.5),
}
"""Test MAE as published: formation energy of the Materials Project in eV/atom (60,000
training crystals, 28,046 for CGCNN), and phonons of Matbench in 1/cm (1,012 training
crystals, mean over five folds). Data and budgets differ from those here."""


@dataclass(frozen=True)
class Plan:
    """A comparison of encoders.

    Args:
        sources: the sources for `build`.
        target: the property.
        encoders: names of encoders.
        labels: the number of training crystals; validation has a quarter of it. None
            for 80 and 10 %. The test set is a tenth of all crystals.
        seeds: seeds of weights and order.
        epochs: epochs of each run.
        batch_size: crystals in a batch.
        published: whether encoders have their published settings.
        small: whether encoders are small, for a trial.
    """

    sources: Sequence[Any]
    target: Target
    encoders: Sequence[str]
    labels: int | None
    seeds: Sequence[int]
    epochs: int
    batch_size: int = 64
    published: bool = True
    small: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Train every encoder and print the errors beside the published ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("sources", nargs="*", type=Path, metavar="STRUCTURES", help="labelled crystals")
    add("--target", default="formation_energy_per_atom", help="the label's column")
    add("--unit", default="eV/atom", help="unit of the label")
    add("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    add("--labels", type=int, help="training crystals; 80 %% of all if absent")
    add("--seeds", type=int, default=3, help="number of repeats")
    add("--epochs", type=int, default=100, help="epochs of each run")
    add("--ours", action="store_true", help="our default settings, not the published")
    add("--out", type=Path, default=Path("runs/compare_encoders"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(
        parser,
        argv,
        _full,
        _small,
        needs=("sources",),
        called="structures with labels",
    )


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    target = Target(args.target, args.unit)
    plan = Plan(
        args.sources,
        target,
        args.encoders,
        args.labels,
        range(args.seeds),
        args.epochs,
        published=not args.ours,
    )
    run(plan, args.out)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    _, crystals = demo_sets(seed=0, corpus_size=1, dataset_size=60)
    target = Target("formation_energy", "eV/atom")
    plan = Plan(
        crystals,
        target,
        args.encoders,
        30,
        (0,),
        1,
        published=False,
        small=True,
    )
    run(plan, folder, keeps=False)


def run(plan: Plan, out: Path, keeps: bool = True) -> pd.DataFrame:
    """Run the missing runs, print the table, and return one row for each run.

    Args:
        plan: the comparison.
        out: the folder for stores and runs; `results.csv` in it holds the table.
        keeps: whether that folder is kept, so that it is printed.
    """
    out.mkdir(parents=True, exist_ok=True)
    stores = {}
    for name in plan.encoders:
        graph = ENCODERS[name].GRAPH
        if graph not in stores:
            stores[graph] = _store(plan, graph, out)
    cells = [(name, seed) for seed in plan.seeds for name in plan.encoders]
    rows = []
    for name, seed in track(cells, "training"):
        store = stores[ENCODERS[name].GRAPH]
        rows.append(_result(plan, name, seed, store, out))
        table = pd.DataFrame(rows)
        table.to_csv(out / "results.csv", index=False)
    rich.print(beside_published(table, plan))
    if keeps:
        rich.print(f"runs and results.csv: {out}")
    return table


def _store(plan: Plan, graph: GraphSettings, out: Path) -> Path:
    """Build the store of one kind of graph, unless it exists."""
    name = f"{graph.mode}-{graph.cutoff:g}-{graph.max_neighbors}.h5"
    path = out / name
    if not path.exists():
        build(plan.sources, path, graph=graph, symmetry=None)
    return path


def _result(plan: Plan, name: str, seed: int, store: Path, out: Path) -> dict[str, Any]:
    """Run one cell, unless its folder already holds a result."""
    kind = "published" if plan.published else "ours"
    what = f"{plan.target.name}-{plan.labels or 'all'}-{plan.epochs}-epochs"
    folder = out / "runs" / what / f"{name}-{kind}-{seed}"
    settings = dict(ENCODERS[name].SMALL) if plan.small else {}
    encoder = {"name": name, "published": plan.published, **settings}
    cost = folder / "cost.json"
    if not cost.exists():
        config = TrainConfig(
            dataset=store,
            target=plan.target,
            out=folder,
            encoder=encoder,
            split=_split(plan.labels, seed),
            optimizer=OptimizerSettings(),
            trainer=TrainerSettings(
                epochs=plan.epochs, batch_size=plan.batch_size, progress=False
            ),
            seed=seed,
            overwrite=True,
        )
        begun = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
        seconds = time.process_time() - begun
        weights = sum(p.numel() for p in make_encoder(**encoder).parameters())
        cost.write_text(json.dumps({"processor": seconds, "weights": weights}))
    found = json.loads((folder / "results.json").read_text())
    spent = json.loads(cost.read_text())
    return {
        "encoder": name,
        "seed": seed,
        "labels": found["labels"],
        "test": found["test"],
        "validation": found["val"],
        "unit": found["unit"],
        **spent,
    }


def _split(labels: int | None, seed: int) -> SplitSettings:
    """Return a split; few training labels come with few validation labels."""
    if labels is None:
        return SplitSettings(seed=seed)
    return SplitSettings(train=labels, val=max(1, labels // 4), seed=seed)


def beside_published(results: pd.DataFrame, plan: Plan) -> Table:
    """Return mean and spread over seeds, the cost, and the published numbers."""
    unit = results["unit"].iloc[0]
    table = Table(title=f"Test MAE of {plan.target.name} ({unit})")
    for head in ("encoder", "weights", "labels", "MAE", "processor s", "published"):
        table.add_column(head, justify="left" if head == "encoder" else "right")
    for name, found in results.groupby("encoder", sort=False):
        spread = found["test"].std()
        more = "" if np.isnan(spread) else f" ± {spread:.3g}"
        energy, phonons = PUBLISHED.get(str(name), (None, None))
        said = {
            "formation_energy_per_atom": energy,
            "last_phdos_peak": phonons,
        }.get(plan.target.name)
        table.add_row(
            str(name),
            f"{found['weights'].iloc[0]:,}",
            f"{found['labels'].iloc[0]:,}",
            f"{found['test'].mean():.3g}{more}",
            f"{found['processor'].mean():,.0f}",
            "" if said is None else f"{said:g}",
        )
    table.caption = (
        f"{len(plan.seeds)} seeds, {plan.epochs} epochs; published: more labels, other "
        "splits and schedules"
    )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
