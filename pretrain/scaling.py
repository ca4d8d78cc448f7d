"""`python -m pretrain.scaling CORPUS --data FOLDER` compares corpora and encoders.

The recipe pretrains the same CGCNN on corpora of several sizes, and encoders of other
width and depth on one corpus for an equal time. It fine-tunes all of them on the tasks
of `pretrain.tasks`, with some hundred labels, beside the same network from scratch.

    python -m pretrain.scaling mp_corpus/ --data data/ --sizes 3000 12000 50000 \
        --encoders 32x3 96x4 --tasks phonons "bulk modulus"

`96x4` is width 96 and four convolutions; `64x3` is the reference. A larger corpus also
means more steps, so with `--same-steps 50000` every corpus gets about as many steps as
one of 50,000 crystals. The recipe prints the change of the test error against the
reference from scratch, and draws `scaling.svg`. Each point is one pretraining. The
recipe shares runs with `pretrain.evidence`. After an interruption, run it again: it
does only the missing runs. `--smoke` runs every step on a few alloys that it makes
itself.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import rich
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from rich.table import Table

from crysdistill import PretrainConfig, Store
from crysdistill.errors import InputError
from crysdistill.files import write_whole
from crysdistill.studies.recipe import at_least_one, narrow_tables
from pretrain.evidence import (
    SCRATCH,
    Evidence,
    cgcnn,
    from_settings,
    pretrained,
    run,
    small,
)
from pretrain.tasks import add_settings, corpus_parser, run_on_corpus

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
    parser = corpus_parser(__doc__)
    add = partial(parser.add_argument, type=at_least_one)
    sizes = {"nargs": "+", "metavar": "SIZE", "default": [3_000, 12_000, 50_000]}
    add("--sizes", **sizes, help="numbers of crystals to pretrain on")
    add("--same-steps", metavar="SIZE", help="as many steps as with SIZE")
    add("--at", default=12_000, metavar="SIZE", help="crystals for --encoders")
    add("--encoders", nargs="*", type=_encoder, default=[], metavar="WxC")
    add_settings(parser)
    return run_on_corpus(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    base = replace(from_settings(args, [ARM], _settings(REFERENCE)), longer=False)
    check_sizes(base.corpus, [*args.sizes, *([args.at] if args.encoders else [])])
    passes = partial(
        epochs_over, epochs=args.pretrain_epochs, same_steps=args.same_steps
    )
    points = [Point(REFERENCE, size, passes(size)) for size in sorted(args.sizes)]
    if args.encoders:
        encoders = list(dict.fromkeys([REFERENCE, *args.encoders]))
        timed = replace(base, pretrain_epochs=passes(args.at))
        equal = equal_time(timed, encoders, args.out)
        points += [Point(encoder, args.at, equal[encoder]) for encoder in encoders]
    compare(base, list(dict.fromkeys(points)), args.out)
    rich.print(f"runs, scaling.csv and scaling.svg: {args.out}")


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    tiny = "8x2"
    base = replace(small(folder, [ARM], longer=False), encoder=_settings(tiny))
    epochs = equal_time(base, [tiny, "16x1"], folder)
    points = [Point(tiny, size, 1) for size in (20, 40)]
    compare(base, [*points, Point("16x1", 40, epochs["16x1"])], folder, tiny)


def check_sizes(corpus: Path, sizes: Sequence[int]) -> None:
    """Refuse more crystals than the corpus has for training."""
    crystals = len(Store.open(corpus))
    most = crystals - max(2, round(PretrainConfig.held_out * crystals))
    if max(sizes) > most:
        raise InputError(
            f"{corpus} has {most:,} crystals to pretrain on, which is less than "
            f"{max(sizes):,}; give smaller numbers, or raise `--max-atoms`"
        )


def epochs_over(size: int, epochs: int, same_steps: int | None) -> int:
    """Return the passes over a corpus.

    Args:
        size: the crystals of the corpus.
        epochs: passes over one of `same_steps` crystals, or over any.
        same_steps: a number of crystals; the steps are about those over them.

    Raises:
        InputError: no whole number of passes makes the same steps, within a tenth.
    """
    if same_steps is None:
        return epochs
    wanted = epochs * same_steps / size
    found = max(1, round(wanted))
    if abs(found / wanted - 1) > 0.1:
        raise InputError(
            f"`--same-steps {same_steps}`: {wanted:.2f} passes over {size:,} crystals "
            "make as many steps, which is too far from a whole number; raise "
            "`--same-steps` or `--pretrain-epochs`"
        )
    return found


def _encoder(text: str) -> str:
    """Read `WIDTHxCONVOLUTIONS`."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxCONVOLUTIONS, as 96x4")
    return text


def _settings(encoder: str) -> dict[str, Any]:
    """Return the settings of `WIDTHxCONVOLUTIONS`."""
    width, convolutions = map(int, encoder.split("x"))
    return cgcnn(width, convolutions)


def _folder(encoder: str, base: Evidence, out: Path) -> Path:
    """Return the folder for all runs of an encoder."""
    return out if _settings(encoder) == base.encoder else out / encoder


def equal_time(base: Evidence, encoders: Sequence[str], out: Path) -> dict[str, int]:
    """Return the epochs of each encoder that take as long as those of the first.

    The speed is that of one epoch over a few crystals. All are measured together, once.

    Args:
        base: the corpus, and the epochs of the first.
        encoders: as `WIDTHxCONVOLUTIONS`.
        out: the folder for all runs; `speeds.json` in it holds the speeds.
    """
    path = out / "speeds.json"
    speeds = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not set(encoders) <= set(speeds):  # all anew: the machine may be busier now
        speeds = {encoder: _speed(base, encoder) for encoder in encoders}
        write_whole(path, json.dumps(speeds).encode())
    first = speeds[encoders[0]]
    epochs = {
        encoder: max(1, round(base.pretrain_epochs * speeds[encoder] / first))
        for encoder in encoders
    }
    for encoder in encoders:
        time = epochs[encoder] / speeds[encoder] * first / base.pretrain_epochs
        rich.print(
            f"{encoder}: {speeds[encoder]:,.0f} crystals/s, {epochs[encoder]} epochs "
            f"in {time:.2f} of the time"
        )
    return epochs


def _speed(base: Evidence, encoder: str) -> float:
    """Return the crystals per second of one epoch over a few crystals."""
    timed = replace(base, encoder=_settings(encoder), subset=TIMED, pretrain_epochs=1)
    with TemporaryDirectory() as folder:
        weights = pretrained(timed, ARM, Path(folder))
        told = json.loads((weights.parent / "throughput.json").read_text("utf-8"))
    return float(told["rates"]["crystals_per_s"])


def compare(
    base: Evidence, points: Sequence[Point], out: Path, reference: str = REFERENCE
) -> pd.DataFrame:
    """Run the missing runs, print the table, draw, and return one row for each run.

    Args:
        base: the settings of all.
        points: the pretrainings.
        out: the folder for all runs; `scaling.csv` in it holds the table.
        reference: the encoder against which all are compared, from scratch; one of
            the points has it.

    Raises:
        InputError: see `run` of `pretrain.evidence`.
    """
    parts, scratch = [], {}
    for point in points:
        evidence = replace(
            base,
            encoder=_settings(point.encoder),
            subset=point.size,
            pretrain_epochs=point.epochs,
        )
        found = run(evidence, _folder(point.encoder, base, out))
        alone = found["arm"] == SCRATCH
        scratch[point.encoder] = found[alone].assign(encoder=point.encoder)
        parts.append(found[~alone].assign(**asdict(point)))
    table = pd.concat([*parts, *scratch.values()])
    keys = ["task", "seed"]
    errors = scratch[reference].set_index(keys)["test"].to_dict()
    pairs = zip(table["task"], table["seed"], table["test"], strict=True)
    table["change"] = [test / errors[task, seed] - 1 for task, seed, test in pairs]
    table.to_csv(out / "scaling.csv", index=False)
    rich.print(*_tables(table, base, reference))
    draw(table[table["encoder"] == reference], out / "scaling.svg")
    return table


def _tables(table: pd.DataFrame, base: Evidence, reference: str) -> list[Table]:
    """Return tables of the mean change of each pretraining on each task."""
    columns = {}
    tuned = table[table["arm"] != SCRATCH]
    points = tuned.groupby(["encoder", "size", "epochs"], sort=False)
    for (encoder, size, epochs), part in points:
        passes = "1 epoch" if epochs == 1 else f"{epochs:.0f} epochs"
        head = f"{encoder}\n{size:,.0f}\n{passes}"
        columns[head] = _changes(part, base)
    for encoder, part in table[table["arm"] == SCRATCH].groupby("encoder", sort=False):
        if encoder != reference:
            columns[f"{encoder}\nscratch"] = _changes(part, base)
    return narrow_tables(
        f"Change of the test error against {reference} from scratch, {base.labels} "
        "labels",
        columns,
        f"one pretraining each; seeds of fine-tuning: {len(base.seeds)}",
    )


def _changes(part: pd.DataFrame, base: Evidence) -> dict[str, str]:
    """Return the mean change of each task, and that of all, in words."""
    by_task = part.groupby("task")["change"].mean()
    cells = {task: f"{by_task[task]:+.1%}" for task in base.tasks}
    return {**cells, "mean": f"{by_task.mean():+.1%}"}


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw the change of the test error against the size of the corpus.

    Args:
        table: the rows of one encoder, as `compare` returns them.
        path: of the picture.
    """
    tuned = table[table["arm"] != SCRATCH]
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
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False, fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit(main())
