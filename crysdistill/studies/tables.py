"""Results in readable form: arms, numbers with an interval, and a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from crysdistill.studies.statistics import (
    BETTER,
    WORSE,
    check_results,
    compare_paired,
    higher_is_better,
    summarise,
)

ARM_DESCRIPTIONS = {
    "scratch": "trained on the labels alone",
    "scratch-large": "control: labels alone, as large as the teacher",
    "distilled": "learns from the labels and a pretrained teacher",
    "random-teacher": "control: the teacher has random weights",
    "finetuned": "starts from the pretrained encoder",
    "frozen-all": "pretrained encoder frozen, only the head learns",
    "mean": "control: mean of the training labels",
    "forest": "control: random forest on the composition",
}
"""Arms described in one line; `describe` also knows `frozen-0`, `frozen-1`, ..."""

CONTROLS = ("scratch-large", "random-teacher", "mean", "forest")
"""Controls; a method must gain more than these arms."""

_SHORT = {"mae", "auc"}


@dataclass(frozen=True)
class ResultRow:
    """The numbers of one arm in a group; NaN if a number is missing.

    Args:
        arm: its name.
        about: its description in one line.
        reference: whether the others are compared with it.
        n: the number of runs with a result.
        failed: the number of runs without a result.
        values: test value of each run, (n,).
        mean: mean of the values.
        sd: standard deviation of the values.
        interval: 95 % confidence interval of the mean.
        change: paired change against the reference in percent.
        change_interval: its 95 % confidence interval.
        changes: the change of each pair in percent of the reference's mean, (pairs,).
        p_holm: p value after Holm's correction.
        verdict: that of `compare_paired`, "reference", or "" without a reference.
        holds: whether the verdict holds after Holm's correction.
    """

    arm: str
    about: str
    reference: bool
    n: int
    failed: int
    values: tuple[float, ...]
    mean: float
    sd: float
    interval: tuple[float, float]
    change: float = math.nan
    change_interval: tuple[float, float] = (math.nan, math.nan)
    changes: tuple[float, ...] = ()
    p_holm: float = math.nan
    verdict: str = ""
    holds: bool = False

    @property
    def tone(self) -> str:
        """One word for colours: better, worse, unsure, reference or none."""
        if self.reference:
            return "reference"
        if self.verdict in (BETTER, WORSE):
            return self.verdict if self.holds else "unsure"
        return "none"

    @property
    def judgement(self) -> str:
        """The verdict, with a warning if it does not hold after the correction."""
        unsure = self.tone == "unsure"
        return f"{self.verdict}, not after Holm" if unsure else self.verdict

    @property
    def correction(self) -> str:
        """The verdict after Holm's correction; "" if there is none."""
        if not math.isfinite(self.p_holm):
            return ""
        p = "< 0.001" if self.p_holm < 0.001 else f"= {self.p_holm:.2g}"
        p = f"p {p}".replace(" ", "\u00a0")
        word = "not after Holm" if self.tone == "unsure" else "Holm"
        return f"{word}: {p}"


@dataclass(frozen=True)
class ResultGroup:
    """Arms that may be compared: one target, metric and number of labels.

    Args:
        target: name of the target.
        unit: unit of the target; "" for none.
        metric: the metric, as in the results.
        labels: number of training labels.
        rows: the arms, best mean first.
    """

    target: str
    unit: str
    metric: str
    labels: int
    rows: tuple[ResultRow, ...]

    @property
    def metric_label(self) -> str:
        """The name of the metric in figures and tables, with its unit."""
        unit = f" ({self.unit})" if self.unit and self.metric != "auc" else ""
        return f"test {metric_name(self.metric)}{unit}"

    @property
    def reference(self) -> ResultRow | None:
        """The row that the others are compared with."""
        return next((row for row in self.rows if row.reference), None)

    @property
    def best(self) -> ResultRow | None:
        """The best row that is neither the reference nor a control."""
        claims = [r for r in self.rows if r.n and not r.reference]
        return next((r for r in claims if r.arm not in CONTROLS), None)

    @property
    def decimals(self) -> int:
        """The decimals that show two digits of the spread, or three of the values."""
        spread = [r.sd for r in self.rows if r.sd > 0]
        means = [abs(r.mean) for r in self.rows if r.n and r.mean]
        if not means:
            return 3
        digits = -math.floor(math.log10(min(means))) + 2
        if spread:
            digits = max(digits, 1 - math.floor(math.log10(float(np.median(spread)))))
        return min(max(digits, 0), 6)


def describe(arm: str, given: Mapping[str, str] | None = None) -> str:
    """Return the description of an arm in one line; "" for an unknown arm.

    Args:
        arm: its name.
        given: descriptions that take precedence.
    """
    known = {**ARM_DESCRIPTIONS, **(given or {})}
    if arm in known:
        return known[arm]
    frozen = re.fullmatch(r"frozen-(\d+)", arm)
    if frozen is None:
        return ""
    layers = {"0": "", "1": " and first convolution"}
    rest = layers.get(frozen[1], f" and first {frozen[1]} convolutions")
    return f"pretrained encoder, embedding{rest} frozen"


def metric_name(metric: str) -> str:
    """Return the usual spelling of a metric."""
    return metric.upper() if metric in _SHORT else metric.replace("_", " ")


def number(value: float, decimals: int) -> str:
    """Return a number with a true minus sign, or a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(value: float) -> str:
    """Return a signed change in percent, without the percent sign."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:+.{0 if abs(value) >= 100 else 1}f}"
    return text.replace("-", "−")


def span(interval: tuple[float, float], decimals: int) -> str:
    """Return an interval, or a dash where there is none."""
    if not all(map(math.isfinite, interval)):
        return "–"
    return " to ".join(number(end, decimals) for end in interval)


def percent_span(interval: tuple[float, float]) -> str:
    """Return an interval of changes in percent, or a dash where there is none."""
    if not all(map(math.isfinite, interval)):
        return "–"
    return " to ".join(percent(end) for end in interval)


def result_groups(
    results: pd.DataFrame,
    reference: str = "scratch",
    about: Mapping[str, str] | None = None,
) -> list[ResultGroup]:
    """Return results as groups of arms that may be compared, best arm first.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics`.
        reference: the arm that the others are compared with, if it is there.
        about: descriptions of arms, beside those of `ARM_DESCRIPTIONS`.

    Raises:
        InputError: the results cannot be used; see `check_results`.
    """
    table = check_results(results)
    key = ["target", "unit", "metric", "labels"]
    rows: dict[tuple[Any, ...], list[ResultRow]] = {}
    for line in summarise(table).to_dict("records"):
        group = tuple(line[name] for name in key)
        mask = np.logical_and.reduce(
            [table[k] == v for k, v in zip(key, group, strict=True)]
        )
        runs = table[mask & (table["arm"] == line["arm"]) & np.isfinite(table["value"])]
        row = ResultRow(
            arm=line["arm"],
            about=describe(line["arm"], about),
            reference=line["arm"] == reference,
            n=line["n"],
            failed=line["failed"],
            values=tuple(runs["value"]),
            mean=line["mean"],
            sd=line["sd"],
            interval=(line["ci_low"], line["ci_high"]),
            verdict="reference" if line["arm"] == reference else "",
        )
        rows.setdefault(group, []).append(row)
    if reference in set(table["arm"]):
        pairs = compare_paired(table, reference)
        for line in pairs.to_dict("records"):
            group = tuple(line[name] for name in key)
            found = rows[group]
            place = next(i for i, row in enumerate(found) if row.arm == line["arm"])
            found[place] = replace(
                found[place],
                change=line["change"],
                change_interval=(line["change_low"], line["change_high"]),
                changes=_changes(table, dict(zip(key, group, strict=True)), line),
                p_holm=line["p_holm"],
                verdict=line["verdict"],
                holds=line["holds"],
            )
    return [
        ResultGroup(target, unit, metric, labels, _best_first(found, metric))
        for (target, unit, metric, labels), found in rows.items()
    ]


def console_table(results: pd.DataFrame, reference: str = "scratch") -> Table:
    """Return the results as a table for the terminal.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics`.
        reference: the arm that the others are compared with, if it is there.

    Raises:
        InputError: the results cannot be used; see `check_results`.
    """
    groups = result_groups(results, reference)
    heads = [f"{g.target}, {g.metric_label}, {g.labels:,} labels" for g in groups]
    title = Text(heads[0]) if len(groups) == 1 else None  # a unit may be `[eV]`
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    table.add_column("mean ± sd", justify="right")
    table.add_column(f"% vs {reference} (95 % CI)", justify="right")
    table.add_column("verdict")
    table.add_column("seeds", justify="right")
    style = {"better": "green", "worse": "red", "unsure": "yellow", "reference": "bold"}
    for head, group in zip(heads, groups, strict=True):
        if len(groups) > 1:
            table.add_section()
            table.add_row(Text(head, style="bold"))
        for row in group.rows:
            ends = percent_span(row.change_interval)
            change = f"{percent(row.change)} ({ends})" if len(row.changes) > 1 else ""
            cells = (
                row.arm,
                value_text(row, group.decimals),
                change or ("" if row.reference else percent(row.change)),
                row.judgement,
                f"{row.n} ({row.failed} failed)" if row.failed else str(row.n),
            )
            tone = style.get(row.tone, "")
            shown = [
                Text(c, style=tone if i in (0, 3) else "") for i, c in enumerate(cells)
            ]
            table.add_row(*shown)
    return table


def value_text(row: ResultRow, decimals: int) -> str:
    """Return mean and spread; one run has a mean only."""
    spread = f" ± {number(row.sd, decimals)}" if math.isfinite(row.sd) else ""
    return number(row.mean, decimals) + spread


def _best_first(rows: Sequence[ResultRow], metric: str) -> tuple[ResultRow, ...]:
    sign = -1 if higher_is_better(metric) else 1
    return tuple(sorted(rows, key=lambda r: sign * r.mean if r.n else math.inf))


def _changes(table: pd.DataFrame, key: Mapping, line: Mapping) -> tuple[float, ...]:
    """Return the difference of each pair in percent of the reference's mean."""
    mask = np.logical_and.reduce([table[name] == value for name, value in key.items()])
    runs = table[mask & np.isfinite(table["value"])].set_index("seed")
    mine = runs.loc[runs["arm"] == line["arm"], "value"]
    other = runs.loc[runs["arm"] == line["reference"], "value"]
    pairs = (mine - other.reindex(mine.index)).dropna()
    scale = abs(line["reference_mean"])
    return tuple(100 * pairs / scale) if len(pairs) and scale > 0 else ()
