"""Refuses to add runs to a study whose runs shared other settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crysdistill.errors import InputError
from crysdistill.files import write_whole
from crysdistill.schema import write_value
from crysdistill.studies.cells import Cell
from crysdistill.studies.kinds import plain
from crysdistill.training.inputs import find_inputs

FILE = "settings.json"
"""What the runs of a study have in common; in the study's folder."""

_DRAWN = {
    "labels": ("split.train_subset",),
    "seed": ("seed", "split.seed", "split.fold"),
    "fold": ("split.fold",),
}

Ranges = dict[str, list[str]]
"""The values of each key over some runs, as YAML writes them."""


def check_unchanged(
    folder: Path, cells: Sequence[Cell], axes: Mapping[str, Any]
) -> None:
    """Compare a study with the one that its folder holds, and record it.

    A study may be widened and narrowed along its axes. Whole configurations are
    compared, so that a key that was removed is found as well: its default counts.

    Args:
        folder: of the study.
        cells: its runs.
        axes: its axes.

    Raises:
        InputError: a key has changed, a file has, or the folder's study was made by
            version 0.1; the text names the keys.
    """
    path = folder / FILE
    now = _described(cells, axes)
    if (folder / "shared.yaml").exists() and not path.exists():
        raise InputError(
            f"{folder} holds a study of version 0.1, whose runs cannot be continued; "
            "give another `out`"
        )
    if path.exists():
        changes = list(_changes(json.loads(path.read_text("utf-8")), now))
        if changes:
            raise InputError(
                f"{folder} holds a study whose runs shared other settings; now "
                f"different: {'; '.join(changes)}; give the old values, or another "
                "`out`"
            )
    write_whole(path, (json.dumps(now, indent=1) + "\n").encode())


def _described(cells: Sequence[Cell], axes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of every key, for all runs of each arm of each task."""
    groups: dict[str, dict[str, set[str]]] = {}
    files: dict[str, str] = {}
    for cell in cells:
        group = groups.setdefault(f"{cell.arm.name} of {cell.task}", {})
        for key, value in cell.identity.items():
            group.setdefault(key, set()).add(write_value(value))
    seen: set[str] = set()
    for cell in cells:
        known = {k: v for k, v in plain(cell.config).items() if k in _FILES and v}
        text = repr(known)
        if text not in seen:  # one look at each file, however many runs read it
            seen.add(text)
            for key, hashes in find_inputs(known).items():
                files[f"{key} {write_value(known[key])}"] = " ".join(hashes)
    keys = [key for axis in axes for key in _DRAWN.get(axis, (axis,))]
    ranges = {
        name: {key: sorted(values) for key, values in group.items()}
        for name, group in groups.items()
    }
    return {"axes": keys, "runs": ranges, "files": files}


_FILES = ("dataset", "weights", "teacher", "split.file")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield a text for each key with another value, or file with other content."""
    for name, content in new["files"].items():
        if old["files"].get(name, content) != content:
            yield f"{name} has other content"
    axes = {*old["axes"], *new["axes"]}
    both = [name for name in new["runs"] if name in old["runs"]]
    found: dict[str, str] = {}
    for name in both:
        found |= _differences(old["runs"][name], new["runs"][name], old, axes)
    if not both:
        before, after = _all(old["runs"].values()), _all(new["runs"].values())
        single = {k for k in before if len(before[k]) == len(after.get(k, ())) == 1}
        found |= _differences(
            {k: before[k] for k in single - {"kind"}},
            {k: after[k] for k in single - {"kind"}},
            old,
            axes,
        )
    yield from found.values()


def _differences(
    before: Ranges, after: Ranges, old: Mapping[str, Any], axes: Iterable[str]
) -> dict[str, str]:
    """Return `key: old -> new` for every key whose values are not compatible.

    A key that became an axis must keep its old value among the new ones, and an axis
    that became a fixed key one of its old values.
    """
    found = {}
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key, ["absent"]), after.get(key, ["absent"])
        if was == now or (key in old["axes"] and _is_axis(key, axes)):
            continue
        if len(now) > 1 and set(was) <= set(now):
            continue
        if len(was) > 1 and set(now) <= set(was):
            continue
        found[key] = f"{key}: {' or '.join(was)} -> {' or '.join(now)}"
    return found


def _is_axis(key: str, axes: Iterable[str]) -> bool:
    return any(key == axis or key.startswith(f"{axis}.") for axis in axes)


def _all(groups: Iterable[Ranges]) -> Ranges:
    found: dict[str, set[str]] = {}
    for group in groups:
        for key, values in group.items():
            found.setdefault(key, set()).update(values)
    return {key: sorted(values) for key, values in found.items()}
