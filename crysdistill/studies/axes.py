"""The axes of a study: what the user wrote about them, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crysdistill.configs import read_value
from crysdistill.errors import InputError, did_you_mean
from crysdistill.schema import write_value
from crysdistill.studies.kinds import Settings, check_key, flat

SPECIAL = ("arm", "task", "labels", "seed", "fold", "weights", "repeats")
"""Axes that are not simply a key of a run."""

DEFAULT_ARMS = ("scratch", "distilled", "finetuned")
DEFAULT_SEEDS = (0, 1, 2)

Named = dict[str, Settings | None]
"""Values that have a name: their keys, or None if the name says all."""


def read_axes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes by their dotted names, in the order of the results.

    `arm` and `task` become `Named`, all others lists.

    Args:
        given: axes as the user wrote them; nested names stand for dotted ones.

    Raises:
        InputError: an axis is no list, is empty, names a value twice, or is not known.
    """
    found: dict[str, Any] = {}
    for name, values in _dotted(given).items():
        if name not in SPECIAL:
            check_key(name, "axes")
        found[name] = (
            _named(name, values) if name in ("arm", "task") else _listed(name, values)
        )
    found.setdefault("arm", dict.fromkeys(DEFAULT_ARMS))
    if "seed" not in found and "fold" not in found:
        found["seed"] = list(DEFAULT_SEEDS)
    for name in ("labels", "seed", "fold", "repeats"):
        if name in found:
            found[name] = [_whole(name, value) for value in found[name]]
            _check_twice(name, found[name])
    order = ("task", "labels", "fold", "seed")
    rest = [name for name in found if name not in (*order, "arm")]
    return {n: found[n] for n in (*order, *rest, "arm") if n in found}


def _dotted(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        key, value = f"{prefix}{name}", read_value(value, f"axes.{prefix}{name}")
        if isinstance(value, Mapping) and key not in ("arm", "task"):
            found |= _dotted(value, f"{key}.")
        else:
            found[key] = value
    return found


def _listed(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise InputError(
            f"`axes.{name}` is {_said(values)} but must be a list, such as "
            f"[{_said(values)}]"
        )
    if not values:
        raise InputError(f"`axes.{name}` is empty; give a value or leave it out")
    found = [read_value(value, f"axes.{name}") for value in values]
    _check_twice(name, found)
    return found


def _check_twice(name: str, values: Sequence[Any]) -> None:
    texts = [_said(value) for value in values]
    twice = [text for text in texts if texts.count(text) > 1]
    if twice:
        raise InputError(f"`axes.{name}` names {twice[0]} twice; remove one")


def _said(value: Any) -> str:
    return value if isinstance(value, str) else write_value(value)


def _named(axis: str, given: Any) -> Named:
    """Return the values of `arm` or `task` by their names.

    They are a mapping from names to keys, or a list of names and of such mappings.
    """
    pairs: list[tuple[str, Any]] = []
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        for value in _listed(axis, given):
            pairs += value.items() if isinstance(value, Mapping) else [(value, None)]
    if not pairs:
        raise InputError(f"`axes.{axis}` is empty; give a value or leave it out")
    _check_twice(axis, [name for name, _ in pairs])
    found: Named = {}
    for name, value in pairs:
        value = read_value(value, f"axes.{axis}.{name}")
        if value is not None and not isinstance(value, Mapping):
            raise InputError(
                f"`axes.{axis}.{name}` is {_said(value)} but must hold keys of its runs"
            )
        if value is None and axis == "task":
            raise InputError(
                f"the task `{name}` must hold keys, as in "
                f"`{name}: {{dataset: d.h5, target: {{name: gap}}}}`"
            )
        found[str(name)] = flat(value) if value else None
        for key in found[str(name)] or {} if axis == "task" else ():
            check_key(key, f"axes.task.{name}")
    return found


def _whole(name: str, value: Any) -> int | None:
    if name == "labels" and str(value) in ("all", "None"):
        return None
    text = str(value)
    least = 0 if name in ("seed", "fold") else 1
    if not text.isdecimal() or int(text) < least:
        more = ", or `all`" if name == "labels" else ""
        raise InputError(
            f"`axes.{name}` holds {_said(value)} but must hold whole numbers from "
            f"{least} on{more}"
        )
    return int(text)


def read_exclusions(
    given: Sequence[Any], axes: Mapping[str, Any]
) -> list[dict[str, list[str]]]:
    """Return the coordinates of the cells to leave out, as texts.

    Raises:
        InputError: an entry is no mapping, or names no axis.
    """
    found = []
    given = read_value(given, "exclude")
    for number, entry in enumerate([given] if isinstance(given, Mapping) else given):
        place = f"exclude[{number}]"
        entry = read_value(entry, place)
        if not isinstance(entry, Mapping) or not entry:
            raise InputError(
                f"`{place}` is {_said(entry)} but must hold coordinates, such as "
                "{arm: scratch, labels: 100}"
            )
        coordinates = {}
        for name, value in _dotted(entry).items():
            if name not in axes:
                raise InputError(
                    f"`{place}` names `{name}`, which is not an axis of this study"
                    f"{did_you_mean(name, axes)}"
                )
            many = value if isinstance(value, list | tuple) else [value]
            coordinates[name] = [text_of(one) for one in many]
        found.append(coordinates)
    return found


def text_of(value: Any) -> str:
    """Return a coordinate as text by which two spellings of a number are the same."""
    try:
        return f"{float(value):.12g}"
    except (TypeError, ValueError):
        return _said(value)
