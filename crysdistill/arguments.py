"""Arguments that several verbs share, their parsing, and the arguments of `split`."""

from __future__ import annotations

import argparse
from pathlib import Path

from crysdistill.command import Parser


def integer(text: str) -> int:
    """Read an integer."""
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"is {text!r} but must be an integer")
    return int(text)


def number(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r} but must be a number") from None


def names(text: str) -> tuple[str, ...]:
    """Read names separated by commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def out(parser: Parser, metavar: str, text: str) -> None:
    """Add `--out`, which must be given."""
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar=metavar, help=text
    )


def split_arguments(parser: Parser) -> None:
    """Add the arguments of `split`."""
    add = parser.add_argument
    add("dataset", type=Path, metavar="DATASET", help="a store")
    out(parser, "CSV", "the split to write; with --folds, one numbered file per fold")
    text = """`random`; `formula`, `prototype`, `cluster`, `crystal_system` or
    `space_group`, kept whole; `element`; `id`; `matbench`"""
    add("--by", help=text)
    text = "symbols such as `F,Cl`: crystals with one of them form the test set"
    add("--elements", type=names, metavar="SYMBOLS", help=text)
    add("--clusters", type=integer, help="how many clusters of composition and density")
    text = "a fraction up to 1, or a number of crystals"
    for name in ("--train", "--val", "--test"):
        add(name, type=number, metavar="SIZE", help=text)
    add("--seed", type=integer, help="seed of the random draw")
    add("--folds", type=integer, help="number of folds; each crystal is tested once")
    add("--fold", type=integer, help="write only this fold, counted from 0")
    text = "give each subset its share of every class of the target"
    add("--stratify", action="store_true", help=text)
    text = "use only crystals that have this property"
    add("--target", metavar="NAME", help=text)
    add("--overwrite", action="store_true", help="replace another split of that name")


SOURCES = """CIF or POSCAR files, folders (with or without `id_prop.csv`),
`structures.jsonl.gz` (with `properties.csv` beside it), pymatgen JSON, or stores"""


def source(text: str) -> str | Path:
    """Return a path, or a spec as text: a path would lose one of two slashes."""
    from crysdistill.sources.specs import is_spec

    return text if is_spec(text) else Path(text)


def sources(parser: Parser) -> None:
    """Add the sources that a verb reads structures from."""
    parser.add_argument(
        "sources", nargs="+", type=source, metavar="SOURCE", help=SOURCES
    )


def work(parser: Parser) -> None:
    """Add the number of processes, and the switch of the progress bar."""
    add = parser.add_argument
    add("--workers", type=integer, help="processes; all cores if absent")
    add("--no-progress", dest="progress", action="store_false", help="show no bar")


def cluster(parser: Parser) -> None:
    """Add the option that sends the work to a cluster."""
    text = """use Dask workers: `local:N`, `tcp://HOST:PORT` or the scheduler file
    (`scheduler.json`) of a running scheduler, or `slurm:FILE.yaml`"""
    parser.add_argument("--cluster", metavar="CLUSTER", help=text)
