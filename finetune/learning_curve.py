"""`python -m finetune.learning_curve DATASET --target NAME --unit UNIT` draws a curve.

How fast does the error fall with the number of training crystals? The recipe trains a
CGCNN from scratch with more and more of them, always tested on the same crystals, and
fits error = a n^-b. With `--weights` it also fine-tunes a pretrained encoder.

    python -m finetune.learning_curve dataset.h5 --target formation_energy_per_atom \
        --unit eV/atom --labels 250 500 1000 2000 4000

Prints errors and exponents beside the published ones, and draws `learning_curve.svg`.
`--smoke` runs every step on a few alloys that it makes itself. After an interruption,
run the same command again to continue.

Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
doi:10.1103/PhysRevLett.120.145301, Fig. 2(b): formation energy of the Materials
Project. The text gives the last points of its two curves.

Differs from the paper:
- Validation has a quarter of the number of training crystals; the paper always the same
  9,350.
- We use AdamW with one cycle of the learning rate, and `--epochs` epochs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import rich
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from rich.progress import track
from rich.table import Table
from scipy.stats import linregress, t

from crysdistill import (
    FinetuneConfig,
    SplitSettings,
    Store,
    Target,
    TrainConfig,
    TrainerSettings,
    build,
    finetune,
    train,
)
from crysdistill.demo import demo_sets
from crysdistill.errors import InputError
from crysdistill.studies.recipe import results_of_run, run_recipe
from crysdistill.training.labelled import LabelledConfig

LABELS = (250, 500, 1000, 2000, 4000)

PUBLISHED = {"Eq. 5": (28_046, 0.039), "Eq. 4": (28_046, 0.136)}
"""Training crystals and test MAE in eV/atom, by the convolution of the paper."""

PUBLISHED_TARGET = "formation_energy_per_atom"


@dataclass(frozen=True)
class Curve:
    """A straight line through the logarithms of labels and errors.

    Args:
        exponent: b, of error = a n^-b.
        spread: half of its 95 % interval; NaN for fewer than three points.
        factor: a.
    """

    exponent: float
    spread: float
    factor: float

    def __call__(self, labels: np.ndarray | float) -> np.ndarray | float:
        """Return the error for numbers of labels."""
        return self.factor * labels**-self.exponent


def main(argv: Sequence[str] | None = None) -> int:
    """Train with every number of crystals; print errors and exponents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, help="a store with the property")
    add("--target", default=PUBLISHED_TARGET, help="the label's column")
    add("--unit", default="eV/atom", help="unit of the label")
    add("--labels", type=int, nargs="+", default=list(LABELS), metavar="N")
    add("--weights", type=Path, help="also fine-tune this pretrained encoder")
    add("--seeds", type=int, default=3, help="number of repeats")
    add("--epochs", type=int, default=100, help="passes over the labels")
    add("--out", type=Path, default=Path("runs/learning_curve"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    base = TrainConfig(
        dataset=args.dataset,
        target=Target(args.target, args.unit),
        trainer=TrainerSettings(epochs=args.epochs, progress=False),
    )
    run(base, args.labels, range(args.seeds), args.out, args.weights)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    base, out = _alloys(folder), folder
    run(base, (12, 20, 32), range(1), out, keeps=False)


def run(
    base: TrainConfig,
    labels: Sequence[int],
    seeds: Sequence[int],
    out: Path,
    weights: Path | None = None,
    keeps: bool = True,
) -> pd.DataFrame:
    """Run the missing runs, print the table, and return one row for each run.

    Args:
        base: the dataset, target and schedule of all runs.
        labels: numbers of training crystals.
        seeds: of split, weights and order.
        out: the folder for everything.
        weights: a pretrained encoder, for a second curve.
        keeps: whether that folder is kept, so that it is printed.
    """
    _check(base, labels)
    arms = ["scratch"] + (["fine-tuned"] if weights else [])
    cells = [(arm, n, seed) for n in sorted(labels) for seed in seeds for arm in arms]
    rows = []
    for arm, n, seed in track(cells, "training"):
        split = SplitSettings(train=n, val=max(1, n // 4), seed=seed)
        name = f"{arm}-{n}-{base.trainer.epochs}-epochs-{seed}"
        config = replace(base, split=split, seed=seed, out=out / "runs" / name)
        error = _test_error(config, weights if arm == "fine-tuned" else None)
        rows.append({"arm": arm, "labels": n, "seed": seed, "test": error})
        pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    found = pd.DataFrame(rows)
    curves = {arm: fit_curve(part) for arm, part in found.groupby("arm", sort=False)}
    rich.print(_table(found, curves, base))
    draw(found, curves, base, out / "learning_curve.svg")
    if keeps:
        rich.print(f"runs, results.csv and learning_curve.svg: {out}")
    return found


def _check(base: TrainConfig, labels: Sequence[int]) -> None:
    """Refuse too few or too large numbers of labels before the first run."""
    if len(set(labels)) < 2:
        raise InputError("`--labels` has one number but a curve needs at least two")
    if min(labels) < 2:
        raise InputError(f"`--labels` has {min(labels)} but must be at least 2")
    target = base.all_targets[0]
    known = int((~np.isnan(Store.open(base.dataset).property(target.name))).sum())
    need = max(labels) + max(labels) // 4 + int(known * base.split.test)
    if need > known:
        raise InputError(
            f"`--labels` has {max(labels):,}, which with validation and test crystals "
            f"needs {need:,} labels, but {base.dataset} has {known:,}; give fewer"
        )


def _test_error(config: TrainConfig, weights: Path | None) -> float:
    """Train, unless the folder already holds a result; return the test error."""
    if weights is None:
        return float(results_of_run(train, config)["test"])
    names = [field.name for field in fields(LabelledConfig)]
    shared = {name: getattr(config, name) for name in names}
    tuned = FinetuneConfig(**shared, weights=weights)
    return float(results_of_run(finetune, tuned)["test"])


def fit_curve(results: pd.DataFrame) -> Curve:
    """Fit error = a n^-b to the mean errors of an arm.

    Args:
        results: its runs, with `labels` and `test`.
    """
    means = results.groupby("labels")["test"].mean()
    line = linregress(np.log(means.index.to_numpy(float)), np.log(means.to_numpy()))
    more = len(means) - 2
    spread = float(line.stderr * t.ppf(0.975, more)) if more else np.nan
    return Curve(float(-line.slope), spread, float(np.exp(line.intercept)))


def _table(found: pd.DataFrame, curves: dict[str, Curve], base: TrainConfig) -> Table:
    """Return errors by number of labels, the exponents, and the published points."""
    target = base.all_targets[0]
    table = Table(title=f"Test MAE of {target.name} ({target.unit})")
    table.add_column("training crystals", justify="right")
    for arm in curves:
        table.add_column(arm, justify="right")
    for labels, part in found.groupby("labels"):
        cells = []
        for arm in curves:
            values = part.loc[part["arm"] == arm, "test"]
            spread = "" if len(values) < 2 else f" ± {values.std():.2g}"
            cells.append(f"{values.mean():.3g}{spread}")
        table.add_row(f"{labels:,}", *cells)
    table.add_section()
    said = [
        f"{c.exponent:.2f}" + ("" if np.isnan(c.spread) else f" ± {c.spread:.2f}")
        for c in curves.values()
    ]
    table.add_row("exponent b (95 %)", *said)
    if target.name == PUBLISHED_TARGET:
        table.add_section()
        for equation, (labels, error) in PUBLISHED.items():
            table.add_row(f"published, {equation}: {labels:,}", f"{error:g}")
            if equation == "Eq. 5":
                ours = [f"{curve(labels):.3g}" for curve in curves.values()]
                table.add_row(f"our curves at {labels:,}", *ours)
    return table


def draw(
    found: pd.DataFrame, curves: dict[str, Curve], base: TrainConfig, path: Path
) -> None:
    """Draw errors, fitted lines and published points on logarithmic axes."""
    target = base.all_targets[0]
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    ax = figure.add_subplot()
    published = PUBLISHED if target.name == PUBLISHED_TARGET else {}
    ends = [*found["labels"], *(labels for labels, _ in published.values())]
    along = np.geomspace(min(ends), max(ends), 50)
    for number, (arm, curve) in enumerate(curves.items()):
        part, colour = found[found["arm"] == arm], f"C{number}"
        ax.scatter(part["labels"], part["test"], s=14, color=colour, alpha=0.7)
        label = f"{arm}, b = {curve.exponent:.2f}"
        ax.plot(along, curve(along), color=colour, lw=1.2, label=label)
    for (equation, point), marker in zip(published.items(), "*D", strict=False):
        ax.scatter(*point, marker=marker, s=60, color="0.3", label=f"CGCNN, {equation}")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="training crystals",
        ylabel=f"test MAE ({target.unit})",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _alloys(folder: Path) -> TrainConfig:
    """Return a small study of alloys."""
    _, crystals = demo_sets(seed=0, corpus_size=1, dataset_size=60)
    store = build(
        crystals, folder / "alloys.h5", symmetry=None, workers=1, progress=False
    ).store
    return TrainConfig(
        dataset=store,
        target=Target("formation_energy", "eV/atom"),
        encoder={"name": "cgcnn", "width": 8, "convolutions": 2},
        trainer=TrainerSettings(epochs=2, batch_size=8, progress=False),
    )


if __name__ == "__main__":
    raise SystemExit(main())
