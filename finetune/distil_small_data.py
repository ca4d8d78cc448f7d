"""`python -m finetune.distil_small_data dataset.h5 crysgnn.safetensors` distils.

CrysGNN's four students - CGCNN, CrysXPP, GATGNN, ALIGNN - learn a property from a
fifth, two fifths and three fifths of a dataset, each alone and with the embeddings of a
pretrained teacher. The control is a teacher with random weights: a gain that it also
gives does not come from knowledge. `--students` takes fewer students or other encoders.

    python -m pretrain.crysgnn corpus.h5 exclude=[dataset.h5]
    python -m finetune.distil_small_data dataset.h5 \
        runs/pretrain-crysgnn/weights.safetensors --target bulk_modulus --unit GPa

Prints the test errors beside those of the paper. `--smoke` runs every step on a few
alloys that it makes itself. After an interruption, run the same command to continue.

Source: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892, on JARVIS
data: the band gap from the MBJ potential (eV), bulk and shear modulus (GPa).

Differs from the paper:
- We have several seeds with one split each. The paper has one seed and the order of the
  file.
- Validation chooses the epoch, and test crystals are predicted once. The paper chose
  the epoch with the smallest test error.
- The teacher is in eval mode, and may be pretrained without the dataset's crystals.
- We use AdamW with one cycle of the learning rate, and `--epochs` epochs.
- We compare crystal embeddings, scaled by the teacher's variance. The paper compares
  directions of atom embeddings, which weigh little beside the property.
- Students have our default settings, and a projector if their width differs from the
  teacher's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import rich
import yaml
from rich.table import Table

from crysdistill.configs import load_config
from crysdistill.corpus.build import build
from crysdistill.demo import demo_sets
from crysdistill.encoders import ENCODERS
from crysdistill.studies.recipe import run_recipe
from crysdistill.studies.report import console_table
from crysdistill.studies.study import StudyConfig, study
from crysdistill.training.pretrain import PretrainConfig, pretrain

SHARES = (0.2, 0.4, 0.6)
"""Training shares of the dataset; a tenth is for validation, the rest for testing."""

ARMS = ("scratch", "distilled", "random-teacher")
"""Alone, with the teacher, and the control."""

STUDENTS = ("cgcnn", "crysxpp", "gatgnn", "alignn")
"""The students of the paper, by the names of our encoders."""

PUBLISHED = {
    "band gap MBJ (eV)": {
        "cgcnn": ((0.588, 0.453), (0.532, 0.419), (0.449, 0.364)),
        "crysxpp": ((0.598, 0.450), (0.496, 0.405), (0.435, 0.360)),
        "gatgnn": ((0.541, 0.521), (0.462, 0.448), (0.449, 0.439)),
        "alignn": ((0.497, 0.485), (0.404, 0.395), (0.387, 0.380)),
    },
    "bulk modulus (GPa)": {
        "cgcnn": ((16.91, 16.26), (14.81, 14.46), (14.23, 14.05)),
        "crysxpp": ((15.42, 14.25), (15.13, 14.02), (14.76, 13.73)),
        "gatgnn": ((14.80, 14.19), (12.98, 12.59), (12.01, 11.75)),
        "alignn": ((14.70, 14.06), (12.47, 12.11), (11.23, 11.01)),
    },
    "shear modulus (GPa)": {
        "cgcnn": ((13.89, 12.50), (12.04, 11.54), (11.75, 11.31)),
        "crysxpp": ((13.39, 12.07), (12.16, 11.01), (11.77, 10.67)),
        "gatgnn": ((12.83, 12.42), (11.43, 11.23), (10.65, 10.47)),
        "alignn": ((12.71, 12.31), (10.98, 10.67), (10.24, 10.04)),
    },
}
"""Test MAE alone and distilled, by property and student, for each of `SHARES`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Distil at three numbers of labels, and print the errors beside the paper's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, help="a store with the property")
    add("weights", nargs="?", type=Path, help="weights file of the pretrained teacher")
    add("--target", default="target", help="the label's column")
    add("--unit", default="", help="unit of the label")
    add("--students", nargs="+", choices=list(ENCODERS), default=list(STUDENTS))
    add("--seeds", type=int, default=3, help="number of repeats")
    add("--epochs", type=int, default=100, help="passes over the labels")
    add("--workers", type=int, default=1, help="runs at a time")
    add("--out", type=Path, default=Path("runs/distil_small_data"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(
        parser,
        argv,
        _full,
        _small,
        needs=("weights",),
        called="a dataset and a weights file",
    )


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    base = {
        "dataset": args.dataset,
        "target": {"name": args.target, "unit": args.unit},
        "trainer": {"epochs": args.epochs},
    }
    students = [{"name": name} for name in args.students]
    seeds, out = range(args.seeds), args.out
    given = _study(base, args.weights, students, seeds, out, args.workers)
    run(given, args.students)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    run(_alloys(folder, args.students), args.students)


def _study(
    base: Mapping[str, Any],
    weights: Path,
    students: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    out: Path,
    workers: int = 1,
) -> StudyConfig:
    """Return the study: every student at every share of the labels.

    Args:
        base: the dataset, target and schedule of all arms.
        weights: the weights file of the pretrained teacher.
        students: names and settings of encoders.
        seeds: seeds of split, weights and order.
        out: its folder.
        workers: runs at a time.
    """
    shares = {
        _task(share): {"split": {"train": share, "val": 0.1, "test": 0.9 - share}}
        for share in SHARES
    }
    return StudyConfig(
        base={**base},
        weights=weights,
        out=out,
        axes={
            "task": shares,
            "encoder": list(students),
            "arm": list(ARMS),
            "seed": list(seeds),
        },
        controls=False,
        workers=workers,
    )


def run(config: StudyConfig, students: Sequence[str]) -> pd.DataFrame:
    """Run the missing runs, print the tables, and return one row for each run.

    Args:
        config: the study.
        students: names of its encoders.
    """
    table = study(config)
    named = table.assign(encoder=table["encoder"].map(lambda text: _encoder(text)))
    for student in students:
        ours = named[named["encoder"] == student].drop(columns="encoder")
        rich.print(console_table(ours))
        rich.print(beside_published(ours, student))
    return table


def beside_published(results: pd.DataFrame, student: str) -> Table:
    """Return the changes that a teacher makes, beside the published changes.

    Args:
        results: one row for each run of the student; the task names the share.
        student: the name of the encoder.
    """
    heads = (f"{share:.0%} of the labels" for share in SHARES)
    table = Table(f"test MAE of {student}", *heads)
    mean = results.groupby(["arm", "task"])["value"].mean()
    unit, name = results["unit"].iloc[0], results["target"].iloc[0]
    for arm in ARMS:
        cells = []
        for share in SHARES:
            value = mean[arm, _task(share)]
            change = value / mean["scratch", _task(share)] - 1
            more = "" if arm == "scratch" else f" ({change:+.1%})"
            cells.append(f"{value:.4g}{more}")
        table.add_row(f"{name} ({unit}), {arm}", *cells)
    for name, students in PUBLISHED.items():
        if student not in students:
            continue
        pairs = students[student]
        table.add_section()
        table.add_row(f"published: {name}, scratch", *(f"{a:.4g}" for a, _ in pairs))
        cells = [f"{b:.4g} ({b / a - 1:+.1%})" for a, b in pairs]
        table.add_row(f"published: {name}, distilled", *cells)
    return table


def _task(share: float) -> str:
    return f"{share:.0%} of the labels"


def _encoder(text: str) -> str:
    """Return the name in a student's settings, as the results hold them."""
    return str(yaml.safe_load(text)["name"])


def _alloys(folder: Path, students: Sequence[str]) -> StudyConfig:
    """Return a small study, with a teacher that has seen a few alloys."""
    stores = {}
    sets = demo_sets(seed=0, corpus_size=100, dataset_size=60)
    for name, crystals in zip(("corpus", "dataset"), sets, strict=True):
        out = folder / f"{name}.h5"
        stores[name] = build(crystals, out, workers=1, progress=False).store
    given = [f"corpus={stores['corpus']}", f"exclude=[{stores['dataset']}]"]
    given += [f"out={folder / 'pretrain'}", "trainer.progress=false"]
    weights = pretrain(load_config(None, [*given, "trainer.epochs=1"], PretrainConfig))
    base = {
        "dataset": stores["dataset"],
        "target": {"name": "formation_energy", "unit": "eV/atom"},
        "trainer": {"epochs": 2, "batch_size": 16},
    }
    small = [{"name": name, **ENCODERS[name].SMALL} for name in students]
    return _study(base, weights, small, (0,), folder / "study")


if __name__ == "__main__":
    raise SystemExit(main())
