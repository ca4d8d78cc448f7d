"""Results in readable form: arms, numbers with an interval, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from crysdistill.studies.numbers import number, p_text, percent, percent_span
from crysdistill.studies.statistics import (
    BETTER,
    MARGIN,
    WORSE,
    check_results,
    comparable,
    compare_paired,
    higher_is_better,
    paired_values,
    summarise,
)
from crysdistill.studies.statistics.results import GROUP, records

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
        method: the name without the axes along which it varies.
        control: whether the others must gain more than it.
        p_no_worse: p value of being no worse than the reference by `MARGIN`.
        p_equal: p value of being within `MARGIN` of the reference.
        p_tasks: p value after Holm's correction for all comparisons of the arm.
        spread: standard deviation of the paired differences, in percent.
        ratio: of the corrected test; 0 for the plain one.
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
    method: str = ""
    control: bool = False
    p_no_worse: float = math.nan
    p_equal: float = math.nan
    p_tasks: float = math.nan
    spread: float = math.nan
    ratio: float = 0.0

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
        p = p_text(self.p_holm)
        p = f"p {p if p.startswith('<') else f'= {p}'}".replace(" ", "\u00a0")
        word = "not after Holm" if self.tone == "unsure" else "Holm"
        return f"{word}: {p}"

    @property
    def bound(self) -> str:
        """How much worse it can still be, if that is little and it is not better."""
        if self.tone == BETTER or not self.p_no_worse < 0.05:
            return ""
        word = "equal within" if self.p_equal < 0.05 else "no worse than"
        return f"{word} {100 * MARGIN:g}\u00a0%"


@dataclass(frozen=True)
class ResultGroup:
    """Arms that may be compared: one target, metric and number of labels.

    Args:
        target: name of the target.
        unit: unit of the target; "" for none.
        metric: the metric, as in the results.
        labels: number of training labels.
        rows: the arms, best mean first.
        task: the name of the task; that of the target if it has no other.
        condition: the axes along which the reference varies, with their values.
    """

    target: str
    unit: str
    metric: str
    labels: int
    rows: tuple[ResultRow, ...]
    task: str = ""
    condition: str = ""

    @property
    def name(self) -> str:
        """The task, with its condition if it has one."""
        said = self.task or self.target
        return f"{said}, {self.condition}" if self.condition else said

    @property
    def title(self) -> str:
        """The name, with the target if it says more."""
        told = self.target in self.name
        return self.name if told else f"{self.name} ({self.target})"

    @property
    def higher(self) -> bool:
        """Whether higher values are better."""
        return higher_is_better(self.metric)

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What groups with different numbers of labels share."""
        return (self.task, self.target, self.unit, self.metric, self.condition)

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
        return next((r for r in claims if not r.control), None)

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


def metric_name(metric: str) -> str:
    """Return the usual spelling of a metric."""
    return metric.upper() if metric in _SHORT else metric.replace("_", " ")


def result_groups(
    results: pd.DataFrame,
    reference: str = "scratch",
    about: Mapping[str, str] | None = None,
    controls: Collection[str] = (),
) -> list[ResultGroup]:
    """Return results as groups of arms that may be compared, best arm first.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics.results`.
        reference: the arm that the others are compared with, if it is there.
        about: descriptions of arms in one line.
        controls: the arms that are controls.

    Raises:
        InputError: the results cannot be used; see `check_results`.
    """
    table = check_results(results, reference)
    told = about or {}
    methods = dict(zip(table["arm"], table["method"], strict=True))
    pairs = {}
    if reference in set(table["arm"]):
        found = records(compare_paired(table, reference))
        pairs = {(*_place(line), line["arm"]): line for line in found}
    summary: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in records(summarise(table, reference=reference)):
        summary.setdefault(_place(line), []).append(line)
    groups = []
    for key, runs in comparable(table):
        rows = []
        for line in summary[_place(key)]:
            arm = line["arm"]
            values = runs.loc[runs["arm"] == arm, "value"]
            row = ResultRow(
                arm=arm,
                about=told.get(arm, told.get(methods[arm], "")),
                reference=arm == reference,
                n=line["n"],
                failed=line["failed"],
                values=tuple(values[np.isfinite(values)]),
                mean=line["mean"],
                sd=line["sd"],
                interval=(line["ci_low"], line["ci_high"]),
                verdict="reference" if arm == reference else "",
                method=methods[arm],
                control=methods[arm] in controls,
            )
            pair = pairs.get((*_place(key), arm))
            rows.append(_compared(row, pair, runs) if pair else row)
        groups.append(ResultGroup(**key, rows=_best_first(rows, key["metric"])))
    return groups


def _place(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in GROUP)


def _compared(row: ResultRow, line: Mapping, runs: pd.DataFrame) -> ResultRow:
    """Return a row with its comparison with the reference."""
    scale = abs(line["reference_mean"])
    mine, other = paired_values(runs, row.arm, line["reference"])
    known = len(mine) and scale > 0
    return replace(
        row,
        change=line["change"],
        change_interval=(line["change_low"], line["change_high"]),
        changes=tuple(100 * (mine - other) / scale) if known else (),
        spread=100 * line["sd_difference"] / scale if known else math.nan,
        **{
            name: line[name]
            for name in ("p_holm", "p_no_worse", "p_equal", "p_tasks", "ratio")
        },
        verdict=line["verdict"],
        holds=line["holds"],
    )


def console_table(results: pd.DataFrame, reference: str = "scratch") -> Table:
    """Return the results as a table for the terminal.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics`.
        reference: the arm that the others are compared with, if it is there.

    Raises:
        InputError: the results cannot be used; see `check_results`.
    """
    groups = result_groups(results, reference)
    heads = [f"{g.name}, {g.metric_label}, {g.labels:,} labels" for g in groups]
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
