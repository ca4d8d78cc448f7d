"""The report of a study: one self-contained HTML page with its runs and findings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from crysdistill.errors import InputError, did_you_mean
from crysdistill.studies import figures, tables
from crysdistill.studies.findings import (
    MEASURED,
    OVERLAP_WORDS,
    findings,
    limits,
    statistics_used,
    tally,
)
from crysdistill.studies.statistics import check_results
from crysdistill.studies.tables import ResultGroup, console_table, result_groups

__all__ = ["console_table", "write_report"]

_SHOWN_ELSEWHERE = {"arms", "overlap", "settings", "versions", "measured"}


def write_report(
    path: str | Path,
    *,
    title: str,
    results: pd.DataFrame,
    facts: Mapping[str, Any] | None = None,
    pretraining: pd.DataFrame | None = None,
    curves: pd.DataFrame | None = None,
    predictions: pd.DataFrame | None = None,
    next_steps: Sequence[str] = (),
    reference: str = "scratch",
) -> Path:
    """Write the report of a study and return its path.

    Args:
        path: the HTML file; missing folders are made.
        title: the title of the page.
        results: one row for each run; see `crysdistill.studies.statistics`.
        facts: facts about the study, in the order to show them. Numbers, texts, lists
            and mappings are shown unchanged; `duration` is in seconds. Known names:
            `arms` (arm to description), `overlap` (one of the words of `OVERLAP_WORDS`,
            a mapping with that word as `status`, or rows of a table), `settings` and
            `versions` (mappings), `measured` (sentences instead of `MEASURED`).
        pretraining: the column `epoch` and a column for each number on held-out
            crystals; `x_chance` holds the chance level of `x`.
        curves: columns `run`, `epoch`, `train_loss` and validation numbers; also `arm`
            if the names of the runs do not begin with it.
        predictions: test predictions: columns `arm, seed, material_id, target,
            prediction, truth`, and `labels` if there are several numbers of labels.
        next_steps: suggestions; a command stands alone or between backticks.
        reference: the arm that the others are compared with, if there is one.

    Raises:
        InputError: a table lacks a column, the results cannot be used, or the path is a
            folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of an HTML file")
    facts = dict(facts or {})
    table = check_results(results)
    groups = result_groups(table, reference, facts.get("arms"))
    overlap = _overlap(facts.get("overlap"))
    page = _environment().get_template("report.html.j2")
    text = page.render(
        title=title,
        lead=_lead(table),
        tally=tally(groups) if len(groups) > 1 else [],
        reference=reference,
        targets=_targets(groups, table),
        pretraining=None if pretraining is None else _pretraining(pretraining),
        parity=[] if predictions is None else _parity(predictions, groups),
        curves=[] if curves is None else _curves(curves, groups, reference),
        overlap=overlap,
        measured=[
            *facts.get("measured", MEASURED),
            *statistics_used(table, reference),
        ],
        facts={k: v for k, v in facts.items() if k not in _SHOWN_ELSEWHERE},
        settings=_flat(facts.get("settings", {})),
        versions=facts.get("versions", {}),
        limits=limits(table, groups, reference, overlap),
        runs=_runs(table, groups),
        next_steps=list(next_steps),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _environment() -> Environment:
    """Return the templates, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("crysdistill.studies", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "percent", "span", "percent_span")
    environment.filters |= {name: getattr(tables, name) for name in names}
    environment.filters |= {"value": _value, "code": _code, "words": _words}
    environment.globals["value_text"] = tables.value_text
    return environment


def _lead(table: pd.DataFrame) -> str:
    """Return the size of the study in one line."""
    parts = []
    for name, column in (("target", "target"), ("arm", "arm"), ("seed", "seed")):
        count = table[column].nunique()
        parts.append(f"{count} {name}{'s' * (count != 1)}")
    labels = sorted(table["labels"].unique())
    return ", ".join(
        [*parts, " / ".join(f"{n:,}" for n in labels) + " training labels"]
    )


def _targets(
    groups: Sequence[ResultGroup], table: pd.DataFrame
) -> list[dict[str, Any]]:
    """Return the result tables and figures, target by target."""
    shown = []
    for (target, metric), found in groupby(groups, lambda g: (g.target, g.metric)):
        of_target = list(found)
        panels = []
        for group in of_target:
            pictures = []
            if any(row.n for row in group.rows):
                pictures.append(figures.values_figure(group))
            if any(row.changes for row in group.rows):
                pictures.append(figures.changes_figure(group))
            said = findings(group, table)
            panels.append({"group": group, "figures": pictures, "findings": said})
        over_labels = []
        if len(of_target) > 1:
            over_labels.append(figures.labels_figure(of_target))
            if any(row.changes for group in of_target for row in group.rows):
                over_labels.append(figures.labels_figure(of_target, changes=True))
        shown.append(
            {"name": target, "metric": metric, "panels": panels, "labels": over_labels}
        )
    return shown


def _pretraining(table: pd.DataFrame) -> dict[str, Any]:
    """Return the pretraining numbers, each beside its chance level."""
    _need(table, "pretraining table", ["epoch"])
    ordered = table.sort_values("epoch")
    rows = []
    for name in ordered.columns:
        skip = name in ("epoch", "step") or str(name).endswith("_chance")
        skip |= str(name).startswith("lr")  # the learning-rate schedule
        values = pd.to_numeric(ordered[name], errors="coerce").to_numpy(float)
        values = values[np.isfinite(values)]
        if skip or not len(values):
            continue
        chance = math.nan
        if f"{name}_chance" in ordered:
            known = pd.to_numeric(ordered[f"{name}_chance"], errors="coerce").dropna()
            chance = float(known.iloc[-1]) if len(known) else math.nan
        curve = figures.sparkline(values, chance) if len(values) > 1 else None
        row = {"name": str(name).replace("_", " "), "first": values[0]}
        row |= {"last": values[-1], "chance": chance, "curve": curve}
        rows.append({**row, "above": values[-1] > chance, "epochs": len(values)})
    rows.sort(key=lambda row: math.isnan(row["chance"]))  # first those with a chance
    return {"rows": rows, "epochs": ordered["epoch"].nunique()}


def _parity(
    predictions: pd.DataFrame, groups: Sequence[ResultGroup]
) -> list[dict[str, Any]]:
    """Return parity plots (or ROC curves) of the reference and the best arm."""
    columns = ["arm", "seed", "material_id", "target", "prediction", "truth"]
    _need(predictions, "predictions", columns)
    finite = np.isfinite(predictions[["prediction", "truth"]].astype(float)).all(axis=1)
    table = predictions[finite]
    if "labels" not in table:
        table = table.assign(labels=math.nan)
    shown = []
    for (target, _), found in groupby(groups, lambda g: (g.target, g.metric)):
        of_target = list(found)
        part = table[table["target"].astype(str) == target]
        # The largest training set that has predictions.
        known = [g for g in of_target if (part["labels"] == g.labels).any()]
        group = (known or of_target)[-1]
        if known:
            part = part[part["labels"] == group.labels]
        rows = [row for row in (group.reference, group.best) if row is not None]
        arms = [row.arm for row in rows if (part["arm"] == row.arm).any()]
        arms = arms or list(part["arm"].unique()[:2])
        if not arms:
            continue
        said = known or len(of_target) == 1
        labels = f", {group.labels:,} training labels" if said else ""
        panel = {"group": group, "labels": labels, "worst": [], "arm": arms[-1]}
        parts = [part[part["arm"] == arm] for arm in arms]
        if group.metric == "auc":
            panel["figures"] = [
                figures.roc_figure(p, arm) for p, arm in zip(parts, arms, strict=True)
            ]
        else:
            ends = _both_limits(pd.concat(parts))
            name = group.reference.arm if group.reference else None
            panel["figures"] = [
                figures.parity_figure(p, arm, group.unit, ends, arm == name)
                for p, arm in zip(parts, arms, strict=True)
            ]
            panel["worst"] = _worst(parts[-1])
        shown.append(panel)
    return shown


def _both_limits(predictions: pd.DataFrame) -> tuple[float, float]:
    """Return limits that hold all predictions and truths."""
    ends = predictions[["prediction", "truth"]].to_numpy(float)
    margin = 0.04 * (float(np.ptp(ends)) or 1.0)
    return float(ends.min()) - margin, float(ends.max()) + margin


def _worst(predictions: pd.DataFrame, count: int = 5) -> list[dict[str, Any]]:
    """Return the crystals with the largest mean error over the seeds that test them."""
    table = predictions.assign(
        error=(predictions["prediction"] - predictions["truth"]).astype(float)
    )
    mean = table.groupby("material_id")[["truth", "prediction", "error"]].mean()
    mean["seeds"] = table.groupby("material_id").size()
    order = mean["error"].abs().sort_values(ascending=False).index[:count]
    return [{"material_id": name, **mean.loc[name].to_dict()} for name in order]


def _curves(
    curves: pd.DataFrame, groups: Sequence[ResultGroup], reference: str
) -> list[Markup]:
    """Return one picture for each number that the runs logged."""
    _need(curves, "curves", ["run", "epoch"])
    table = curves.copy()
    if "arm" not in table:
        arms = sorted({r.arm for g in groups for r in g.rows}, key=len, reverse=True)
        names = {
            run: next((arm for arm in arms if str(run).startswith(arm)), str(run))
            for run in table["run"].unique()
        }
        table["arm"] = table["run"].map(names)
    columns = [
        str(name)
        for name in table.select_dtypes("number").columns
        if str(name).startswith(("train_", "val_")) and table[name].notna().any()
    ]
    columns.sort(key=lambda name: name != "train_loss")
    return [figures.curves_figure(table, name, reference) for name in columns]


def _overlap(given: Any) -> dict[str, Any] | None:
    """Return the status of the overlap, its meaning, and a table."""
    if given is None:
        return None
    if isinstance(given, pd.DataFrame):
        given = given.to_dict("records")
    rows: list[Mapping[str, Any]] = []
    facts: dict[str, Any] = {}
    said = ""
    if isinstance(given, str):
        word, _, said = given.strip().partition(" ")
        if word not in OVERLAP_WORDS:
            word, said = "unknown", given
        elif said.startswith("(") and said.endswith(")"):
            said = said[1:-1]
        elif said:
            said = given
    elif isinstance(given, Mapping):
        facts = dict(given)
        word = str(facts.pop("status", "unknown"))
        rows = list(facts.pop("rows", []))
    else:
        rows = list(given)
        found = {str(row["status"]) for row in rows if "status" in row}
        order = ("transductive", "unknown", "clean")  # the worst status counts
        word = next((w for w in order if w in found), "unknown")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if word not in OVERLAP_WORDS:
        raise InputError(
            f"the overlap's status is {word!r} but must be one of "
            f"{', '.join(OVERLAP_WORDS)}{did_you_mean(word, OVERLAP_WORDS)}"
        )
    return {
        "word": word,
        "meaning": OVERLAP_WORDS[word],
        "said": said,
        "facts": facts,
        "columns": columns,
        "rows": [[row.get(name, "") for name in columns] for row in rows],
    }


def _runs(table: pd.DataFrame, groups: Sequence[ResultGroup]) -> list[dict[str, Any]]:
    """Return the test value of every run, one table for each group."""
    shown = []
    for group in groups:
        mask = (table["target"] == group.target) & (table["metric"] == group.metric)
        part = table.loc[mask & (table["labels"] == group.labels)]
        seeds = list(dict.fromkeys(part["seed"]))
        heads = [f"seed {seed}" for seed in seeds]
        wide = part.set_index(["arm", "seed"])["value"]
        rows = [
            (row.arm, [float(wide.get((row.arm, seed), math.nan)) for seed in seeds])
            for row in group.rows
        ]
        shown.append({"group": group, "heads": heads, "rows": rows})
    return shown


def _need(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        names = " and ".join(f"`{column}`" for column in missing)
        verb = "lack" if name.endswith("s") else "lacks"
        raise InputError(
            f"the {name} {verb} {names}; needed are the columns {', '.join(columns)}"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value(value: Any, name: str = "") -> str:
    """Return a fact as text."""
    if name == "duration" and isinstance(value, int | float):
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
        return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:.6g}" if math.isfinite(value) else "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(k)} {_value(v, k)}" for k, v in value.items())
    if isinstance(value, list | tuple | set | np.ndarray):
        return ", ".join(_value(v) for v in value) or "–"
    return str(value)


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _code(text: str) -> Markup:
    """Return text with its commands, between backticks or alone, set as code."""
    commands = ("crysdistill ", "make ", "python ", "pip ")
    if text.startswith(commands) and "`" not in text:
        text = f"`{text}`"
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    shown = [
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    ]
    return Markup("").join(shown)
