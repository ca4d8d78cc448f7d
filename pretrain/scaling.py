"""`python -m pretrain.scaling CORPUS --data FOLDER` asks what more crystals are worth.

The recipe pretrains the same CGCNN on corpora of several sizes, and encoders of other
width and depth on one corpus for an equal time. It fine-tunes all of them on the tasks
of `pretrain.tasks`, with some hundred labels, beside the same network from scratch.

    python -m pretrain.scaling mp_corpus/ --data data/ --sizes 3000 12000 50000 \
        --encoders 32x3 96x4 --tasks phonons "bulk modulus"

`96x4` is width 96 and four convolutions; `64x3` is the reference. A larger corpus also
means more steps, so with `--same-steps 12000` every corpus gets the steps of one of
12,000 crystals. The recipe prints the change of the test error against the reference
from scratch, and draws `scaling.svg`. It shares runs with `pretrain.evidence`. After an
interruption, run it again: it does only the missing runs. `--smoke` runs every step on
a few alloys that it makes itself.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from rich.table import Table

from crysdistill.studies.recipe import run_recipe
from pretrain.evidence import SCRATCH, Evidence, pretrained, run, small
from pretrain.tasks import TASKS, clean_corpus, task_stores

ARM = "bank"
"""The objective, one of `ARMS` of `pretrain.evidence`."""

REFERENCE = "64x3"

TIMED = 2_000
"""The crystals on which the speed of an encoder is measured."""


@dataclass(frozen=True)
class Point:
    """One pretraining.

    Args:
        encoder: as `WIDTHxCONVOLUTIONS`.
        size: the number of crystals.
        epochs: passes over them.
    """

    encoder: str
    size: int
    epochs: int


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain all, run every task, print the table, draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("corpus", nargs="?", type=Path, metavar="CORPUS", help="crystals, no labels")
    add("--data", type=Path, metavar="FOLDER", help="folder of the tasks")
    add("--sizes", nargs="+", type=int, default=[3_000, 12_000, 50_000])
    add("--same-steps", type=int, metavar="SIZE", help="steps of a corpus of SIZE")
    add("--encoders", nargs="*", type=_encoder, default=[], metavar="WxC")
    add("--at", type=int, default=12_000, help="the corpus of --encoders")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--labels", type=int, default=500, help="training labels of each task")
    add("--seeds", type=int, default=3, help="number of repeats")
    add("--pretrain-epochs", type=int, default=6, help="passes of the reference")
    add("--epochs", type=int, default=60, help="passes over the labels")
    add("--max-atoms", type=int, default=40, help="most atoms of a corpus crystal")
    add("--workers", type=int, default=1, help="runs at a time")
    add("--out", type=Path, default=Path("runs/evidence"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return run_recipe(
        parser,
        argv,
        _full,
        _small,
        needs=("corpus", "data"),
        called="a corpus and `--data FOLDER`",
    )


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    stores = task_stores(args.data, args.out)
    tasks = {name: TASKS[name] for name in args.tasks}
    base = Evidence(
        corpus=clean_corpus(args.corpus, args.out, args.max_atoms, stores.values()),
        datasets={name: stores[task.folder] for name, task in tasks.items()},
        tasks=tasks,
        arms=[ARM],
        labels=args.labels,
        seeds=range(args.seeds),
        pretrain_epochs=args.pretrain_epochs,
        epochs=args.epochs,
        encoder=_settings(REFERENCE),
        workers=args.workers,
        longer=False,
    )
    points = [
        Point(REFERENCE, size, _epochs_for(size, args)) for size in sorted(args.sizes)
    ]
    if args.encoders:
        encoders = [REFERENCE, *(x for x in args.encoders if x != REFERENCE)]
        epochs = equal_time(base, encoders, args.out)
        points += [Point(x, args.at, epochs[x]) for x in encoders]
    compare(base, list(dict.fromkeys(points)), args.out)
    rich.print(f"runs, scaling.csv and scaling.svg: {args.out}")


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    small_encoder = "8x2"
    base = replace(small(folder, [ARM], longer=False), encoder=_settings(small_encoder))
    epochs = equal_time(base, [small_encoder, "16x1"], folder)
    points = [Point(small_encoder, size, 1) for size in (20, 40)]
    compare(base, [*points, Point("16x1", 40, epochs["16x1"])], folder, small_encoder)


def _epochs_for(size: int, args: argparse.Namespace) -> int:
    """Return the passes over a corpus."""
    share = 1 if args.same_steps is None else args.same_steps / size
    return max(1, round(args.pretrain_epochs * share))


def _encoder(text: str) -> str:
    """Read `WIDTHxCONVOLUTIONS`."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxCONVOLUTIONS, as 96x4")
    return text


def _settings(encoder: str) -> dict[str, Any]:
    """Return the settings of a CGCNN."""
    width, convolutions = map(int, encoder.split("x"))
    return {"name": "cgcnn", "width": width, "convolutions": convolutions}


def _folder(encoder: str, base: Evidence, out: Path) -> Path:
    """Return the folder for all runs of an encoder."""
    return out if _settings(encoder) == base.encoder else out / encoder


def equal_time(base: Evidence, encoders: Sequence[str], out: Path) -> dict[str, int]:
    """Return the epochs of each encoder that take as long as those of the first.

    The speed is that of one epoch over a few crystals.

    Args:
        base: the corpus, and the epochs of the first.
        encoders: as `WIDTHxCONVOLUTIONS`.
        out: the folder for all runs.
    """
    speeds = {}
    for encoder in encoders:
        timed = replace(
            base, encoder=_settings(encoder), subset=TIMED, pretrain_epochs=1
        )
        weights = pretrained(timed, ARM, out / "timed" / encoder)
        told = json.loads((weights.parent / "throughput.json").read_text("utf-8"))
        speeds[encoder] = told["rates"]["crystals_per_s"]
    first = speeds[encoders[0]]
    return {
        encoder: max(1, round(base.pretrain_epochs * speed / first))
        for encoder, speed in speeds.items()
    }


def compare(
    base: Evidence, points: Sequence[Point], out: Path, reference: str = REFERENCE
) -> pd.DataFrame:
    """Run the missing runs, print the table, draw, and return one row for each run.

    Args:
        base: the settings of all.
        points: the pretrainings.
        out: the folder for all runs; `scaling.csv` in it holds the table.
        reference: the encoder against which all are compared, from scratch.
    """
    parts = []
    for point in points:
        evidence = replace(
            base,
            encoder=_settings(point.encoder),
            subset=point.size,
            pretrain_epochs=point.epochs,
        )
        found = run(evidence, _folder(point.encoder, base, out))
        parts.append(
            found.assign(encoder=point.encoder, size=point.size, epochs=point.epochs)
        )
    table = pd.concat(parts)
    keys = ["task", "seed"]
    alone = table[(table["arm"] == SCRATCH) & (table["encoder"] == reference)]
    scratch = alone.drop_duplicates(keys).set_index(keys)["test"].to_dict()
    pairs = zip(table["task"], table["seed"], table["test"], strict=True)
    table["change"] = [test / scratch[task, seed] - 1 for task, seed, test in pairs]
    table.to_csv(out / "scaling.csv", index=False)
    rich.print(_table(table, base.tasks, reference))
    draw(table[table["encoder"] == reference], out / "scaling.svg")
    return table


def _table(table: pd.DataFrame, tasks: Mapping[str, Any], reference: str) -> Table:
    """Return the mean change of each pretraining on each task."""
    shown = Table(title=f"Change of the test error against {reference} from scratch")
    for head in ("encoder", "crystals", "epochs", *tasks, "mean"):
        shown.add_column(head, justify="right")
    tuned = table[table["arm"] != SCRATCH]
    for (encoder, size, epochs), part in tuned.groupby(
        ["encoder", "size", "epochs"], sort=False
    ):
        row = [encoder, f"{size:,}", f"{epochs}"]
        shown.add_row(*row, *_changes(part, tasks))
    for encoder, part in table[table["arm"] == SCRATCH].groupby("encoder", sort=False):
        if encoder != reference:
            shown.add_row(str(encoder), "scratch", "", *_changes(part, tasks))
    return shown


def _changes(part: pd.DataFrame, tasks: Mapping[str, Any]) -> list[str]:
    """Return the mean change of each task, and that of all, in words."""
    by_task = part.groupby("task")["change"].mean()
    return [f"{by_task[task]:+.1%}" for task in tasks] + [f"{by_task.mean():+.1%}"]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw the change of the test error against the size of the corpus.

    A size with several numbers of epochs is drawn with the first.

    Args:
        table: the rows of one encoder, as `compare` returns them.
        path: of the picture.
    """
    tuned = table[table["arm"] != SCRATCH].drop_duplicates(["size", "task", "seed"])
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    ax = figure.add_subplot()
    for number, (task, part) in enumerate(tuned.groupby("task", sort=False)):
        colour = f"C{number % 10}"
        means = 100 * part.groupby("size")["change"].mean()
        ax.scatter(part["size"], 100 * part["change"], s=10, color=colour, alpha=0.5)
        ax.plot(means.index, means, color=colour, lw=1.2, label=str(task))
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set(
        xscale="log",
        xlabel="crystals of the corpus",
        ylabel="change of the test MAE against scratch (%)",
        xticks=np.unique(tuned["size"]),
    )
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False, fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit(main())
