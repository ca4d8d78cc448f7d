"""`python -m finetune.metal_or_semiconductor DATASET` tells metals from semiconductors.

A crystal is a metal if its band gap is 0. The recipe makes a store with that class from
a store with the gap, trains a CGCNN on it, and prints the area under the ROC curve and
the accuracies at a probability of 0.5 beside those of the paper.

    python -m finetune.metal_or_semiconductor mp36k.h5 --target band_gap

Writes the curve of each seed to `roc.csv` and draws it in `roc.svg`. `--smoke` runs
every step on a few alloys that it makes itself. After an interruption, run the same
command again to continue.

Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
doi:10.1103/PhysRevLett.120.145301, Fig. 2(d): 9,350 test crystals of the Materials
Project, of 46,744.

Differs from the paper:
- We have the crystals of DATASET, with other splits.
- We use AdamW with one cycle of the learning rate, and `--epochs` epochs.
- Validation chooses the epoch by the area under the curve; the paper by the accuracy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score, roc_curve

from crysdistill import (
    Crystal,
    SplitSettings,
    Store,
    Target,
    TrainConfig,
    TrainerSettings,
    build,
    train,
)
from crysdistill.demo import demo_sets
from crysdistill.studies.recipe import results_of_run, run_recipe

CLASS = "semiconductor"
"""The label: 1 for a gap above 0, and 0 for a metal."""

PUBLISHED = {"AUC": 0.95, "metals": 0.80, "semiconductors": 0.95, "all": 0.90}
"""The area under the curve, and the accuracies at a probability of 0.5."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the classifier; print its numbers beside the published ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, help="a store with band gaps")
    add("--target", default="band_gap", help="the gap's column")
    add("--labels", type=int, help="training crystals; 60 %% of all if absent")
    add("--crystals", type=int, help="use only this many of the store, at random")
    add("--seeds", type=int, default=1, help="number of repeats")
    add("--epochs", type=int, default=30, help="passes over the labels")
    out = Path("runs/metal_or_semiconductor")
    add("--out", type=Path, default=out, help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    store = with_classes(args.dataset, args.target, args.crystals, args.out)
    val = 0.2 if args.labels is None else max(2, args.labels // 4)
    base = TrainConfig(
        dataset=store,
        target=Target(CLASS, task="classification"),
        split=SplitSettings(args.labels or 0.6, val, 0.2, stratify=True),
        trainer=TrainerSettings(epochs=args.epochs, progress=False),
    )
    run(base, range(args.seeds), args.out)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    run(_alloys(folder), range(1), folder, keeps=False)


def with_classes(dataset: Path, gap: str, most: int | None, out: Path) -> Path:
    """Build a store of the same crystals with the class; return its path.

    Args:
        dataset: the store with the gaps.
        gap: its property.
        most: take only this many crystals, drawn at random; None takes all.
        out: the folder for the store. If it is there, nothing is done.
    """
    store = Store.open(dataset)
    known = np.flatnonzero(~np.isnan(store.property(gap)))
    known = np.random.default_rng(0).permutation(known)[:most]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"classes-{len(known)}.h5"
    if not path.exists():
        crystals = [classified(store.crystal(row), gap) for row in np.sort(known)]
        build(crystals, path, graph=store.graph, symmetry=None)
    return path


def classified(crystal: Crystal, gap: str) -> Crystal:
    """Return a crystal with its class instead of its other labels."""
    return replace(crystal, properties={CLASS: float(crystal.properties[gap] > 0)})


def run(
    base: TrainConfig, seeds: Sequence[int], out: Path, keeps: bool = True
) -> pd.DataFrame:
    """Run the missing runs, print the table, and return one row for each seed.

    Args:
        base: the dataset, target, split and schedule of all runs.
        seeds: of split and weights.
        out: the folder for everything.
        keeps: whether that folder is kept, so that it is printed.
    """
    rows, curves = [], []
    name = f"{base.dataset.stem}-{base.split.train:g}-{base.trainer.epochs}-epochs"
    for seed in track(seeds, "training"):
        split = replace(base.split, seed=seed)
        config = replace(
            base, seed=seed, split=split, out=out / "runs" / f"{name}-{seed}"
        )
        predicted = _predictions(config)
        wrong, right, _ = roc_curve(predicted["metal"], predicted["probability"])
        curve = pd.DataFrame({"false_positive": wrong, "true_positive": right})
        curves.append(curve.assign(seed=seed))
        rows.append({"seed": seed, **numbers(predicted)})
    found = pd.DataFrame(rows)
    rich.print(_beside_published(found))
    pd.concat(curves).to_csv(out / "roc.csv", index=False)
    draw(curves, float(found["AUC"].mean()), out / "roc.svg")
    if keeps:
        rich.print(f"runs, roc.csv and roc.svg: {out}")
    return found


def _predictions(config: TrainConfig) -> pd.DataFrame:
    """Train, unless the folder has a result; return `metal` and its `probability`."""
    results_of_run(train, config)
    table = pd.read_csv(config.out / "predictions.csv")
    return pd.DataFrame(
        {"metal": table["truth"] == 0, "probability": 1 - table["prediction"]}
    )


def numbers(predicted: pd.DataFrame) -> dict[str, float]:
    """Return the area under the curve, and the accuracies at 0.5.

    Args:
        predicted: `metal` (true or not) and the `probability` of it.
    """
    metal = predicted["metal"]
    right = (predicted["probability"] > 0.5) == metal
    return {
        "AUC": float(roc_auc_score(metal, predicted["probability"])),
        "metals": float(right[metal].mean()),
        "semiconductors": float(right[~metal].mean()),
        "all": float(right.mean()),
        "crystals": len(metal),
        "share_of_metals": float(metal.mean()),
    }


def _beside_published(found: pd.DataFrame) -> Table:
    """Return the means over seeds beside the published numbers."""
    table = Table(title="Metal or semiconductor, on the test crystals")
    for head in ("", "ours", "published"):
        table.add_column(head, justify="right" if head else "left")
    for name, published in PUBLISHED.items():
        spread = found[name].std() if len(found) > 1 else np.nan
        more = "" if np.isnan(spread) else f" ± {spread:.3f}"
        what = name if name == "AUC" else f"accuracy at 0.5, {name}"
        table.add_row(what, f"{found[name].mean():.3f}{more}", f"{published:.2f}")
    table.caption = (
        f"{len(found)} seeds, {found['crystals'].iloc[0]:,} test crystals, "
        f"{found['share_of_metals'].mean():.0%} of them metals; published: 9,350"
    )
    return table


def draw(curves: Sequence[pd.DataFrame], area: float, path: Path) -> None:
    """Draw the ROC curves; a metal is the positive class, as in the paper."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    ax = figure.add_subplot()
    for curve in curves:
        ax.plot(curve["false_positive"], curve["true_positive"], color="C0", lw=1.5)
    ax.plot([0, 1], [0, 1], color="0.7", lw=1, ls="--")
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1.01),
        aspect="equal",
        xlabel="semiconductors called metals",
        ylabel="metals called metals",
        title=f"area {area:.3f}; published {PUBLISHED['AUC']:.2f}",
    )
    figure.savefig(path)


def _alloys(folder: Path) -> TrainConfig:
    """Return a small study of alloys, of which those of low energy are class 1."""
    _, crystals = demo_sets(seed=0, corpus_size=1, dataset_size=60)
    middle = np.median([crystal.properties["formation_energy"] for crystal in crystals])
    gaps = [
        replace(
            c, properties={"gap": max(0.0, middle - c.properties["formation_energy"])}
        )
        for c in crystals
    ]
    store = build(gaps, folder / "gaps.h5", symmetry=None, workers=1, progress=False)
    return TrainConfig(
        dataset=with_classes(store.store, "gap", None, folder),
        target=Target(CLASS, task="classification"),
        encoder={"name": "cgcnn", "width": 8, "convolutions": 2},
        split=SplitSettings(train=36, val=12, test=12, stratify=True),
        trainer=TrainerSettings(epochs=2, batch_size=12, progress=False),
    )


if __name__ == "__main__":
    raise SystemExit(main())
