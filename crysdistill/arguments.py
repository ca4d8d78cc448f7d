"""Arguments that several verbs share, how their text is read, and those of `split`."""

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
    """Read names with commas between them."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def out(parser: Parser, metavar: str, text: str) -> None:
    """Add `--out`, which must be given."""
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar=metavar, help=text
    )


def split_arguments(parser: Parser) -> None:
    """Add what `split` takes."""
    add = parser.add_argument
    add("dataset", type=Path, metavar="DATASET", help="a store")
    out(parser, "CSV", "what to write; with --folds `CSV` gets a number for each")
    text = """`random`; `formula`, `prototype`, `cluster`, `crystal_system` or
    `space_group`, kept whole; `element`; `id`; `matbench`"""
    add("--by", help=text)
    text = "symbols such as `F,Cl`: crystals with one of them are the test set"
    add("--elements", type=names, metavar="SYMBOLS", help=text)
    add("--clusters", type=integer, help="how many clusters of composition and density")
    text = "a fraction up to 1, or a number of crystals"
    for name in ("--train", "--val", "--test"):
        add(name, type=number, metavar="SIZE", help=text)
    add("--seed", type=integer, help="of the draw")
    add("--folds", type=integer, help="test every crystal once, in so many parts")
    add("--fold", type=integer, help="write this one only, from 0 on")
    text = "give each subset its share of every class of the target"
    add("--stratify", action="store_true", help=text)
    text = "only crystals that have this property"
    add("--target", metavar="NAME", help=text)
    add("--overwrite", action="store_true", help="replace another split of that name")


SOURCES = """CIF or POSCAR files, folders (with or without `id_prop.csv`),
`structures.jsonl.gz` (with `properties.csv` beside it), pymatgen JSON, or stores"""


def source(text: str) -> str | Path:
    """Return a path, or a spec as it is: a path would lose one of two slashes."""
    from crysdistill.sources.specs import is_spec

    return text if is_spec(text) else Path(text)


def sources(parser: Parser) -> None:
    """Add what a verb reads structures from."""
    parser.add_argument(
        "sources", nargs="+", type=source, metavar="SOURCE", help=SOURCES
    )


def work(parser: Parser) -> None:
    """Add how many processes work, and whether a bar shows it."""
    add = parser.add_argument
    add("--workers", type=integer, help="processes; all cores if absent")
    add("--no-progress", dest="progress", action="store_false", help="show no bar")


def cluster(parser: Parser) -> None:
    """Add where else than here the work may be done."""
    text = """Dask workers instead: `local:N`, `tcp://HOST:PORT` or a scheduler file
    (`scheduler.json`) of a running scheduler, or `slurm:FILE.yaml`"""
    parser.add_argument("--cluster", metavar="CLUSTER", help=text)
