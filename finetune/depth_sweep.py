"""`python -m finetune.depth_sweep DATASET --target NAME --unit UNIT` goes deep.

How deep may a graph network be? The recipe trains DeeperGATGNN with 5, 10, 20 and 30
convolutions: with the batch norms of GATGNN, with differentiable group norms, and with
group norms and skip connections. Beside the test error it prints how much the atoms of
a crystal still differ (`distinct`). Layers that average over neighbours make atoms
alike, which the group norm should prevent.

    python -m finetune.depth_sweep dataset.h5 --target formation_energy_per_atom \
        --unit eV/atom --labels 1000

Prints the errors beside those of the paper. `--smoke` runs every step on a few alloys
that it makes itself. After an interruption, run the same command again to continue.

Source: S. S. Omee et al., Patterns 3, 100491 (2022),
doi:10.1016/j.patter.2022.100491, Fig. 4: bulk formation energy, 36,839 crystals.

Differs from the paper:
- We have several seeds with one split each, and validation chooses the epoch. The paper
  has five folds without a validation set, and chose the depth on the reported folds.
- The options set the numbers of labels and epochs. The paper has 80 % of 36,839 labels
  and 500 epochs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import rich
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from crysdistill import (
    CrystalBatch,
    SplitSettings,
    Store,
    Target,
    TrainConfig,
    TrainerSettings,
    build,
    load_encoder,
    train,
)
from crysdistill.demo import demo_sets
from crysdistill.encoders import ENCODERS
from crysdistill.graphs.batch import mean_over_atoms
from crysdistill.studies.recipe import results_of_run, run_recipe

ENCODER = "deeper_gatgnn"
DEPTHS = (5, 10, 20, 30)
FORMS: dict[str, dict[str, Any]] = {
    "batch norm": {"norm": "batch", "skip": False},
    "group norm": {"norm": "group", "skip": False},
    "group norm, skip": {"norm": "group", "skip": True},
}
"""Settings of the encoder, by their name in tables."""

PUBLISHED = {
    "GATGNN": "collapses at 30",
    "DeeperGATGNN": "0.03019 at 10, 0.02955 at 15, 0.02968 at 20, 0.03041 at 30",
}
"""Test MAE, eV/atom, of the bulk formation energy."""


@dataclass(frozen=True)
class Sweep:
    """A comparison of depths.

    Args:
        base: the dataset, target, split and schedule of all runs.
        depths: numbers of convolutions.
        seeds: seeds of split, weights and order.
    """

    base: TrainConfig
    depths: Sequence[int]
    seeds: Sequence[int]


def main(argv: Sequence[str] | None = None) -> int:
    """Train at every depth; print the errors and how much atoms still differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, help="a store with the property")
    add("--target", default="formation_energy_per_atom", help="the label's column")
    add("--unit", default="eV/atom", help="unit of the label")
    add("--labels", type=int, help="training crystals; 80 %% of all if absent")
    add("--depths", type=int, nargs="+", default=list(DEPTHS))
    add("--width", type=int, default=64, help="width of the embeddings")
    add("--seeds", type=int, default=3, help="number of repeats")
    add("--epochs", type=int, default=100, help="passes over the labels")
    add("--out", type=Path, default=Path("runs/depth_sweep"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    base = TrainConfig(
        dataset=args.dataset,
        target=Target(args.target, args.unit),
        encoder={"name": ENCODER, "width": args.width},
        split=_split(args.labels),
        trainer=TrainerSettings(epochs=args.epochs, progress=False),
    )
    run(Sweep(base, args.depths, range(args.seeds)), args.out)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    run(_alloys(folder), folder)


def _split(labels: int | None) -> SplitSettings:
    """Return a split; few training labels come with few validation labels."""
    if labels is None:
        return SplitSettings()
    return SplitSettings(train=labels, val=max(1, labels // 4))


def run(sweep: Sweep, out: Path) -> pd.DataFrame:
    """Run the missing runs, print the tables, and return one row for each run.

    Args:
        sweep: the comparison.
        out: the folder for all runs; `results.csv` in it holds the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    cells = [
        (form, depth, seed)
        for seed in sweep.seeds
        for depth in sweep.depths
        for form in FORMS
    ]
    rows = []
    for form, depth, seed in track(cells, "training"):
        name = form.replace(", ", "-").replace(" ", "-")
        folder = out / "runs" / f"{name}-{depth}-{seed}"
        rows.append(_result(sweep, form, depth, seed, folder))
        pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    table = pd.DataFrame(rows)
    rich.print(by_depth(table, "test", f"Test MAE ({table['unit'].iloc[0]})"))
    rich.print(by_depth(table, "distinct", "Share of the variance within crystals"))
    for name, text in PUBLISHED.items():
        rich.print(f"published, {name}: {text}")
    return table


def by_depth(results: pd.DataFrame, column: str, title: str) -> Table:
    """Return means and spreads over seeds, a row for each form of the network."""
    table = Table(title=title)
    table.add_column("convolutions")
    depths = sorted(results["depth"].unique())
    for depth in depths:
        table.add_column(str(depth), justify="right")
    for form in FORMS:
        cells = []
        for depth in depths:
            found = results[(results["form"] == form) & (results["depth"] == depth)]
            spread = found[column].std()
            more = "" if pd.isna(spread) else f" ± {spread:.2g}"
            cells.append(f"{found[column].mean():.3g}{more}")
        table.add_row(form, *cells)
    return table


def _result(
    sweep: Sweep, form: str, depth: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Run one cell, unless its folder already holds a result."""
    config = replace(
        sweep.base,
        encoder={**sweep.base.encoder, "convolutions": depth, **FORMS[form]},
        out=folder,
        seed=seed,
        split=replace(sweep.base.split, seed=seed),
    )
    found = results_of_run(train, config)
    weights = folder / "weights.safetensors"
    return {
        "form": form,
        "depth": depth,
        "seed": seed,
        "unit": found["unit"],
        "test": found["test"],
        "distinct": distinct(weights, sweep.base.dataset),
    }


@torch.no_grad()
def distinct(weights: Path, dataset: Path, crystals: int = 256) -> float:
    """Return how much the atoms of a crystal still differ after the last convolution.

    This is the share of the variance of atom embeddings that lies within crystals, over
    crystals of several elements. 0 means that all atoms of a crystal are alike.

    Args:
        weights: the weights file of a predictor.
        dataset: the store; its first crystals are used.
        crystals: the number of crystals.
    """
    store, encoder = Store.open(dataset), load_encoder(weights)
    batch = store.batch(range(min(crystals, len(store))))
    atoms = encoder(batch).atoms.double()  # (N, F)
    inside = atoms - mean_over_atoms(atoms, batch)[batch.batch]  # (N, F)
    chosen = _in_compounds(batch)
    centred = atoms[chosen] - atoms[chosen].mean(dim=0)
    return float(inside[chosen].square().sum() / centred.square().sum())


def _in_compounds(batch: CrystalBatch) -> Tensor:
    """Return which atoms belong to crystals of several elements, (N,) bool."""
    numbers = batch.atomic_numbers
    first = numbers[batch.ptr[:-1]][batch.batch]  # (N,)
    other = (numbers != first).float().unsqueeze(1)  # (N, 1)
    return (mean_over_atoms(other, batch) > 0)[batch.batch].squeeze(1)


def _alloys(folder: Path) -> Sweep:
    """Return a small sweep over alloys."""
    _, crystals = demo_sets(seed=0, corpus_size=1, dataset_size=60)
    store = build(
        crystals, folder / "alloys.h5", symmetry=None, workers=1, progress=False
    ).store
    base = TrainConfig(
        dataset=store,
        target=Target("formation_energy", "eV/atom"),
        encoder={"name": ENCODER, **ENCODERS[ENCODER].SMALL},
        split=SplitSettings(train=30, val=15, test=15),
        trainer=TrainerSettings(epochs=1, batch_size=16, progress=False),
    )
    return Sweep(base, depths=(2, 3), seeds=(0,))


if __name__ == "__main__":
    raise SystemExit(main())
