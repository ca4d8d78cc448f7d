"""Figures of the report, as SVG whose colours follow the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from sklearn.metrics import roc_auc_score, roc_curve

from crysdistill.studies.canvas import (
    COLOURS,
    canvas,
    headline,
    legend,
    plain,
    plain_log_axis,
    short,
    show_means,
    svg,
)
from crysdistill.studies.numbers import percent
from crysdistill.studies.tables import ResultGroup, ResultRow, metric_name

_CLOUD = ("#4c86c6", "#7d8794")  # images have no CSS; readable on light and dark
_MANY = 1500  # with more points, a cloud becomes an image
_RUNS = 60  # with more, a figure shows only the means of the arms
_MARKERS = "osD^vPX"
_WIDTH = 5.4  # inches; one point of the picture is about 1.3 px on a wide page


def values_figure(group: ResultGroup) -> Markup:
    """Draw the test values of each arm: one dot per seed, mean and 95 % CI.

    Args:
        group: arms that may be compared.
    """
    rows = [row for row in group.rows if row.n]
    figure, ax = canvas(_WIDTH, 0.85 + 0.4 * len(rows))
    spans = [(row.mean, *row.values, *row.interval) for row in rows]
    reference = group.reference
    known = reference is not None and reference.n
    anchor = reference.mean if reference and known else rows[0].mean
    low, high = _limits(spans, anchor)
    if known:
        ax.axvline(anchor, color=COLOURS["reference"], lw=1, ls=(0, (4, 3)), zorder=1)
    for place, row in enumerate(rows):
        label = f"{row.mean:.{group.decimals}f}"
        _interval_row(
            ax, place, row, row.mean, row.interval, row.values, label, low, high
        )
    _arm_axis(ax, rows, low, high, group.metric_label)
    return svg(figure, f"{group.metric_label} of each arm, {group.labels} labels")


def changes_figure(group: ResultGroup) -> Markup:
    """Draw the paired change of each arm against the reference, in percent.

    Args:
        group: arms that may be compared, with a reference among them.
    """
    rows = [row for row in group.rows if row.n]  # the rows of the values figure
    name = group.reference.arm if group.reference else ""
    figure, ax = canvas(_WIDTH, 0.85 + 0.4 * len(rows))
    compared = [row for row in rows if row.changes]
    spans = [(row.change, *row.changes, *row.change_interval) for row in compared]
    low, high = _limits(spans, 0.0)
    ax.axvline(0, color=COLOURS["reference"], lw=1, ls=(0, (4, 3)), zorder=1)
    for place, row in enumerate(rows):
        if not row.changes:
            word = "reference" if row.reference else "no common seed"
            style: dict[str, Any] = {"color": COLOURS[row.tone], "fontsize": 9.5}
            ax.text((high - low) * 0.015, place, word, va="center", **style)
            continue
        label = f"{percent(row.change)} %"
        ends, dots = row.change_interval, row.changes
        _interval_row(ax, place, row, row.change, ends, dots, label, low, high)
    title = f"change of {metric_name(group.metric)} against {name} (%), paired by seed"
    _arm_axis(ax, rows, low, high, title)
    return svg(figure, title)


def labels_figure(groups: Sequence[ResultGroup], changes: bool = False) -> Markup:
    """Draw the test value of each arm against the number of labels, with 95 % CI.

    Args:
        groups: groups of one target and metric, with different numbers of labels.
        changes: whether to draw the change against the reference in percent instead.
            Arms far from all others are then left out.
    """
    figure, ax = canvas(_WIDTH, 3.1)
    arms = list(dict.fromkeys(row.arm for group in groups for row in group.rows))
    name = next((g.reference.arm for g in groups if g.reference), None)
    others = [arm for arm in arms if arm != name]
    rows = [(g.labels, row) for g in groups for row in g.rows if row.n]
    if changes:
        rows = [(labels, row) for labels, row in rows if row.changes]
        ax.axhline(0, color=COLOURS["reference"], lw=1.2, ls=(0, (4, 3)))
    numbers = [(r.change, *r.change_interval) for _, r in rows] if changes else []
    limits = _limits(numbers, 0.0) if changes else (-math.inf, math.inf)
    for arm in arms:
        mine = [(labels, row) for labels, row in rows if row.arm == arm]
        middle = np.array([row.change if changes else row.mean for _, row in mine])
        if not mine or not ((middle >= limits[0]) & (middle <= limits[1])).all():
            continue
        x = np.array([labels for labels, _ in mine], float)
        ends = [row.change_interval if changes else row.interval for _, row in mine]
        style = _series(arm, others, arm == name)
        ax.fill_between(x, *np.array(ends).T, color=style["color"], alpha=0.1, lw=0)
        if arm == name:
            style["linestyle"] = "--"
        marker = _MARKERS[arms.index(arm) % len(_MARKERS)]
        ax.plot(x, middle, marker=marker, ms=5, lw=1.6, label=short(arm, 34), **style)
    if changes:
        ax.set_ylim(*limits)
    elif rows:
        means = [row.mean for _, row in rows]
        show_means(ax, means)
        _perhaps_log(ax, means)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted({g.labels for g in groups})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    title = f"change against {name} (%)" if changes else groups[0].metric_label
    ax.set(xlabel="training labels", ylabel=plain(title))
    ax.grid(axis="y", color=COLOURS["line"], lw=0.7)
    legend(figure, ax)
    return svg(figure, f"{title}, over the number of training labels")


def sparkline(values: Sequence[float], chance: float = math.nan) -> Markup:
    """Draw a number over the epochs as a word-sized picture, with its chance level.

    Args:
        values: one value for each epoch, (n,).
        chance: the chance level, drawn as a dashed line; NaN for none.
    """
    figure = Figure(figsize=(1.9, 0.42), facecolor="none")
    ax = figure.add_axes((0.01, 0.08, 0.96, 0.84))
    ax.set_axis_off()
    x = np.arange(len(values))
    ax.plot(x, values, color=COLOURS["series-1"], lw=1.6, solid_capstyle="round")
    ax.plot(x[-1:], values[-1:], "o", color=COLOURS["series-1"], ms=3.5, clip_on=False)
    if math.isfinite(chance):
        ax.axhline(chance, color=COLOURS["muted"], lw=1, ls=(0, (3, 2)))
    ax.margins(x=0.04, y=0.15)
    return svg(figure, "course over the epochs; the dashed line is chance")


def parity_figure(
    predictions: pd.DataFrame,
    title: str,
    unit: str,
    limits: tuple[float, float],
    reference: bool = False,
) -> Markup:
    """Draw predictions against the truth, all seeds of one arm.

    Args:
        predictions: columns `prediction` and `truth`, in the unit.
        title: the title above the figure.
        unit: the unit of both axes; "" for none.
        limits: the limits of both axes.
        reference: whether to draw in the neutral colour.
    """
    figure, ax = canvas(4.1, 4.1)
    truth = predictions["truth"].to_numpy(float)
    guess = predictions["prediction"].to_numpy(float)
    ax.plot(limits, limits, color=COLOURS["muted"], lw=1, zorder=1)
    many = len(truth) > _MANY
    cloud: dict[str, Any] = {
        "s": 9 if many else 14,
        "alpha": 0.35 if many else 0.55,
        "lw": 0,
        "zorder": 2,
    }
    vector = COLOURS["none" if reference else "series-1"]
    image = _CLOUD[reference]
    colour = image if many else vector
    ax.scatter(truth, guess, color=colour, rasterized=many, **cloud)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    for axis, word in ((ax.xaxis, "truth"), (ax.yaxis, "prediction")):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_label_text(plain(f"{word} ({unit})" if unit else word))
    error = np.abs(guess - truth).mean()
    spread = ((truth - truth.mean()) ** 2).sum()
    r2 = 1 - ((guess - truth) ** 2).sum() / spread if spread > 0 else math.nan
    said = f"MAE {error:.3g} {unit}".rstrip() + f"\nR² {r2:.3f}\n{len(truth):,} points"
    place: dict[str, Any] = {"transform": ax.transAxes, "va": "top", "linespacing": 1.4}
    ax.text(0.04, 0.96, plain(said), color=COLOURS["ink"], **place)
    headline(ax, title)
    return svg(figure, f"predictions against truth: {title}")


def roc_figure(predictions: pd.DataFrame, title: str) -> Markup:
    """Draw the ROC curve of each seed of one arm.

    Args:
        predictions: columns `seed`, `prediction` (probability) and `truth` (0 or 1).
        title: the title above the figure.
    """
    figure, ax = canvas(4.1, 4.1)
    ax.plot([0, 1], [0, 1], color=COLOURS["muted"], lw=1, ls=(0, (4, 3)))
    areas = []
    for _, part in predictions.groupby("seed"):
        if part["truth"].nunique() < 2:
            continue  # a test set of one class has no curve
        wrong, right, _ = roc_curve(part["truth"], part["prediction"])
        ax.plot(wrong, right, color=COLOURS["series-1"], lw=1.3, alpha=0.75)
        areas.append(roc_auc_score(part["truth"], part["prediction"]))
    if areas:
        said = f"AUC {np.mean(areas):.3f}\nseeds {len(areas)}"
        ax.text(0.96, 0.05, said, ha="right", color=COLOURS["ink"], linespacing=1.4)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.set(xlabel="false positive rate", ylabel="true positive rate")
    headline(ax, title)
    return svg(figure, f"ROC curve: {title}")


def curves_figure(
    curves: pd.DataFrame, column: str, reference: str, about: str = ""
) -> Markup:
    """Draw one number of the training runs over the epochs, coloured by arm.

    Args:
        curves: columns `arm`, `run`, `epoch` and `column`.
        column: the number to draw.
        reference: the arm in the neutral colour.
        about: what stands before the name of the number.
    """
    figure, ax = canvas(_WIDTH, 2.9)
    known = curves[np.isfinite(pd.to_numeric(curves[column], errors="coerce"))]
    arms = list(dict.fromkeys(known["arm"]))
    others = [arm for arm in arms if arm != reference]
    for arm in arms:
        style = _series(arm, others, arm == reference)
        mine = known[known["arm"] == arm]
        wide = mine.pivot(index="epoch", columns="run", values=column)
        if wide.shape[1] > 1 and known["run"].nunique() <= _RUNS:
            ax.plot(wide.index, wide, lw=0.7, alpha=0.35, **style)
        mean = wide.dropna().mean(axis=1)  # of the epochs that all runs reached
        marker = "o" if len(mean) == 1 else None
        ax.plot(mean.index, mean, marker=marker, lw=1.8, label=short(arm, 34), **style)
    values = known[column].astype(float)
    if len(values) and values.min() > 0 and values.max() > 8 * values.min():
        ax.set_yscale("log")
        plain_log_axis(ax)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    name = f"{about}{column.replace('_', ' ')}"
    ax.set(xlabel="epoch", ylabel=plain(name))
    ax.grid(axis="y", color=COLOURS["line"], lw=0.7)
    legend(figure, ax)
    return svg(figure, f"{name} over the epochs")


def _interval_row(
    ax: Axes,
    place: int,
    row: ResultRow,
    middle: float,
    interval: tuple[float, float],
    dots: Sequence[float],
    label: str,
    low: float,
    high: float,
) -> None:
    """Draw one arm: the interval and its middle on a line, the seeds below."""
    colour = COLOURS[row.tone]
    if not low <= middle <= high:
        far = middle > high
        said = f"{label} →" if far else f"← {label}"
        side: dict[str, Any] = {
            "ha": "right" if far else "left",
            "va": "center",
            "fontsize": 9.5,
        }
        end = high if far else low + 0.015 * (high - low)
        ax.text(end, place, said, color=colour, **side)
        return
    ax.plot(interval, [place - 0.08] * 2, color=colour, lw=2.4, solid_capstyle="butt")
    ax.plot(middle, place - 0.08, "D", color=colour, ms=6.5, mec=COLOURS["surface"])
    dot: dict[str, Any] = {"s": 15, "color": colour, "alpha": 0.55, "lw": 0}
    ax.scatter(dots, [place + 0.22] * len(dots), **dot)


def _arm_axis(
    ax: Axes, rows: Sequence[ResultRow], low: float, high: float, title: str
) -> None:
    """Write the arms on the left, best on top, and the name of the number below."""
    ax.set(xlim=(low, high), ylim=(len(rows) - 0.45, -0.55), xlabel=plain(title))
    ax.set_yticks(range(len(rows)), [short(row.arm) for row in rows])
    ax.tick_params(axis="y", length=0, labelsize=10, labelcolor=COLOURS["ink"])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", color=COLOURS["line"], lw=0.7)
    ax.set_axisbelow(True)


def _limits(spans: Sequence[Sequence[float]], anchor: float) -> tuple[float, float]:
    """Return limits that show all arms except those far from the rest.

    The middle of an arm is the first of its numbers. If it is more than four times as
    far from the anchor as a typical arm, it would squeeze the others, so it becomes an
    arrow.
    """
    kept = [np.array(span)[np.isfinite(span)] for span in spans]
    reach = [np.abs(span - anchor).max() for span in kept]
    typical = float(np.median([r for r in reach if r > 0] or [abs(anchor) or 1.0]))
    shown = [s for s in kept if abs(s[0] - anchor) <= 4 * typical]
    ends = np.concatenate([*shown, [anchor]])
    margin = 0.06 * (float(np.ptp(ends)) or typical)
    return float(ends.min() - margin), float(ends.max() + margin)


def _perhaps_log(ax: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic if the values span a wide range."""
    if not values or min(values) <= 0 or max(values) <= 3 * min(values):
        return
    low, high = ax.get_ylim()
    ends = (max(low, 0.6 * min(values)), min(high, 1.6 * max(values)))
    ax.set(yscale="log", ylim=ends)
    plain_log_axis(ax)


def _series(arm: str, others: Sequence[str], reference: bool) -> dict[str, Any]:
    """Return colour and line style of an arm; the seventh reuses the first colour."""
    if reference:
        return {"color": COLOURS["reference"], "linestyle": "-"}
    turn, place = divmod(others.index(arm), 6)
    style = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))[turn % 3]
    return {"color": COLOURS[f"series-{place + 1}"], "linestyle": style}
