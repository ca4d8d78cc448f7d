"""The frame of a recipe: its command, bad input in one line, and runs done once."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from crysdistill.errors import InputError
from crysdistill.training.run import RunConfig

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
    """
    path = config.out / "results.json"
    if not path.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            run(replace(config, resume=True))
    return json.loads(path.read_text("utf-8"))
