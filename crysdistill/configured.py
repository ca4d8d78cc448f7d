"""Verbs that read a configuration: a YAML file, and `KEY=VALUE` to override it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crysdistill.command import Parser


def config_arguments(parser: Parser) -> None:
    """Add the arguments that all these verbs share."""
    add = parser.add_argument
    text = "a YAML file; without one, all keys keep their defaults"
    add("config", nargs="?", default=None, metavar="CONFIG", help=text)
    text = "values that override the file, such as `trainer.epochs=5`"
    add("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    add("--keys", action="store_true", help="list every key with its default, and stop")
    add("--show", action="store_true", help="print the whole configuration, and stop")


def check_config(args: argparse.Namespace) -> None:
    """Read the file once without its schema, so that YAML mistakes show at once."""
    from crysdistill.configs import find_config, read_yaml

    path, _ = _config_and_overrides(args)
    if path is not None:
        read_yaml(find_config(path))


def _config_and_overrides(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Return the file and the overrides; an override may stand in the file's place."""
    path, overrides = args.config, args.overrides
    if path is not None and "=" in path and not Path(path).exists():
        return None, [path, *overrides]
    return path, overrides


def configured(
    module: str,
    schema: str,
    function: str,
    args: argparse.Namespace,
    show: Callable[[Any], None] | None = None,
) -> None:
    """Load a configuration and call its function.

    Args:
        module: the module of `schema` and `function`.
        schema: the name of the configuration's dataclass.
        function: the name of the function that takes the configuration.
        args: the parsed arguments; see `config_arguments`.
        show: prints the function's result; None if the function prints it itself.
    """
    from crysdistill.configs import dump_config, load_config

    library = importlib.import_module(module)
    kind = getattr(library, schema)
    if "keys" in args:
        _print_keys(kind)
        return
    config = load_config(*_config_and_overrides(args), kind)
    if "show" in args:
        print(dump_config(config), end="")
        return
    result = getattr(library, function)(config)
    if show:
        show(result)


def _print_keys(schema: type) -> None:
    """Print every key of a configuration."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from crysdistill.schema import list_keys

    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("meaning", overflow="fold")
    before = ""
    for name, meaning, default, text, option in list_keys(schema):
        if option not in ("", before):
            table.add_row("", "", Text(f"with {option}:", style="bold"))
        before = option
        said = f"{meaning}; {text}" if text else meaning
        row = (name, "(required)" if default is None else default, said)
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
