"""Configurations: a YAML file and `key=value` on the command line, strictly read.

Dataclasses define the allowed keys (see `crysdistill.schema`). Text is converted to the
type in the schema: `1e-3` is a number if the key takes a number, and `no` is the text
"no" if the key takes text.

Why not only jsonargparse or pydantic? jsonargparse converts the plain values here. But
it selects a class by `class_path` and `init_args`, while users in this field write
`encoder: {name: alignn, width: 64}`, and it does not suggest the intended key. pydantic
would need a model made from the signature and docstring of every encoder and objective,
which is the work of `schema.py`. Its errors take several lines each, and would have to
be rewritten to name the key in one line as the user typed it.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from crysdistill.errors import InputError, did_you_mean
from crysdistill.schema import (
    ABSENT,
    Choice,
    Choices,
    Parameter,
    describe,
    dump_config,
    is_collection,
    is_section,
    list_keys,
    parameters,
    section_in_list,
    unread,
    unwrap,
    with_defaults,
    write_value,
)

__all__ = [
    "Choice", "Choices", "dump_config", "find_config", "load_config", "read_settings",
    "read_value",
]  # fmt: skip

Schema = TypeVar("Schema")


def load_config(
    path: str | Path | None, overrides: Sequence[str], schema: type[Schema]
) -> Schema:
    """Read a configuration and return it as an instance of its dataclass.

    Relative paths in it are relative to the working directory, not to the file; `~`
    is the home directory.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: `key=value`, with dots between nested keys; the last one for a key
            counts. A value is written as in YAML, in one line.
        schema: the dataclass of the run.

    Raises:
        InputError: a file or a key is unknown, a value has the wrong type, or a key
            without a default is missing.
    """
    tree = {} if path is None else read_yaml(find_config(path))
    for override in overrides:
        keys, value = _split_override(override)
        tree = _assign(tree, schema, keys, value, "")
    settings = _Reader(schema).section(parameters(schema), tree, "")
    return schema(**settings)


def read_settings(tree: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """Return settings as an instance of their dataclass, read like a YAML file.

    Args:
        tree: nested settings, as texts or already in their types.
        schema: the dataclass of the run.

    Raises:
        InputError: as for `load_config`.
    """
    return schema(**_Reader(schema).section(parameters(schema), tree, ""))


def read_value(given: Any, name: str) -> Any:
    """Return a list or mapping that was written in one line; else the value itself."""
    if isinstance(given, str) and given[:1] in ("[", "{"):
        return _parse(given, f"`{name}`")
    return given


def find_config(name: str | Path) -> Path:
    """Return the file that a CONFIG argument means; `.yaml` may be left out.

    Raises:
        InputError: there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder but must be a YAML file")
    for candidate in (path, path.with_name(path.name + ".yaml")):
        if candidate.is_file():
            return candidate
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    neighbours = [file.name for file in path.parent.iterdir() if file.is_file()]
    names = [*neighbours, *(name for name in neighbours if name.endswith(".yaml"))]
    hint = did_you_mean(path.name, names) or did_you_mean(f"{path.name}.yaml", names)
    folder = "" if path.parent == Path() else f"{path.parent}/"
    raise InputError(f"{path}: no such file{hint.replace('mean `', f'mean `{folder}')}")


class _TextLoader(yaml.SafeLoader):
    """YAML in which plain scalars except null stay text, and keys must not repeat."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own interface

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is not plain text", key.start_mark
                )
            if key.value in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"`{key.value}` is given twice, first in line {lines[key.value]}",
                    key.start_mark,
                )
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_TextLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose values are text, lists and mappings, not yet typed.

    Raises:
        InputError: it is not valid YAML, gives a key twice, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file (UTF-8)") from None
    tree = _parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold keys and values, one `key: value` per line")
    return tree


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        where = f" {error.context}" if error.context else ""
        problem = f"{error.problem or 'not valid YAML'}{where}"
        raise InputError(f"{source}{line}: {' '.join(problem.split())}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None


def _split_override(override: str) -> tuple[list[str], str | None]:
    """Split `a.b=value` into its keys and its value."""
    name, equals, value = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"{override!r} is not KEY=VALUE")
    return keys, None if value == "null" else value


def _assign(
    tree: Mapping[str, Any], schema: Any, keys: list[str], value: Any, prefix: str
) -> dict[str, Any]:
    """Return a copy of a tree in which one key, perhaps nested, has a new value."""
    key, *rest = keys
    if not rest:
        return {**tree, key: value}
    parameter = parameters(schema).get(key) if is_section(schema) else None
    kind, mark, _ = unwrap(parameter.annotation if parameter else None)
    inner = tree.get(key, ABSENT)
    if inner is ABSENT:
        # If one part of a default changes, parts that no file mentions keep theirs. A
        # `Choice` handles this itself, since another name drops the settings.
        default = parameter.default if parameter else ABSENT
        one = mark is not None and not isinstance(mark, Choices)
        inner = default if isinstance(default, Mapping) and not one else {}
    elif inner in (None, "true", "false", True, False):
        inner = {}
    elif isinstance(inner, str) and inner.startswith("{"):
        inner = _parse(inner, f"{prefix}{key}")
    if not isinstance(inner, Mapping):
        raise InputError(
            f"`{prefix}{key}` is {_show(inner)}, so `{prefix}{'.'.join(keys)}` cannot "
            "be set"
        )
    return {**tree, key: _assign(inner, kind, rest, value, f"{prefix}{key}.")}


class _Reader:
    """Turns text into the types of a schema.

    Args:
        schema: the dataclass of the run, to suggest intended keys.
    """

    def __init__(self, schema: type) -> None:
        self.schema = schema

    def section(
        self, known: Mapping[str, Parameter], given: Any, prefix: str
    ) -> dict[str, Any]:
        """Read the keys of a section, given or not; `prefix` ends with a dot."""
        given = _mapping(given, prefix.removesuffix("."), known)
        for key in given:
            if key not in known:
                raise self._unknown_key(str(key), known, prefix)
        return {
            key: self.value(parameter, given.get(key, ABSENT), prefix + key)
            for key, parameter in known.items()
        }

    def value(self, parameter: Parameter, given: Any, path: str) -> Any:
        """Read one key."""
        annotation, default = parameter
        kind, mark, optional = unwrap(annotation)
        if unread(annotation) is not None and given is not ABSENT:
            return read_value(given, path)
        if given is None and optional:
            return None
        if given is ABSENT:
            if default is None or (default is not ABSENT and mark is None):
                return default
            if default is ABSENT and not is_section(kind):
                one = mark is not None and not isinstance(mark, Choices)
                raise _missing(f"{path}.name" if one else path)
        if isinstance(mark, Choices):
            return self._all_chosen(mark, default if given is ABSENT else given, path)
        if mark is not None:
            return self._chosen(mark, given, default, path)
        inner = section_in_list(kind)
        if inner is not None:
            return self._listed(inner, given, path)
        if is_section(kind):
            known = with_defaults(parameters(kind), default)
            given = {} if given is ABSENT else given
            return _make(kind, self.section(known, given, f"{path}."), path)
        return _convert(annotation, given, path)

    def _listed(self, kind: type, given: Any, path: str) -> list[Any]:
        """Read a list of sections; a single section needs no list."""
        if isinstance(given, str) and given[:1] in ("[", "{"):
            given = _parse(given, f"`{path}`")
        found = [given] if isinstance(given, Mapping) else given
        if not isinstance(found, list):
            raise InputError(
                f"`{path}` is {_show(given)} but must be a list of sections with the "
                f"keys {', '.join(parameters(kind))}"
            )
        known = parameters(kind)
        return [
            one
            if isinstance(one, kind)
            else _make(kind, self.section(known, one, f"{path}[{k}]."), f"{path}[{k}]")
            for k, one in enumerate(found)
        ]

    def _chosen(
        self, mark: Choice, given: Any, default: Any, path: str
    ) -> dict[str, Any]:
        """Read a name and its settings."""
        default = default if isinstance(default, Mapping) else {}
        given = _mapping({} if given is ABSENT else given, path, ["name"])
        name = given.get("name", default.get("name"))
        if name is None:
            raise _missing(f"{path}.name")
        if not isinstance(name, str) or name not in mark.options:
            raise _not_one_of(f"{path}.name", name, list(mark.options))
        if name == default.get("name"):
            given = {**default, **given}
        settings = {key: value for key, value in given.items() if key != "name"}
        return {"name": name, **self._settings(mark, name, settings, path)}

    def _all_chosen(self, mark: Choices, given: Any, path: str) -> dict[str, Any]:
        """Read several names with their settings."""
        names = {name: Parameter(Any) for name in mark.options}
        given = _mapping(given, path, list(names))
        chosen = {}
        for name, settings in given.items():
            if name not in mark.options:
                raise self._unknown_key(str(name), names, f"{path}.")
            if settings in ("false", False):
                continue
            if settings in ("true", True):
                settings = {}
            chosen[name] = self._settings(mark, name, settings, f"{path}.{name}")
        return chosen

    def _settings(
        self, mark: Choice, name: str, given: Any, path: str
    ) -> dict[str, Any]:
        """Read the settings of a named option; its own defaults are not written out."""
        shared = mark.shared
        always = parameters(shared) if shared else {}
        known = {**always, **parameters(mark.options[name], mark.supplied)}
        given = _mapping(given, path, known)
        settings = self.section(known, given, f"{path}.")
        instance = (
            _make(shared, {key: settings[key] for key in always}, path)
            if shared
            else None
        )
        filled = always if isinstance(mark, Choices) else ()
        settings = {k: v for k, v in settings.items() if k in given or k in filled}
        if mark.defaults and instance is not None:
            settings = {**mark.defaults(name, instance), **settings}
        return settings

    def _unknown_key(
        self, key: str, known: Mapping[str, Parameter], prefix: str
    ) -> InputError:
        """Suggest the intended key: a similar one, or one of that name elsewhere."""
        moved = getattr(self.schema, "MOVED", {})
        if f"{prefix}{key}" in moved:
            new = moved[f"{prefix}{key}"]
            return InputError(f"`{prefix}{key}` is now `{new}`; give it there")
        hint = did_you_mean(key, known).replace("mean `", f"mean `{prefix}")
        if not hint:
            ending = f".{key.rpartition('.')[2]}"
            every = [found.name for found in list_keys(self.schema)]
            named = [name for name in every if f".{name}".endswith(ending)]
            # Another encoder has a setting of exactly this name.
            named = [name for name in named if name != f"{prefix}{key}"]
            hint = f"; did you mean `{named[0]}`?" if named else ""
        if not hint:
            hint = f"; known: {', '.join(known)}" if known else "; it takes none"
        return InputError(f"unknown key `{prefix}{key}`{hint}")


def _mapping(given: Any, path: str, known: Iterable[str]) -> Mapping[str, Any]:
    """Return a section as a mapping; an empty one stands for its defaults."""
    if isinstance(given, str) and given.startswith("{"):
        given = _parse(given, f"`{path}`")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        keys = ", ".join(f"`{path}.{key}`" for key in known)
        raise InputError(
            f"`{path}` is {_show(given)} but must hold keys"
            f"{'; it takes ' + keys if keys else ''}"
        )
    return given


def _make(kind: type, settings: Mapping[str, Any], path: str) -> Any:
    """Make a dataclass; rewrite its errors with the keys that the user writes."""
    try:
        return kind(**settings)
    except InputError as error:
        names = "|".join(map(re.escape, settings))
        text = re.sub(f"`({names})`", rf"`{path}.\1`", str(error))
        raise InputError(text) from None


def _convert(annotation: Any, given: Any, path: str) -> Any:
    """Read a plain value by its type."""
    # Imported late, so that verbs without a configuration start faster.
    from jsonargparse import ArgumentParser

    kind, _, optional = unwrap(annotation)
    if get_origin(kind) is Literal and isinstance(given, str):
        by_text = {write_value(choice): choice for choice in get_args(kind)}
        if given in get_args(kind) or given in by_text:
            return by_text.get(given, given)
        raise _not_one_of(path, given, [*by_text, *(["null"] if optional else [])])
    value = given
    if isinstance(given, str) and given[:1] in ("[", "{") and is_collection(kind):
        value = _parse(given, f"`{path}`")
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--value", type=kind)
    try:
        if given is None or (given == "" and kind is Path):
            raise ValueError
        # A copy, since jsonargparse changes lists in place.
        value = parser.parse_object({"value": copy.deepcopy(value)}).value
    except (argparse.ArgumentError, TypeError, ValueError):
        raise InputError(
            f"`{path}` is {_show(given)} but must be {describe(annotation)}"
        ) from None
    return _expand_home(value, path)


def _expand_home(value: Any, path: str) -> Any:
    if isinstance(value, Path):
        try:
            return value.expanduser()
        except RuntimeError:
            raise InputError(f"`{path}` is {value}: no such home directory") from None
    if isinstance(value, list | tuple):
        return type(value)(_expand_home(inner, path) for inner in value)
    return value


def _missing(path: str) -> InputError:
    return InputError(f"`{path}` is missing; give it in the config or as `{path}=...`")


def _not_one_of(path: str, given: Any, known: Sequence[str]) -> InputError:
    hint = did_you_mean(str(given), known)
    return InputError(
        f"`{path}` is {_show(given)} but must be one of {', '.join(known)}{hint}"
    )


def _show(given: Any) -> str:
    """Return a value in the user's form; only text has quotes."""
    if isinstance(given, str):
        try:
            plain = not isinstance(yaml.safe_load(given), str | list | dict)
        except yaml.YAMLError:
            plain = False
        text = given if plain and given else repr(given)
    elif isinstance(given, Mapping):
        text = f"{{{', '.join(f'{key}: {_show(v)}' for key, v in given.items())}}}"
    elif isinstance(given, list | tuple):
        text = f"[{', '.join(map(_show, given))}]"
    else:
        text = "null" if given is None else str(given)
    return text if len(text) <= 60 else text[:57] + "..."
