"""The frame of a recipe: its command, bad input in one line, and runs done once."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table

from crysdistill.errors import InputError
from crysdistill.schema import dump_config
from crysdistill.training.run import RunConfig
from crysdistill.training.runs import check_same_run

Config = TypeVar("Config", bound=RunConfig)


def run_recipe(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    full: Callable[[argparse.Namespace], Any],
    small: Callable[[argparse.Namespace, Path], Any],
    *,
    needs: Sequence[str] = ("dataset",),
    called: str = "a dataset",
) -> int:
    """Run a recipe, or every step of it in small; return the exit code.

    Args:
        parser: of its command line, which has `--smoke`.
        argv: the arguments; None takes those of the process.
        full: runs it on what the user gave.
        small: runs it in a temporary folder, if `--smoke` is given.
        needs: the arguments without which a full run cannot be.
        called: these in words, for the message.
    """
    args = parser.parse_args(argv)
    if not args.smoke and not all(getattr(args, name) for name in needs):
        parser.error(f"give {called}, or `--smoke`")
    torch.set_flush_denormal(True)  # tails of Gaussians slow a CPU down
    try:
        if args.smoke:
            with tempfile.TemporaryDirectory() as folder:
                small(args, Path(folder))
        else:
            full(args)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def results_of_run(run: Callable[[Config], Path], config: Config) -> dict[str, Any]:
    """Return the results of a run; run it, or go on with it, if it is not finished.

    Args:
        run: `train`, `finetune`, `distill` or `fit`. What it prints is swallowed.
        config: its configuration; it is resumed where an earlier one stopped.

    Raises:
        InputError: the run cannot be made, or its folder holds one with another
            configuration.
    """
    path = config.out / "results.json"
    if path.exists():
        check_same_run(config.out, dump_config(config))
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            run(replace(config, resume=True))
    return json.loads(path.read_text("utf-8"))


def at_least_one(text: str) -> int:
    """Read a number of the command line that must be 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def narrow_tables(
    title: str,
    columns: Mapping[str, Mapping[str, str]],
    caption: str,
    at_most: int = 5,
) -> list[Table]:
    """Return one table, or several below each other that fit into 80 columns.

    Args:
        title: of the first.
        columns: the text of each row by its name, for each column by its head.
        caption: below the last.
        at_most: columns in a table.
    """
    heads = list(columns)
    parts = [heads[k : k + at_most] for k in range(0, len(heads), at_most)]
    tables = []
    for part in parts:
        table = Table(title=title if part is parts[0] else None)
        table.add_column("", no_wrap=True)
        for head in part:
            table.add_column(head, justify="right", overflow="fold")
        for row in columns[part[0]]:
            table.add_row(row, *(columns[head][row] for head in part))
        tables.append(table)
    if tables:
        tables[-1].caption = caption
    return tables
