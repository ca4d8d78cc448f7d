"""The runs of a study as tables, and the report of the study."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from crysdistill.errors import InputError
from crysdistill.studies.compare import about
from crysdistill.studies.report import write_report


def report_study(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    pretraining: pd.DataFrame | None = None,
    next_steps: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write the report of a study from the files of its runs.

    Args:
        folder: the study's folder, with `results.csv` and `runs/`.
        out: the page to write; `report.html` in the folder if None.
        title: the title of the page.
        pretraining: the log of the pretraining run.
        next_steps: commands to show at the end.
        facts: further facts about the study; see `write_report`.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder holds no study.
    """
    folder = Path(folder)
    table = folder / "results.csv"
    if not table.exists():
        raise InputError(f"{table}: no such file; `crysdistill study` writes it")
    results = pd.read_csv(table)
    arms = list(dict.fromkeys(results["arm"]))
    said = {"arms": about(arms), **_facts(folder), **(facts or {})}
    return write_report(
        Path(out) if out is not None else folder / "report.html",
        title=title or f"Study {folder.name}",
        results=results,
        facts=said,
        pretraining=pretraining,
        curves=learning_curves(folder),
        predictions=judged_predictions(folder, results),
        next_steps=list(next_steps),
    )


def _facts(folder: Path) -> dict[str, Any]:
    """Return the facts in the files of the study and its runs."""
    path = folder / "study.json"
    facts = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for _, _, run in _runs(folder):
        facts["versions"] = json.loads((run / "environment.json").read_text("utf-8"))
        break
    return facts


def _runs(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Yield arm, seed and folder of every finished run."""
    for run in sorted((folder / "runs").glob("*")):
        if (run / "results.json").exists():
            arm, _, seed = run.name.rsplit("-", 2)
            yield arm, int(seed), run


def epochs(log: Path) -> pd.DataFrame:
    """Return a run's `metrics.csv` with one row for each epoch."""
    return pd.read_csv(log).groupby("epoch").first().reset_index()


def learning_curves(folder: Path) -> pd.DataFrame | None:
    """Return the logs of all runs of a study; the column `run` names the run."""
    tables = []
    for _, _, run in _runs(folder):
        log = run / "metrics.csv"
        if log.exists():
            tables.append(epochs(log).assign(run=run.name))
    return pd.concat(tables, ignore_index=True) if tables else None


def judged_predictions(folder: Path, results: pd.DataFrame) -> pd.DataFrame | None:
    """Return the test predictions of every run.

    If there are several numbers of labels, return those for the largest number.
    """
    tables = []
    most = results["labels"].max()
    for arm, seed, run in _runs(folder):
        facts = json.loads((run / "results.json").read_text("utf-8"))
        path = run / "predictions.csv"
        if path.exists() and facts["labels"] == most:
            table = pd.read_csv(path, dtype={"material_id": str})
            tables.append(table.assign(arm=arm, seed=seed, target=facts["target"]))
    return pd.concat(tables, ignore_index=True) if tables else None
