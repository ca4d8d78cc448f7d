"""The report of a study: one self-contained HTML page with its runs and findings."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from crysdistill.errors import InputError
from crysdistill.studies import figures, numbers
from crysdistill.studies.exhibits import (
    Column,
    Exhibit,
    Picture,
    Section,
    exhibit,
    stem,
)
from crysdistill.studies.exports import export, export_folder
from crysdistill.studies.findings import (
    MEASURED,
    findings,
    limits,
    statistics_used,
    tally,
)
from crysdistill.studies.page import flat_settings, render
from crysdistill.studies.sections.calibration import NONE as NO_CALIBRATION
from crysdistill.studies.sections.calibration import calibrated
from crysdistill.studies.sections.controls import gains
from crysdistill.studies.sections.costs import costs, failures
from crysdistill.studies.sections.embeddings import maps
from crysdistill.studies.sections.freezing import freezing
from crysdistill.studies.sections.gap import share_of_gap
from crysdistill.studies.sections.labels import learning_curves
from crysdistill.studies.sections.overlap import known_overlap, overlap
from crysdistill.studies.sections.overview import fullest, overview
from crysdistill.studies.sections.predictions import predictions_sections
from crysdistill.studies.sections.search import SHARED, searched
from crysdistill.studies.sections.training import pretraining as pretraining_numbers
from crysdistill.studies.sections.training import training_curves
from crysdistill.studies.statistics import check_results
from crysdistill.studies.tables import (
    ResultGroup,
    console_table,
    result_groups,
    value_text,
)

__all__ = ["console_table", "write_report"]

_SHOWN_ELSEWHERE = {
    "arms", "overlap", "settings", "versions", "measured", "controls", "tasks",
    "command", "tune", "not_fair", "roles", "overlap_of_runs",
}  # fmt: skip
_ALL_DRAWN = 8  # of more groups, only those of the overview have figures


def write_report(
    path: str | Path,
    *,
    title: str,
    results: pd.DataFrame,
    failed: pd.DataFrame | None = None,
    facts: Mapping[str, Any] | None = None,
    pretraining: pd.DataFrame | None = None,
    curves: pd.DataFrame | None = None,
    predictions: pd.DataFrame | None = None,
    crystals: pd.DataFrame | None = None,
    blocks: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
    embeddings: pd.DataFrame | None = None,
    not_shown: Sequence[str] = (),
    next_steps: Sequence[str] = (),
    reference: str = "scratch",
    controls: Collection[str] = (),
) -> Path:
    """Write the report of a study and return its path.

    The folder `report/` beside `report.html` gets every table as CSV, Markdown and
    LaTeX, and every figure as SVG.

    Args:
        path: the HTML file; missing folders are made.
        title: the title of the page.
        results: one row for each run; see `crysdistill.studies.statistics.results`.
        failed: rows with an `error`, also of runs of which nothing else is known;
            those of the results if None.
        facts: facts about the study, in the order to show them. Numbers, texts, lists
            and mappings are shown unchanged; `duration` is in seconds. Known names:
            `arms` (arm to description), `controls` (names of arms), `tasks` (task to
            facts, with its `overlap`), `overlap` (one of the words of `OVERLAP_WORDS`,
            a mapping with that word as `status`, or rows of a table),
            `overlap_of_runs` (such rows, which count more), `settings` and
            `versions` (mappings), `measured` (sentences instead of `MEASURED`),
            `command` (what ran the study), `tune` (see `searched`), `not_fair`
            (sentences on comparisons that are not fair), `roles` (see `Arm.role`).
        pretraining: the column `epoch` and a column for each number on held-out
            crystals; `x_chance` holds the chance level of `x`.
        curves: columns `run`, `epoch`, `train_loss` and validation numbers; also `arm`
            if the names of the runs do not begin with it, and `task`.
        predictions: test predictions: columns `arm, seed, material_id, target,
            prediction, truth`; also `labels` and `task` if there are several,
            `distance` to the nearest training crystal, `corpus_distance` to the
            nearest of the corpus, and `sd` and `sd_factor` (see `calibrated`).
        crystals: columns `material_id, elements, system` (and `task`) of test crystals.
        blocks: columns `run, block, drift, cka` of fine-tuned encoders.
        published: published predictions; see `read_published`.
        embeddings: points of crystals; see `embedding_maps`.
        not_shown: sentences on what is missing on the page, and why.
        next_steps: suggestions; a command stands alone or between backticks.
        reference: the arm that the others are compared with, if there is one.
        controls: the arms that are controls, unless the facts name them.

    Raises:
        InputError: a table lacks a column, the results cannot be used, or the path is a
            folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of an HTML file")
    facts = dict(facts or {})
    tasks = facts.get("tasks") or {}
    table = check_results(results, reference)
    controls = facts.get("controls") or controls
    groups = result_groups(table, reference, facts.get("arms"), controls)
    seen = overlap(known_overlap(facts))
    targets = _targets(groups, table, reference)
    first = overview(groups, table, reference)
    roles = facts.get("roles") or {}
    middle = [
        gains(fullest(groups), table),
        share_of_gap(groups, table, roles),
        freezing(groups, table, blocks),
    ]
    last: list[Section | None] = []
    absent = list(not_shown)
    if predictions is not None:
        last += predictions_sections(predictions, groups, crystals, published)
        last.append(calibrated(predictions, groups))
    if not (last and last[-1]):
        absent.insert(0, NO_CALIBRATION)
    last.append(maps(embeddings, groups))
    if curves is not None:
        last.append(training_curves(curves, groups, reference))
    last += [
        searched(table, facts.get("tune")),
        costs(table),
        failures(results if failed is None else failed),
    ]
    text = render(
        title=title,
        lead=_lead(table),
        tally=tally(groups) if len(groups) > 1 else [],
        reference=reference,
        overview=first,
        targets=targets,
        middle=[section for section in middle if section],
        last=[section for section in last if section],
        pretraining=None if pretraining is None else pretraining_numbers(pretraining),
        overlap=seen,
        measured=[
            *facts.get("measured", MEASURED),
            *([SHARED] if tasks and not facts.get("tune") else []),
            *statistics_used(table, reference),
        ],
        command=facts.get("command"),
        facts={k: v for k, v in facts.items() if k not in _SHOWN_ELSEWHERE},
        tasks=tasks,
        settings=flat_settings(facts.get("settings", {})),
        versions=facts.get("versions", {}),
        limits=[
            *facts.get("not_fair", []), *limits(table, groups, reference, seen, absent),
        ],
        runs=_runs(table, groups),
        next_steps=list(next_steps),
        folder=export_folder(path).name,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    results_of_targets = [s for target in targets for s in target["sections"]]
    found = [first, *results_of_targets, *middle, *last]
    export([section for section in found if section], export_folder(path))
    return path


def _lead(table: pd.DataFrame) -> str:
    """Return the size of the study in one line."""
    parts = []
    several = table["task"].nunique() != table["target"].nunique()
    names = ("task", "target") if several else ("target",)
    for name in (*names, "arm", "fold", "seed"):
        count = table[name].nunique()
        if name != "fold" or count > 1:
            parts.append(numbers.counted(count, name))
    labels = sorted(table["labels"].unique())
    return ", ".join(
        [*parts, " / ".join(f"{n:,}" for n in labels) + " training labels"]
    )


def _targets(
    groups: Sequence[ResultGroup], table: pd.DataFrame, reference: str
) -> list[dict[str, Any]]:
    """Return the result tables and figures, task by task."""
    drawn = list(groups) if len(groups) <= _ALL_DRAWN else fullest(groups)
    shown = []
    for _, found in groupby(groups, lambda g: g.key):
        of_task = list(found)
        panels, sections = [], []
        for group in of_task:
            pictures = _pictures(group, len(groups)) if group in drawn else []
            said = findings(group, table)
            panels.append(
                {"group": group, "figures": [p.svg for p in pictures], "findings": said}
            )
            sections.append(
                Section(group.name, exhibits=[_results(group)], pictures=pictures)
            )
        over_labels = learning_curves(of_task, table, reference)
        shown.append(
            {
                "name": of_task[0].title,
                "panels": panels,
                "labels": over_labels,
                "sections": [*sections, *([over_labels] if over_labels else [])],
            }
        )
    return shown


def _pictures(group: ResultGroup, groups: int) -> list[Picture]:
    """Return the values of all arms, and their changes; of many groups, the changes."""
    name, pictures = stem(group.name, group.labels), []
    compared = any(row.changes for row in group.rows)
    if any(row.n for row in group.rows) and not (compared and groups > _ALL_DRAWN):
        pictures.append(Picture(f"values-{name}", figures.values_figure(group)))
    if compared:
        pictures.append(Picture(f"changes-{name}", figures.changes_figure(group)))
    return pictures


def _results(group: ResultGroup) -> Exhibit:
    """Return the results of a group as a table for files."""
    rows = [
        {
            "arm": row.arm, "runs": row.n, "failed": row.failed, "mean": row.mean,
            "sd": row.sd, "low": row.interval[0], "high": row.interval[1],
            "change": row.change, "change_low": row.change_interval[0],
            "change_high": row.change_interval[1], "p_holm": row.p_holm,
            "p_tasks": row.p_tasks, "p_no_worse": row.p_no_worse,
            "p_equal": row.p_equal, "verdict": row.judgement, "bound": row.bound,
            "row": row,
        }
        for row in group.rows
    ]  # fmt: skip
    made = exhibit(
        stem("results", group.name, group.labels),
        f"{group.name}, {group.labels:,} training labels",
        rows,
        [
            Column("Arm", lambda r: r["arm"]),
            Column(group.metric_label, lambda r: value_text(r["row"], group.decimals)),
            Column("Change (%)", lambda r: numbers.percent(r["change"])),
            Column(
                "95 % CI",
                lambda r: numbers.percent_span((r["change_low"], r["change_high"])),
            ),
            Column("Verdict", lambda r: r["verdict"], word=True),
            Column("Seeds", lambda r: str(r["runs"])),
        ],
    )
    return Exhibit(
        made.name, made.caption, made.data.drop(columns="row"), made.shown,
        words=made.words,
    )  # fmt: skip


def _runs(table: pd.DataFrame, groups: Sequence[ResultGroup]) -> list[dict[str, Any]]:
    """Return the test value of every run, one table for each group."""
    shown = []
    for group in groups:
        mask = (table["task"] == group.task) & (table["target"] == group.target)
        mask &= (table["metric"] == group.metric) & (table["labels"] == group.labels)
        part = table[mask & table["condition"].isin([group.condition, ""])]
        splits = list(dict.fromkeys(zip(part["fold"], part["seed"], strict=True)))
        heads = [
            f"fold {fold}, seed {seed}" if fold else f"seed {seed}"
            for fold, seed in splits
        ]
        wide = part.set_index(["arm", "fold", "seed"])["value"].to_dict()
        rows = [
            (row.arm, [float(wide.get((row.arm, *s), math.nan)) for s in splits])
            for row in group.rows
        ]
        shown.append({"group": group, "heads": heads, "rows": rows})
    return shown
