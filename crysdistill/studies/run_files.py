"""What the files of a study's runs hold, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from crysdistill.schema import read_dumped

_SPLITS = 40  # files from which the overlap of the splits is found


def epochs(log: Path) -> pd.DataFrame:
    """Return a run's `metrics.csv` with one row for each epoch."""
    return pd.read_csv(log).groupby("epoch").first().reset_index()


def config_of(run: Path) -> dict[str, Any]:
    """Return the configuration of a run; empty if there is none that can be read.

    Args:
        run: its folder.
    """
    try:
        found = read_dumped((run / "config.yaml").read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def with_most_labels(table: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of each task that have the most labels and a folder.

    Args:
        table: the table from `check_results`; `run` is a path.
    """
    known = table[table["run"] != ""]
    most = known.groupby(["task", "target"])["labels"].transform("max")
    return known[known["labels"] == most]


def one_of_each(table: pd.DataFrame) -> pd.DataFrame:
    """Return the first run of each arm; the others differ in seeds and folds only.

    Args:
        table: runs of one task and number of labels.
    """
    return table.drop_duplicates(["arm", "condition"])


def training_logs(table: pd.DataFrame) -> pd.DataFrame | None:
    """Return the logs of the runs with the most labels; None if there are none.

    Args:
        table: the table from `check_results`; `run` is a path.
    """
    tables = []
    for row in with_most_labels(table).itertuples():
        log = Path(str(row.run)) / "metrics.csv"
        if log.exists():
            about: Any = {"run": row.run, "arm": row.arm, "task": row.task}
            tables.append(pd.read_csv(log).assign(**about))
    if not tables:
        return None
    whole = pd.concat(tables, ignore_index=True)
    return whole.groupby(["run", "epoch"], sort=False).first().reset_index()


def judged_predictions(table: pd.DataFrame) -> pd.DataFrame | None:
    """Return the test predictions of the runs with the most labels.

    Args:
        table: the table from `check_results`; `run` is a path.

    Returns:
        The columns of `predictions.csv` and the coordinates of the run. Of runs that
        predict an `sd` also `sd_factor`, NaN if they do not know it. None without any
        predictions.
    """
    tables = []
    for row in with_most_labels(table).itertuples():
        path = Path(str(row.run)) / "predictions.csv"
        if not path.exists():
            continue
        found = pd.read_csv(path, dtype={"material_id": str})
        if {"truth", "prediction"} <= set(found.columns):  # of a single target
            names = ("arm", "task", "target", "labels", "condition", "seed", "fold")
            about = {n: getattr(row, n) for n in names}
            if "sd" in found.columns:
                about["sd_factor"] = _sd_factor(path.parent, str(row.target))
            tables.append(found.assign(**about))
    return pd.concat(tables, ignore_index=True) if tables else None


def _sd_factor(run: Path, target: str) -> float:
    """Return by what validation says that the `sd` of a run must be multiplied."""
    path = run / "results.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return float(found.get("sd_factor", {}).get(target, np.nan))


def test_over_train(table: pd.DataFrame) -> pd.Series:
    """Return the ratio of the corrected test of each task's splits; NaN if not known.

    The splits of all seeds are read from the runs of one arm. If they have the same
    test crystals, the ratio is 0: the correction is for test sets that differ.

    Args:
        table: the table from `check_results`; `run` is a path.
    """
    ratios = pd.Series(np.nan, index=table.index)
    for _, part in with_most_labels(table).groupby(["task", "target"]):
        row = part.iloc[0]
        ratio = _ratio(part)
        mask = (table["task"] == row["task"]) & (table["target"] == row["target"])
        ratios[mask] = ratio
    return ratios


def _ratio(part: pd.DataFrame) -> float:
    """Return test crystals over the other crystals of the dataset."""
    tests: list[frozenset[str]] = []
    everything: set[str] = set()
    for row in part.drop_duplicates(["seed", "fold"]).head(_SPLITS).itertuples():
        path = Path(str(row.run)) / "split.csv"
        if not path.exists():
            continue
        split = pd.read_csv(path, dtype=str)
        tests.append(frozenset(split.loc[split["subset"] == "test", "material_id"]))
        everything.update(split["material_id"])
    if len(tests) < 2 or not all(tests):
        return float("nan")
    if len(set(tests)) == 1:
        return 0.0
    tested = float(np.mean([len(test) for test in tests]))
    return tested / max(1.0, len(everything) - tested)


def encoder_blocks(table: pd.DataFrame) -> pd.DataFrame | None:
    """Return what became of each block of the encoders; None if no run says it.

    Args:
        table: the table from `check_results`; `run` is a path.

    Returns:
        Columns `run, block, drift, cka`.
    """
    rows = []
    for run, results in _results(table):
        drift, cka = (results.get(name) or {} for name in ("drift", "cka"))
        if not (isinstance(drift, dict) and isinstance(cka, dict)):
            continue
        rows += [
            {"run": run, "block": str(block)}
            | {"drift": drift.get(block), "cka": cka.get(block)}
            for block in dict.fromkeys([*drift, *cka])
        ]
    if not rows:
        return None
    found = pd.DataFrame(rows)
    return found.astype({"drift": float, "cka": float})


def _results(table: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    for run in with_most_labels(table)["run"].unique():
        path = Path(run) / "results.json"
        if path.exists():
            yield run, json.loads(path.read_text("utf-8"))


def versions(table: pd.DataFrame) -> dict[str, Any]:
    """Return the versions under which the first run ran.

    Args:
        table: the table from `check_results`; `run` is a path.
    """
    for run in table.loc[table["run"] != "", "run"]:
        path = Path(run) / "environment.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
    return {}
