"""The kinds of runs of which a study consists, and the keys that each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from crysdistill.configs import read_settings, read_value
from crysdistill.errors import InputError, did_you_mean
from crysdistill.schema import Choices, Parameter, list_keys, parameters, unwrap
from crysdistill.studies.readouts import ReadoutConfig, readout
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.fit import FitConfig, fit
from crysdistill.training.train import TrainConfig, train

Settings = dict[str, Any]
"""Settings by their dotted keys, such as `trainer.epochs`."""


class Kind(NamedTuple):
    """A kind of run.

    Args:
        schema: the dataclass of its configuration.
        run: carries it out.
        own: keys that only an arm sets, because they mean something else here than in
            the other kinds.
    """

    schema: type
    run: Callable[[Any], Path]
    own: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "train": Kind(TrainConfig, train),
    # The weights define the architecture.
    "finetune": Kind(FinetuneConfig, finetune, ("encoder",)),
    "distill": Kind(DistillConfig, distill, ("teacher_encoder",)),
    "fit": Kind(FitConfig, fit, ("weights",)),
    "readout": Kind(ReadoutConfig, readout, ("weights", "readout", "features")),
}
"""Kinds of runs, by the verb that carries them out; `readout` has none."""

STUDIES_SET = ("out", "seed", "resume", "overwrite", "split.seed", "split.train_subset")
"""Keys of a run that a study sets itself."""

_MADE_FOR = {
    "split.train_subset": "axes.labels",
    "split.seed": "axes.seed",
    "seed": "axes.seed",
    "out": "out",
}


def takes(kind: str, key: str) -> bool:
    """Return whether a kind of run has a key, such as `freeze.convolutions`."""
    return _takes(parameters(KINDS[kind].schema), key.split("."))


def _takes(known: Mapping[str, Parameter], keys: list[str]) -> bool:
    key, *rest = keys
    if key not in known:
        return False
    if not rest:
        return True
    kind, mark, _ = unwrap(known[key].annotation)
    if isinstance(mark, Choices):
        return False
    if mark is not None:  # a setting of any of the options, the name, or a shared one
        inner = {"name": Parameter(str)}
        for option in (mark.shared, *mark.options.values()):
            inner |= parameters(option, mark.supplied) if option else {}
        return _takes(inner, rest)
    if dataclasses.is_dataclass(kind):
        return _takes(parameters(kind), rest)  # type: ignore[arg-type]
    return (get_origin(kind) or kind) is dict


def applies(kind: str, key: str) -> bool:
    """Return whether a study can set a key of a kind of run from outside its arm."""
    own = KINDS[kind].own
    return takes(kind, key) and not any(_is_below(key, name) for name in own)


def _is_below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def check_key(key: str, place: str) -> None:
    """Refuse a key that no kind of run has, or that a study sets itself.

    Args:
        key: the dotted key.
        place: where it stands, such as `axes`, for the message.

    Raises:
        InputError: there is no such key; the text suggests the intended one.
    """
    if key in STUDIES_SET:
        made = _MADE_FOR.get(key)
        hint = f"; give `{made}`" if made else "; leave it out"
        raise InputError(f"`{place}.{key}` is set by the study{hint}")
    if any(takes(kind, key) for kind in KINDS):
        return
    every = list(dict.fromkeys(_all_keys()))
    hint = did_you_mean(key, every)
    if not hint:
        ending = f".{key.rpartition('.')[2]}"
        near = [name for name in every if f".{name}".endswith(ending)]
        hint = f"; did you mean `{near[0]}`?" if near else ""
    hint = hint.replace("mean `", f"mean `{place}.")
    raise InputError(f"unknown key `{place}.{key}`{hint}")


def _all_keys() -> Iterator[str]:
    for kind in KINDS.values():
        for key in list_keys(kind.schema):
            names = key.name.split(".")
            yield from (".".join(names[:n]) for n in range(1, len(names) + 1))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Settings:
    """Return nested settings by their dotted keys; texts with `{..}` are read."""
    found: Settings = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        value = read_value(value, key)
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def nested(settings: Settings) -> dict[str, Any]:
    """Return settings by dotted keys as a tree; the inverse of `flat`."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            inner = place.get(section)
            place[section] = place = dict(inner) if isinstance(inner, Mapping) else {}
        place[last] = value
    return tree


def changed(settings: Settings, more: Mapping[str, Any]) -> Settings:
    """Return settings after others have replaced them, with all that lies below.

    The bare name of an encoder stands for that encoder with its defaults.
    """
    found = dict(settings)
    for key, value in more.items():
        value = read_value(value, key)
        if key in _NAMED and isinstance(value, str):
            value = {"name": value}
        found = {name: v for name, v in found.items() if not _is_below(name, key)}
        whole = isinstance(value, Mapping) and value
        found |= flat(value, f"{key}.") if whole else {key: value}
    return found


_NAMED = ("encoder", "teacher_encoder")


def configure(kind: str, shared: Settings, own: Mapping[str, Any]) -> Any:
    """Return the configuration of a run.

    Args:
        kind: of `KINDS`.
        shared: settings for runs of all kinds; those that this kind has not are left
            out.
        own: the settings of its arm, which come last and are all taken.

    Raises:
        InputError: a key is missing, or a value cannot be used.
    """
    kept = {key: value for key, value in shared.items() if applies(kind, key)}
    try:
        return read_settings(nested(changed(kept, own)), KINDS[kind].schema)
    except InputError as error:
        raise InputError(_as_given(str(error), shared)) from None


def _as_given(text: str, shared: Settings) -> str:
    """Rewrite the message about a missing key to the place where a study has it."""
    for key in ("dataset", "target.name", "weights"):
        if text.startswith(f"`{key}` is missing"):
            name = key if key == "weights" else f"base.{key}"
            also = " or in each task" if key != "weights" else ""
            return (
                f"`{name}` is missing; give it in the config or as `{name}=...`{also}"
            )
    return text


def plain(config: Any) -> Settings:
    """Return a configuration's values by their dotted keys, paths as texts."""
    return _plain(dataclasses.asdict(config), "")


def _plain(tree: Mapping[str, Any], prefix: str) -> Settings:
    found: Settings = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _plain(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _text(value)
    return found


def _text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_text(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(name): _text(inner) for name, inner in value.items()}
    return value


def value_at(config: Any, key: str) -> Any:
    """Return the typed value of a key; a section as a mapping, None if absent."""
    known = plain(config)
    if key in known:
        return known[key]
    below = {
        name.removeprefix(f"{key}."): value
        for name, value in known.items()
        if name.startswith(f"{key}.")
    }
    return below or None


def without(settings: Settings, names: Iterable[str]) -> Settings:
    """Return settings without some keys."""
    left_out = set(names)
    return {key: value for key, value in settings.items() if key not in left_out}
