"""The cells of a study: each is an ordinary run, with its coordinates."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from crysdistill.encoders import find_encoder
from crysdistill.errors import InputError
from crysdistill.studies.arms import Arm, controls_of, make_arm
from crysdistill.studies.axes import read_exclusions, text_of
from crysdistill.studies.kinds import (
    Settings,
    applies,
    changed,
    configure,
    plain,
    takes,
    value_at,
)
from crysdistill.studies.search import Search, TuneSettings
from crysdistill.training.runs import MAY_CHANGE
from crysdistill.transfer.weights import read_header

_NETWORKS = ("train", "finetune", "distill")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        arm: its arm.
        task: the name of its task.
        coordinates: by the name of the axis; axes that do not apply are not there.
        config: its configuration; `out` is not yet set.
        repeats: networks whose mean predicts.
        search: of its settings; None for none.
    """

    arm: Arm
    task: str
    coordinates: dict[str, Any]
    config: Any
    repeats: int = 1
    search: Search | None = None

    @cached_property
    def identity(self) -> Settings:
        """All that its result depends on, by dotted keys."""
        known = plain(replace(self.config, out=Path()))
        kept = {key: value for key, value in known.items() if key not in MAY_CHANGE}
        tune = self.search.described() if self.search else {}
        return {**kept, **tune, "repeats": self.repeats, "kind": self.arm.kind}

    @cached_property
    def name(self) -> str:
        """The name of its run folder: readable, and unlike that of any other run."""
        config = self.config
        text = json.dumps(self.identity, sort_keys=True, default=str)
        labels = config.split.train_subset
        parts = (
            self.arm.name,
            "+".join(target.name for target in config.all_targets),
            "all" if labels is None else labels,
            config.seed,
            hashlib.sha256(text.encode()).hexdigest()[:10],
        )
        return re.sub(r"[^\w.+-]+", "_", "-".join(map(str, parts)))[-150:]


def make_cells(
    base: Settings,
    axes: Mapping[str, Any],
    exclude: Sequence[Any] = (),
    controls: bool | Sequence[str] = True,
    tune: TuneSettings | None = None,
) -> list[Cell]:
    """Return the cells: the product of the axes, less what is excluded.

    An axis applies to an arm if its runs have that key and the arm does not set it
    itself. Cells that differ only in axes that do not apply are one cell.

    Args:
        base: the settings that all cells share, by dotted keys.
        axes: from `read_axes`.
        exclude: partial coordinates of cells to leave out.
        controls: see `controls_of`.
        tune: a search of settings in every cell; None for none.

    Raises:
        InputError: a key or value cannot be used, or nothing is left.
    """
    arms = [make_arm(name, keys) for name, keys in axes["arm"].items()]
    repeats = any(r > 1 for r in axes.get("repeats", ()))
    added = controls_of(arms, controls)
    if _names_teachers(base, axes):
        arms = [arm.taught_by_others() for arm in arms]
        added = [arm.taught_by_others() for arm in added]
        if controls is True and not (base.get("weights") or axes.get("weights")):
            added = [arm for arm in added if not arm.pretrained]
    if repeats and controls is True:
        added = [arm for arm in added if arm.repeats == 1]
    makers = [_Maker(arm, base, axes, tune) for arm in (*arms, *added)]
    _check_used(axes, makers)
    excluded = read_exclusions(exclude, axes)
    cells: dict[tuple[str, ...], Cell] = {}
    hits = [0] * len(excluded)
    others = {name: values for name, values in axes.items() if name != "arm"}
    for values in itertools.product(*map(list, others.values())):
        at = dict(zip(others, values, strict=True))
        for maker in makers:
            where = {n: v for n, v in at.items() if maker.applies(n)}
            key = (maker.arm.name, *(f"{n}={text_of(v)}" for n, v in where.items()))
            if key in cells:
                continue
            there = {"arm": maker.arm.name, **where}
            gone = [n for n, one in enumerate(excluded) if _matches(there, one)]
            for number in gone:
                hits[number] += 1
            if not gone:
                cells[key] = maker.cell(where)
    for number, count in enumerate(hits):
        if not count:
            raise InputError(
                f"`exclude[{number}]` matches no cell; correct it, or leave it out"
            )
    if not cells:
        raise InputError("`exclude` leaves no cell; leave out some of its entries")
    return list(_without_copies(cells.values(), {arm.name for arm in added}))


def _names_teachers(base: Settings, axes: Mapping[str, Any]) -> bool:
    """Return whether a study says who teaches, in place of its weights."""
    tasks = axes.get("task") or {}
    places = [base, axes, *(tasks.values() if isinstance(tasks, Mapping) else ())]
    return any("teacher" in place for place in places if place)


class _Maker:
    """Makes the cells of one arm; settings are read once for all seeds and labels."""

    def __init__(
        self,
        arm: Arm,
        base: Settings,
        axes: Mapping[str, Any],
        tune: TuneSettings | None,
    ) -> None:
        self.arm, self.base, self.axes = arm, base, axes
        self.read: dict[str, Any] = {}
        self.heads = {
            str(path): json.dumps(read_header(path).encoder, sort_keys=True)
            for path in axes.get("weights", ())
            if arm.pretrained == "architecture"
        }
        self.fixed = self._fixed()
        self.search = self._search(tune)

    def _search(self, tune: TuneSettings | None) -> Search | None:
        """Return the search of the keys that the arm's runs have."""
        if tune is None:
            return None
        for key in tune.ranges():
            if key in self.axes:
                raise InputError(
                    f"`{key}` is an axis and in `tune.keys`; leave one out"
                )
        ranges = {k: one for k, one in tune.ranges().items() if self._sets(k)}
        if not ranges:
            return None
        return Search(ranges, tune.trials, tune.folds, tune.halving)

    def _fixed(self) -> set[str]:
        """Return the keys that the arm sets itself, in any cell."""
        shared = dict(self.base)
        if "weights" in self.axes:
            shared["weights"] = self.axes["weights"][0]
        return set(self.arm.own(shared))

    def applies(self, axis: str) -> bool:
        """Return whether an axis applies to the arm."""
        arm = self.arm
        if axis in ("task", "labels", "seed", "fold"):
            return True
        if axis == "repeats":
            own = arm.repeats == 1 and arm.kind in _NETWORKS
            return own or (arm.kind == "fit" and axis not in self.fixed)
        if axis == "weights":
            many = len(set(self.heads.values())) > 1
            return arm.pretrained == "weights" or many
        return self._sets(axis)

    def _sets(self, axis: str) -> bool:
        """Return whether a key of the arm's runs can be set from outside."""
        overlapping = any(
            axis == key or axis.startswith(f"{key}.") or key.startswith(f"{axis}.")
            for key in self.fixed
        )
        return applies(self.arm.kind, axis) and not overlapping

    def cell(self, where: Mapping[str, Any]) -> Cell:
        """Return the cell at some values of the axes that apply."""
        task = where.get("task")
        named = {n: v for n, v in where.items() if n not in _DRAWN}
        key = repr(sorted(named.items(), key=lambda pair: pair[0]))
        if key not in self.read:
            shared = changed(self.base, self.axes["task"][task] if task else {})
            more = {n: v for n, v in named.items() if n not in ("task", "repeats")}
            shared = changed(shared, more)
            if "weights" not in where and "weights" in self.axes:
                shared["weights"] = self.axes["weights"][0]
            own = dict(self.arm.own(shared))
            if self.arm.kind == "fit" and "repeats" in where:
                own["repeats"] = where["repeats"]
            self.read[key] = configure(self.arm.kind, shared, own)
        config = self.read[key]
        if "fold" in where:
            config = replace(config, split=replace(config.split, fold=where["fold"]))
        seed = where.get("seed", 0)
        labels = where.get("labels", config.split.train_subset)
        config = replace(config, seed=seed, split=config.split.for_seed(seed, labels))
        at = {
            name: value_at(config, name) if takes(self.arm.kind, name) else value
            for name, value in where.items()
            if name not in ("task", *_DRAWN)
        }
        at = {name: where[name] if at[name] is None else at[name] for name in at}
        known = {name: where[name] for name in ("task", *_DRAWN) if name in where}
        name = task or "+".join(target.name for target in config.all_targets)
        networks = self.arm.kind in _NETWORKS
        repeats = where.get("repeats", self.arm.repeats) if networks else 1
        coordinates = {"arm": self.arm.name, **known, **at}
        return Cell(self.arm, name, coordinates, config, repeats, self.search)


_DRAWN = ("labels", "seed", "fold")


def _check_used(axes: Mapping[str, Any], makers: Sequence[_Maker]) -> None:
    """Refuse an axis that applies to no arm."""
    for axis in axes:
        if axis != "arm" and not any(maker.applies(axis) for maker in makers):
            names = ", ".join(axes["arm"])
            raise InputError(
                f"`axes.{axis}` applies to none of the arms ({names}); leave it out, "
                "or add an arm that has it"
            )


def _matches(there: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a place lies within partial coordinates."""
    known = {name: text_of(value) for name, value in there.items()}
    if there.get("labels", 0) is None:
        known["labels"] = "all"
    return all(known.get(name) in values for name, values in wanted.items())


def _without_copies(cells: Any, added: set[str]) -> Iterator[Cell]:
    """Leave out controls that turn out to be the same run as another arm's."""
    cells = list(cells)
    kept = {_digest(cell) for cell in cells if cell.arm.name not in added}
    for cell in cells:
        if cell.arm.name in added:
            if (found := _digest(cell)) in kept:
                continue
            kept.add(found)
        yield cell


def _digest(cell: Cell) -> str:
    """Return all that a result depends on; defaults of encoders count as given."""
    known = dict(cell.identity)
    if name := known.get("encoder.name"):
        own = inspect.signature(find_encoder(name)).parameters
        defaults = {f"encoder.{key}": one.default for key, one in own.items()}
        known = {**defaults, **known}
    return json.dumps(known, sort_keys=True, default=str)
