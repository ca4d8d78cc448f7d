"""The keys of a configuration, taken from the signatures of the code it configures.

The configuration of a run is a dataclass. Its fields hold plain values, further
dataclasses, or options chosen by name. The settings of an option are the parameters of
its class or function; `Choice` and `Choices` mark such fields. Nothing here reads a
file: see `crysdistill.configs`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

ABSENT: Any = inspect.Parameter.empty
"""Stands for a value that was not given."""

# libyaml, if PyYAML was built with it, is eight times as fast: a report reads the
# configurations of a thousand runs.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, eq=False)
class Choice:
    """Marks a field that names one option and holds its settings.

    `encoder: Annotated[dict[str, Any], Choice(ENCODERS)]` takes
    `{name: cgcnn, width: 128}`: the parameters of the encoder are the keys beside
    `name`. If the field's default has the same name, its settings apply unless others
    are given. Parameters that are not given are left out. So the option keeps its own
    defaults, and a run can set parameters that follow from its data.

    Args:
        options: the options by name; their parameters are the keys.
        supplied: parameters that do not come from a configuration.
        shared: a dataclass of further keys that each option takes.
        defaults: returns default settings for a name and its instance of `shared`.
    """

    options: Mapping[str, Callable[..., Any]]
    supplied: tuple[str, ...] = ()
    shared: type | None = None
    defaults: Callable[[str, Any], Mapping[str, Any]] | None = None


@dataclass(frozen=True, eq=False)
class Choices(Choice):
    """Marks a field that holds any number of named options, each with its settings.

    `objectives: Annotated[dict[str, Any], Choices(OBJECTIVES)]` takes
    `{space_group: {balance: 0.5}, connectivity: true}`. `true` means no settings;
    `false` removes a default option. The keys of `shared` are always filled in.
    """


@dataclass(frozen=True, eq=False)
class Unread:
    """Marks a field whose value is kept as it was given, as texts, lists, mappings.

    Args:
        of: dataclasses whose keys it may hold, for the list of keys.
        without: keys of these that it may not hold.
    """

    of: tuple[type, ...] = ()
    without: tuple[str, ...] = ()


def unread(annotation: Any) -> Unread | None:
    """Return the mark `Unread` of a type, if it has it."""
    extras = get_args(annotation) if get_origin(annotation) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Unread)), None)


class Unwrapped(NamedTuple):
    """A type without its marks.

    Args:
        kind: the type, without None.
        mark: the `Choice` (or `Choices`) on it, if any.
        optional: whether None is allowed.
    """

    kind: Any
    mark: Choice | None
    optional: bool


def unwrap(annotation: Any) -> Unwrapped:
    """Remove the mark and the None from a type."""
    mark: Choice | None = None
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *extras = get_args(annotation)
            marks = [extra for extra in extras if isinstance(extra, Choice)]
            mark = marks[0] if marks else mark
        elif _is_union(annotation) and type(None) in get_args(annotation):
            optional = True
            members = [a for a in get_args(annotation) if a is not type(None)]
            annotation = Union[tuple(members)]  # noqa: UP007 - made at run time
        else:
            return Unwrapped(annotation, mark, optional or annotation is Any)


def is_section(kind: Any) -> bool:
    """Return whether a type is a dataclass, that is, a section of a configuration."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def section_in_list(kind: Any) -> type | None:
    """Return the dataclass in a type that is a list of it, else None."""
    inner = get_args(kind)
    if get_origin(kind) in (list, tuple) and inner and is_section(inner[0]):
        return inner[0]
    return None


def is_collection(kind: Any) -> bool:
    """Return whether a type holds several values: a list, a tuple, a mapping."""
    if _is_union(kind):
        return any(map(is_collection, get_args(kind)))
    origin = get_origin(kind) or kind
    return (
        isinstance(origin, type)
        and issubclass(origin, Collection)
        and not issubclass(origin, str)
    )


class Parameter(NamedTuple):
    """One key of a configuration.

    Args:
        annotation: its type, with marks.
        default: its default value, or `ABSENT`.
    """

    annotation: Any
    default: Any = ABSENT


def parameters(
    target: Callable[..., Any], supplied: tuple[str, ...] = ()
) -> dict[str, Parameter]:
    """Return the keys that a dataclass, a class or a function takes, in order.

    Args:
        target: the dataclass, class or function.
        supplied: parameters to leave out.
    """
    found: dict[str, Parameter] = {}
    if is_section(target):
        hints = get_type_hints(target, include_extras=True)
        for field in dataclasses.fields(target):  # type: ignore[arg-type]
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is dataclasses.MISSING:
                default = ABSENT
            if field.init:
                found[field.name] = Parameter(hints[field.name], default)
    else:
        function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(target).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            found[name] = Parameter(hints.get(name, Any), parameter.default)
    return {name: p for name, p in found.items() if name not in supplied}


def with_defaults(known: Mapping[str, Parameter], default: Any) -> dict[str, Parameter]:
    """Replace defaults by those of a dataclass instance or mapping, if it is one."""
    values = default if isinstance(default, Mapping) else {}
    if is_section(type(default)):
        values = {name: getattr(default, name) for name in known}
    return {
        key: Parameter(p.annotation, values.get(key, p.default))
        for key, p in known.items()
    }


def describe(annotation: Any) -> str:
    """Describe a value of a type in words."""
    kind, _, optional = unwrap(annotation)
    null = " or null" if optional and kind is not Any else ""
    return _words(kind, plural=False) + null


_WORDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "text"),
    Path: ("a path", "paths"),
    Any: ("a value", "values"),
    type(None): ("null", "null"),
}


def _words(kind: Any, plural: bool) -> str:
    if kind in _WORDS:
        return _WORDS[kind][plural]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        if len(inner) == 1:
            return f"`{inner[0]}`"
        return f"one of {', '.join(map(str, inner))}"
    if _is_union(kind):
        return " or ".join(dict.fromkeys(_words(member, plural) for member in inner))
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} {_words(inner[0], plural=True)}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from names to {_words(inner[1], plural=True)}"
    if origin is not None and inner:
        return f"a list of {_words(inner[0], plural=True)}"
    return f"a {getattr(kind, '__name__', kind)}"


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


class Key(NamedTuple):
    """One line in the list of a configuration's keys.

    Args:
        name: the dotted name.
        meaning: the type of the value, in words.
        default: the default as it would be written, or None if a value must be given.
        text: the text in the docstring.
        option: the encoder, or other option, whose setting it is.
    """

    name: str
    meaning: str
    default: str | None
    text: str
    option: str = ""


def list_keys(schema: type) -> Iterator[Key]:
    """Yield every key that a configuration may hold, with type, default and text."""
    yield from _keys(parameters(schema), documentation(schema), "")


def _keys(
    known: Mapping[str, Parameter], texts: Mapping[str, str], prefix: str
) -> Iterator[Key]:
    for name, (annotation, default) in known.items():
        kind, mark, _ = unwrap(annotation)
        path = prefix + name
        kept = unread(annotation)
        if kept is not None and kept.of:
            yield from _held_keys(kept, f"{path}.")
        elif mark is None and not is_section(kind):
            text = None if default is ABSENT else write_value(default)
            yield Key(path, describe(annotation), text, texts.get(name, ""))
        elif mark is None:
            inner = with_defaults(parameters(kind), default)
            yield from _keys(inner, documentation(kind), path + ".")
        elif isinstance(mark, Choices):
            chosen = default if isinstance(default, Mapping) else {}
            for option, target in mark.options.items():
                for part in (mark.shared, target):
                    if part is not None:
                        inner = parameters(part, mark.supplied)
                        inner = with_defaults(inner, chosen.get(option))
                        words = documentation(part)
                        yield from _keys(inner, words, f"{path}.{option}.")
        else:
            chosen = default if isinstance(default, Mapping) else {}
            meaning = f"one of {', '.join(mark.options)}"
            yield Key(f"{path}.name", meaning, chosen.get("name"), texts.get(name, ""))
            if mark.shared is not None:
                words = documentation(mark.shared)
                yield from _keys(parameters(mark.shared), words, path + ".")
            for option, target in mark.options.items():
                inner = parameters(target, mark.supplied)
                if option == chosen.get("name"):
                    inner = with_defaults(inner, chosen)
                for key in _keys(inner, documentation(target), path + "."):
                    yield key._replace(option=f"{path}.name={option}")


def _held_keys(kept: Unread, prefix: str) -> Iterator[Key]:
    """Yield the keys that an unread field may hold, each once."""
    seen = set(kept.without)
    for schema in kept.of:
        for key in list_keys(schema):
            if key.name not in seen:
                seen.add(key.name)
                option = f"{prefix}{key.option}" if key.option else ""
                yield key._replace(name=f"{prefix}{key.name}", option=option)


def documentation(target: Callable[..., Any]) -> dict[str, str]:
    """Return the docstring's text on each argument, on one line each."""
    from docstring_parser import parse

    bases = inspect.getmro(target) if isinstance(target, type) else (target,)
    found = {}
    for base in reversed(bases):  # a dataclass need not repeat what it inherits
        for p in parse(inspect.cleandoc(base.__doc__ or "")).params:
            found[p.arg_name] = " ".join((p.description or "").split())
    return found


def write_value(value: Any) -> str:
    """Return a value as one line of a configuration would write it."""
    text = yaml.safe_dump(
        _plain(value), default_flow_style=True, allow_unicode=True, width=10_000
    )
    return text.removesuffix("\n").removesuffix("\n...")


def dump_config(config: Any) -> str:
    """Return a configuration as YAML that `load_config` reads back to an equal one.

    Args:
        config: an instance of the dataclass that describes the run.
    """
    return yaml.safe_dump(
        _plain(config), sort_keys=False, allow_unicode=True, width=10_000
    )


def read_dumped(text: str) -> Any:
    """Return the plain values that `dump_config` wrote.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    return yaml.load(text, Loader=_LOADER)


def _plain(value: Any) -> Any:
    """Turn dataclasses, tuples and paths into plain YAML values."""
    if is_section(type(value)):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {name: _plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return value
