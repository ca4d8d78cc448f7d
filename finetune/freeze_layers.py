"""`python -m finetune.freeze_layers gaps.h5 energies.safetensors` freezes layers.

A CGCNN of four convolutions was trained on one property. Its embedding and its first
1, 2 or 3 convolutions are frozen, the later layers start from random weights, and the
network learns another property from 1,000 labels. The sources can be the published
CGCNN weights; then the dataset needs their graph:

    crysdistill import-cgcnn formation-energy-per-atom.pth.tar -o energies.safetensors
    crysdistill build structures.jsonl.gz -o gaps.h5 --graph cgcnn
    python -m finetune.freeze_layers gaps.h5 energies.safetensors --target band_gap

Prints the test error of every source and depth beside the published errors. `--smoke`
runs every step on a few alloys that it makes itself: bulk modulus first, then formation
energy. After an interruption, run the same command again to continue.

Source: S. Deng, J. Park and A. Sy, "Transfer Learning and Representations for Material
Properties", report, University of California, Berkeley (band gap; 1,000 crystals each
for training, validation and testing; 30 epochs).

Differs from the report:
- We have several seeds with one split each, and their spread; the report has one seed.
- We use AdamW with one cycle of the learning rate, and validation chooses the epoch.
- Frozen batch norms keep the statistics of their first training. The report does not
  say how it treats them. `--batch-norm adaptive` lets them follow the new data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import rich
from rich.table import Table

from crysdistill.corpus.build import build
from crysdistill.demo import demo_sets
from crysdistill.graphs.batch import GraphSettings
from crysdistill.studies.recipe import run_recipe
from crysdistill.studies.report import console_table
from crysdistill.studies.study import StudyConfig, study
from crysdistill.training.settings import HeadSettings, TrainerSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import read_header

DEPTHS = (1, 2, 3)
"""The numbers of frozen convolutions, of four."""

PUBLISHED_BASELINE = 0.812
"""eV, band gap, trained on the 1,000 labels alone."""

PUBLISHED = {
    "formation energy": (0.797, 0.765, 0.865),
    "bulk modulus": (0.776, 0.897, 0.956),
    "shear modulus": (0.846, 0.993, 0.988),
}
"""eV, band gap, at the depths 1, 2 and 3, by the property learned first."""

PUBLISHED_7042 = {
    "elasticity, total energy and formation energy": (0.820, 0.850, 0.870),
    "formation energy": (1.022, 1.142, 1.437),
}
"""The same errors after first training on 7,042 crystals."""


def main(argv: Sequence[str] | None = None) -> int:
    """Freeze, fine-tune, and print the errors beside the published ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, help="a store with the property")
    add("sources", nargs="*", type=Path, metavar="WEIGHTS", help="weights files")
    add("--target", default="band_gap", help="the label's column")
    add("--unit", default="eV", help="unit of the label")
    add("--seeds", type=int, default=3, help="number of repeats")
    add("--batch-norm", choices=("frozen", "adaptive"), default="frozen")
    add("--workers", type=int, default=1, help="runs at a time")
    add("--out", type=Path, default=Path("runs/freeze_layers"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(
        parser,
        argv,
        _full,
        _small,
        needs=("sources",),
        called="a dataset and at least one weights file",
    )


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    base = {
        "dataset": args.dataset,
        "target": {"name": args.target, "unit": args.unit},
        "split": {"train": 1000, "val": 1000, "test": 1000},
        "trainer": {"epochs": 30},
    }
    seeds, out = range(args.seeds), args.out
    run(_study(base, args.sources, seeds, out, args.batch_norm, args.workers))


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    run(_alloys(folder))


def _study(
    base: Mapping[str, Any],
    sources: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    batch_norm: str = "frozen",
    workers: int = 1,
) -> StudyConfig:
    """Return the study: nothing learned first, and every source at every depth.

    Args:
        base: the dataset, target, split and schedule of all arms.
        sources: weights files of CGCNNs that learned another property.
        seeds: seeds of split, weights and order.
        out: its folder.
        batch_norm: the treatment of batch norms in frozen blocks.
        workers: runs at a time.
    """
    arms: dict[str, Any] = {"scratch": None}
    for depth in DEPTHS:  # later layers start from random weights
        kept = {"keep": depth, "freeze.convolutions": depth}
        arms[_arm(depth)] = {"like": "finetuned", **kept}
    encoder = {"name": "cgcnn", "convolutions": 4}
    shared = {"encoder": encoder, "head": {"hidden": 32}}
    return StudyConfig(
        base={**shared, "freeze": {"batch_norm": batch_norm}, **base},
        out=out,
        axes={"arm": arms, "weights": list(sources), "seed": list(seeds)},
        controls=False,
        workers=workers,
    )


def run(config: StudyConfig) -> pd.DataFrame:
    """Run the missing runs, print the tables, and return one row for each run."""
    results = study(config)
    rich.print(console_table(results))
    rich.print(beside_published(results))
    rich.print(
        "published with 7,042 crystals to learn from first: "
        + "; ".join(f"{name} {_three(v)}" for name, v in PUBLISHED_7042.items())
    )
    return results


def beside_published(results: pd.DataFrame) -> Table:
    """Return the errors at every depth, beside the published ones.

    Args:
        results: one row for each run; `weights` is the source.
    """
    unit = results["unit"].iloc[0]
    table = Table(title=f"Test MAE ({unit}) by the number of frozen convolutions")
    table.add_column("learned first")
    for head in ("nothing", *map(str, DEPTHS)):
        table.add_column(head, justify="right")

    def shown(arm: str, part: pd.DataFrame) -> str:
        values = part.loc[part["arm"] == arm, "value"]
        more = "" if len(values) < 2 else f" ± {values.std():.3f}"
        return f"{values.mean():.3f}{more}"

    learned = results[results["arm"] != "scratch"]
    for source, part in learned.groupby("weights", sort=False):
        ours = [shown(_arm(depth), part) for depth in DEPTHS]
        table.add_row(_name(Path(str(source))), shown("scratch", results), *ours)
    table.add_section()
    for name, values in PUBLISHED.items():
        published = [f"{value:.3f}" for value in values]
        table.add_row(name, f"{PUBLISHED_BASELINE:.3f}", *published)
    table.caption = "below the line: published, for the band gap in eV"
    return table


def _arm(depth: int) -> str:
    return f"{depth} frozen"


def _name(source: Path) -> str:
    """Return the property that the weights learned, or the file's name."""
    target = read_header(source).target
    return source.stem if target is None else target.name


def _three(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


def _alloys(folder: Path) -> StudyConfig:
    """Return a small study: learn the bulk modulus, then the formation energy."""
    _, dataset = demo_sets(seed=0, corpus_size=1, dataset_size=90)
    store = build(
        dataset,
        folder / "alloys.h5",
        graph=GraphSettings(mode="cgcnn"),
        symmetry=None,
        workers=1,
        progress=False,
    ).store
    first = TrainConfig(
        dataset=store,
        target=Target("bulk_modulus", "GPa", transform="log10"),
        out=folder / "first",
        encoder={"name": "cgcnn", "convolutions": 4},
        head=HeadSettings(hidden=32),
        trainer=TrainerSettings(epochs=3, batch_size=32, progress=False),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        weights = train(first)
    base = {
        "dataset": store,
        "target": {"name": "formation_energy", "unit": "eV/atom"},
        "split": {"train": 40, "val": 20, "test": 30},
        "trainer": {"epochs": 3, "batch_size": 32},
    }
    return _study(base, [weights], (0, 1), folder / "study")


if __name__ == "__main__":
    raise SystemExit(main())
