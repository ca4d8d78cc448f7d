"""Arguments of verbs: how their text is read, and those of `split`."""

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
