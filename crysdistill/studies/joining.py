"""The results and facts of one study, or of several that are joined."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from crysdistill.errors import InputError
from crysdistill.studies.statistics.results import REQUIRED, as_texts, axes

_SAME = ("dataset", "target", "unit", "metric", "crystals")
"""Facts in which a task of two studies must agree."""


class Study(NamedTuple):
    """A study as it lies on the disk.

    Args:
        results: the rows of `results.csv`; `run` is the path of the folder.
        facts: the content of `study.json`.
    """

    results: pd.DataFrame
    facts: dict[str, Any]


def read_study(folder: str | Path) -> Study:
    """Read the results and facts of a study.

    Args:
        folder: has `results.csv`, and `study.json` and `runs/` if they are known.

    Raises:
        InputError: there is no study, or a file is not readable.
    """
    folder = Path(folder)
    path = folder / "results.csv"
    if not path.exists():
        raise InputError(f"{path}: no such file; `crysdistill study` writes it")
    try:
        results = pd.read_csv(path, dtype={"run": str, "error": str, "arm": str})
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable table: {error}") from None
    missing = [name for name in REQUIRED if name not in results]
    if missing:
        names = " and ".join(f"`{name}`" for name in missing)
        raise InputError(f"{path}: lacks {names}; run the study again")
    results["run"] = _folders(results, folder)
    return Study(results, _facts(folder / "study.json"))


def _folders(results: pd.DataFrame, study: Path) -> list[str]:
    """Return the run's folder of each row; "" if there is none.

    A study of version 0.1 did not write them: its folders have the coordinates of the
    run as their name.
    """
    if "run" in results:
        known = results["run"].fillna("")
        return [str(study / run) if run else "" for run in known]
    found = []
    for arm, labels, seed in results[["arm", "labels", "seed"]].itertuples(index=False):
        tried = (study / "runs" / f"{arm}-{n}-{seed}" for n in (labels, "all"))
        found.append(next((str(f) for f in tried if f.is_dir()), ""))
    return found


def _facts(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(facts, dict):
        raise InputError(f"{path}: must hold a mapping")
    return facts


def join_studies(studies: Mapping[str, Study]) -> Study:
    """Join studies into one.

    A run that several studies hold counts once. It must have the same value in all.

    Args:
        studies: the studies by the name that messages give them.

    Raises:
        InputError: two studies disagree on a run or on what a task is.
    """
    names = list(studies)
    if len(names) == 1:
        return studies[names[0]]
    tables = [study.results.assign(**{_FROM: name}) for name, study in studies.items()]
    table = pd.concat(tables, ignore_index=True)
    key = _identity(table)
    for column in ("value", "error"):
        if column not in table:
            continue
        values = (
            table[column].map(_rounded)
            if column == "value"
            else (as_texts(table[column]))
        )
        differ = values.groupby(key).transform("nunique", dropna=False) > 1
        if differ.any():
            one = table[key == key[differ].iloc[0]]
            _refuse(one.iloc[0], one[one[_FROM] != one[_FROM].iloc[0]].iloc[0])
    kept = table[~key.duplicated()].drop(columns=_FROM).reset_index(drop=True)
    return Study(kept, _joined_facts({n: s.facts for n, s in studies.items()}))


_FROM = "\0study"


def _identity(table: pd.DataFrame) -> pd.Series:
    """Return a text for each row that says which run it is."""
    names = ["arm", "task", "target", "metric", "labels", "seed", "fold"]
    columns = [n for n in (*names, *axes(table.drop(columns=_FROM))) if n in table]
    found = [as_texts(table[name]) for name in columns]
    if "task" in table:
        place = columns.index("task")
        found[place] = found[place].where(found[place] != "", as_texts(table["target"]))
    return pd.Series(list(zip(*found, strict=True)), index=table.index).map(repr)


def _rounded(value: Any) -> str:
    """Return a value as text, to ten digits."""
    return f"{float(value):.10g}" if pd.notna(value) else ""


def _refuse(one: pd.Series, other: pd.Series) -> None:
    task = one.get("task")
    place = one["target"] if task is None or pd.isna(task) else task
    raise InputError(
        f"{one[_FROM]} and {other[_FROM]} hold different results of the arm "
        f"`{one['arm']}` for `{place}` with {_rounded(one['labels'])} labels, seed "
        f"{_rounded(one['seed'])}: {_said(one)} and {_said(other)}; leave one study out"
    )


def _said(row: pd.Series) -> str:
    return f"{row['value']:.6g}" if np.isfinite(row["value"]) else "failed"


def _joined_facts(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of all studies; those that differ stand by study."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(key for one in facts.values() for key in one):
        known = {study: one[name] for study, one in facts.items() if name in one}
        values = list(known.values())
        if name == "tasks":
            found[name] = _joined_tasks(known)
        elif name == "controls":
            found[name] = list(dict.fromkeys(v for value in values for v in value))
        elif name in ("arms", "roles"):
            found[name] = {k: v for value in values for k, v in value.items()}
        elif name == "command":
            found[name] = "; ".join(dict.fromkeys(map(str, values)))
        elif name == "overlap_of_runs" and (
            len(known) < len(facts) or any(value != values[0] for value in values)
        ):
            found[name] = [
                {"study": study, **row}
                for study, one in facts.items()
                for row in one.get(name) or _before_runs(one)
            ]
        elif name == "overlap" and any(value != values[0] for value in values):
            found[name] = _rows(known)
        elif all(value == values[0] for value in values):
            found[name] = values[0]
        else:
            found[name] = known
    return found


def _before_runs(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sentences on the overlap of a study without those of its runs."""
    tasks = facts.get("tasks") or {}
    said = {
        name: about["overlap"] for name, about in tasks.items() if "overlap" in about
    }
    return [
        {"task": task, "status": str(text).partition(" ")[0], "said": str(text)}
        for task, text in said.items()
    ]


def _rows(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sentences on the overlap of each study as rows."""
    return [
        {"study": study, "status": str(said).partition(" ")[0], "said": str(said)}
        for study, said in known.items()
    ]


def _joined_tasks(known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the tasks of all studies.

    Raises:
        InputError: two studies mean something else by a task.
    """
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    for study, tasks in known.items():
        for name, about in tasks.items():
            before = found.setdefault(name, about)
            first.setdefault(name, study)
            for key in _SAME:
                if key in before and key in about and before[key] != about[key]:
                    raise InputError(
                        f"the task `{name}` has the {key} {before[key]!r} in "
                        f"{first[name]} and {about[key]!r} in {study}; rename one"
                    )
    return found


def study_names(folders: Sequence[str | Path]) -> list[str]:
    """Return names for studies: their folders as they were given.

    Raises:
        InputError: a folder was given twice.
    """
    names = [str(folder) for folder in folders]
    places = [Path(folder).resolve() for folder in folders]
    for place, name in zip(places, names, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{name} was given twice; give each study once")
    return names
