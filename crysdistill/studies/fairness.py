"""Looks at the splits of a study before anything runs: enough labels, fair cells."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crysdistill.errors import InputError
from crysdistill.splits import make_split
from crysdistill.store.store import Store
from crysdistill.studies.cells import Cell
from crysdistill.studies.kinds import plain
from crysdistill.studies.sections.overlap import WORST_FIRST
from crysdistill.training.across import open_other
from crysdistill.training.judging import one_column, outputs_for
from crysdistill.transfer.scores import metric_of
from crysdistill.transfer.seen import NOTHING_SEEN, seen
from crysdistill.transfer.weights import read_header


@dataclass(frozen=True)
class Draw:
    """The split of some cells, and what follows from it.

    Args:
        hash: of the materials of each subset.
        made_by: in words.
        labels: the number of training crystals.
        tested: the number of test crystals.
        metric: of the targets.
        unit: of the targets.
    """

    hash: str
    made_by: str
    labels: int
    tested: int
    metric: str
    unit: str


def draw_splits(cells: Iterable[Cell]) -> dict[str, Draw]:
    """Return the split of every cell, by the cell's name; each is made once.

    Raises:
        InputError: there are fewer labels than asked for, no test crystals, or a class
            is missing in a subset; the text names task and seed.
    """
    found: dict[str, Draw] = {}
    made: dict[str, Draw] = {}
    stores: dict[Path, Store] = {}
    for cell in cells:
        config = cell.config
        known = plain(config)
        key = repr([(k, v) for k, v in known.items() if k.split(".")[0] in _READ])
        if key not in made:
            if config.dataset not in stores:
                stores[config.dataset] = Store.open(config.dataset)
            try:
                made[key] = _draw(cell, stores[config.dataset])
            except InputError as error:
                raise InputError(f"{_place(cell)}: {error}") from None
        found[cell.name] = made[key]
    return found


_READ = ("dataset", "target", "targets", "split", "test")


def _place(cell: Cell) -> str:
    fold = cell.config.split.fold
    return f"{cell.task}, " + (
        f"seed {cell.config.seed}" if fold is None else f"fold {fold}"
    )


def _draw(cell: Cell, store: Store) -> Draw:
    config = cell.config
    targets, names = config.all_targets, store.material_ids
    columns = [store.property(target.name) for target in targets]
    for target, column in zip(targets, columns, strict=True):
        target.check(column, names)
    labels = np.stack(columns, axis=1)
    split = make_split(store, config.split, one_column(labels))
    if not len(split.test) and config.test.dataset is None:
        raise InputError(
            "there are no test crystals, but a study compares on them; enlarge "
            "`base.split.test`"
        )
    wanted = config.split.train_subset
    if wanted is not None and len(split.train) < wanted:
        raise InputError(
            f"{wanted:,} labels are asked for, but the split leaves "
            f"{len(split.train):,} crystals for training; lower `axes.labels`, or "
            "enlarge `base.split.train`"
        )
    outputs = outputs_for(targets, labels, split, names)
    open_other(config.test, targets, store)
    several = len(targets) > 1
    return Draw(
        split.hash(names),
        split.made_by,
        len(split.train),
        len(split.test),
        "score" if several else metric_of(outputs.normalizers[0].classes),
        "" if several else targets[0].unit,
    )


def overlaps(cells: Iterable[Cell]) -> dict[tuple[str, str], str]:
    """Return, by task and weights, a sentence on whether they saw the dataset."""
    found: dict[tuple[str, str], str] = {}
    for cell in cells:
        weights = pretrained_by(cell)
        if weights is not None and (cell.task, weights) not in found:
            judges = cell.config.test.dataset or cell.config.dataset
            said = seen(read_header(weights), Store.open(judges))[1]
            found[cell.task, weights] = said
    return found


def pretrained_by(cell: Cell) -> str | None:
    """Return the weights file that a cell's predictor learns from, if any."""
    if cell.arm.pretrained != "weights":
        return None
    return next(iter(_given(cell)), None)


def _given(cell: Cell) -> list[str]:
    """Return the weights or the teacher in a cell's configuration."""
    config = cell.config
    given = getattr(config, "weights", None) or getattr(config, "teacher", None)
    return [str(one) for one in (given if isinstance(given, list) else [given]) if one]


def overlap_of_runs(folder: Path, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Return what finished runs say of the overlap with their test crystals.

    Args:
        folder: of the study.
        cells: of the study.

    Returns:
        A row for each task, weights or teacher, and word: `task`, `weights`, `arms`,
        `status` (the word), `runs` (their number) and `said` (the sentence of the first
        of them); the worst word first. Runs without pretraining are left out.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cell in cells:
        path = folder / "runs" / cell.name / "results.json"
        results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        said = results.get("overlap", NOTHING_SEEN)
        if said == NOTHING_SEEN:
            continue
        weights, word = ", ".join(_given(cell)), said.partition(" ")[0]
        word = word if word in WORST_FIRST else "unknown"
        new = {"task": cell.task, "weights": weights, "arms": [], "status": word,
               "runs": 0, "said": said}  # fmt: skip
        row = found.setdefault((cell.task, weights, word), new)
        row["runs"] += 1
        if cell.arm.name not in row["arms"]:
            row["arms"].append(cell.arm.name)
    return sorted(found.values(), key=lambda row: WORST_FIRST.index(row["status"]))


def unfair_runs(rows: Iterable[dict[str, Any]], before: Sequence[str]) -> list[str]:
    """Return a line for each row of `overlap_of_runs` that is not clean.

    Args:
        rows: these rows.
        before: lines of `unfair`; what they say is not said again.
    """
    return [
        f"perhaps not fair, {row['task']}: {_named(row['arms'])}; after "
        f"{row['runs']:,} runs, overlap {row['said']}"
        for row in rows
        if row["status"] != "clean" and not any(row["said"] in line for line in before)
    ]


def _named(arms: Iterable[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms)


def unfair(
    cells: Sequence[Cell], draws: dict[str, Draw], overlap: dict[tuple[str, str], str]
) -> list[str]:
    """Return a line for each comparison that is not fair: what, and which arms."""
    lines = []
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell in cells:
        same = {
            name: value
            for name, value in cell.coordinates.items()
            if name in ("task", "labels", "seed", "fold") or name.startswith("split.")
        }
        splits = groups.setdefault((cell.task, repr(same)), {})
        names = splits.setdefault(draws[cell.name].hash, [])
        if cell.arm.name not in names:
            names.append(cell.arm.name)
    for (task, _), splits in groups.items():
        if len(splits) > 1:
            first, *rest = splits.values()
            named = ", ".join(f"`{name}`" for names in rest for name in names)
            lines.append(
                f"not fair, {task}: {named} have another split than `{first[0]}`"
            )
    lines = list(dict.fromkeys(lines))  # not again for every seed
    for (task, weights), sentence in overlap.items():
        if not sentence.startswith("clean"):
            names = [
                f"`{cell.arm.name}`"
                for cell in cells
                if cell.task == task and pretrained_by(cell) == weights
            ]
            arms = ", ".join(dict.fromkeys(names))
            lines.append(f"perhaps not fair, {task}: {arms}; overlap {sentence}")
    return lines
