"""Figures of the report: small SVG pictures whose colours follow the page.

A picture is drawn in stand-in colours that are then replaced by the page's CSS
variables, so that one file is readable on light, dark and printed pages. Text stays
text. Points in large clouds become one image inside the SVG, to keep pages small.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from sklearn.metrics import roc_auc_score, roc_curve

from crysdistill.studies.tables import ResultGroup, ResultRow, metric_name, percent

_COLOURS = {
    "ink": "#010203",
    "muted": "#020304",
    "line": "#030405",
    "surface": "#040506",
    "better": "#050607",
    "worse": "#060708",
    "unsure": "#070809",
    "none": "#08090a",
    "reference": "#090a0b",
    **{f"series-{i}": f"#0a0b{16 + i:02x}" for i in range(1, 7)},
}
_CLOUD = ("#4c86c6", "#7d8794")  # no CSS inside images: readable on light and dark
_MANY = 1500  # points beyond which a cloud becomes an image
_WIDTH = 5.4  # inches; one point of the picture is about 1.3 px on a wide page


def values_figure(group: ResultGroup) -> Markup:
    """Draw the test values of each arm: one dot per seed, mean and 95 % CI.

    Args:
        group: arms that may be compared.
    """
    rows = [row for row in group.rows if row.n]
    figure, ax = _canvas(_WIDTH, 0.85 + 0.4 * len(rows))
    spans = [(row.mean, *row.values, *row.interval) for row in rows]
    reference = group.reference
    known = reference is not None and reference.n
    anchor = reference.mean if reference and known else rows[0].mean
    low, high = _limits(spans, anchor)
    if known:
        ax.axvline(anchor, color=_COLOURS["reference"], lw=1, ls=(0, (4, 3)), zorder=1)
    for place, row in enumerate(rows):
        label = f"{row.mean:.{group.decimals}f}"
        _interval_row(
            ax, place, row, row.mean, row.interval, row.values, label, low, high
        )
    _arm_axis(ax, rows, low, high, group.metric_label)
    return _svg(figure, f"{group.metric_label} of each arm, {group.labels} labels")


def changes_figure(group: ResultGroup) -> Markup:
    """Draw the paired change of each arm against the reference, in percent.

    Args:
        group: arms that may be compared, with a reference among them.
    """
    rows = [row for row in group.rows if row.n]  # the same as beside the values
    name = group.reference.arm if group.reference else ""
    figure, ax = _canvas(_WIDTH, 0.85 + 0.4 * len(rows))
    compared = [row for row in rows if row.changes]
    spans = [(row.change, *row.changes, *row.change_interval) for row in compared]
    low, high = _limits(spans, 0.0)
    ax.axvline(0, color=_COLOURS["reference"], lw=1, ls=(0, (4, 3)), zorder=1)
    for place, row in enumerate(rows):
        if not row.changes:
            word = "reference" if row.reference else "no common seed"
            style: dict[str, Any] = {"color": _COLOURS[row.tone], "fontsize": 9.5}
            ax.text((high - low) * 0.015, place, word, va="center", **style)
            continue
        label = f"{percent(row.change)} %"
        ends, dots = row.change_interval, row.changes
        _interval_row(ax, place, row, row.change, ends, dots, label, low, high)
    title = f"change of {metric_name(group.metric)} against {name} (%), paired by seed"
    _arm_axis(ax, rows, low, high, title)
    return _svg(figure, title)


def labels_figure(groups: Sequence[ResultGroup]) -> Markup:
    """Draw the test value of each arm against the number of labels, with 95 % CI.

    Args:
        groups: of one target and metric, with different numbers of labels.
    """
    figure, ax = _canvas(_WIDTH, 3.1)
    arms = list(dict.fromkeys(row.arm for group in groups for row in group.rows))
    for arm in arms:
        found = [(g.labels, r) for g in groups for r in g.rows if r.arm == arm and r.n]
        x = np.array([labels for labels, _ in found], float)
        mean = np.array([row.mean for _, row in found])
        ends = np.array([row.interval for _, row in found]).reshape(-1, 2)
        is_reference = any(row.reference for _, row in found)
        others = [a for g in groups for a in [r.arm for r in g.rows if not r.reference]]
        colour = _series(arm, list(dict.fromkeys(others)), is_reference)
        style: dict[str, Any] = {
            "color": colour,
            "lw": 1.6,
            "ms": 4.5,
            "label": _short(arm),
        }
        ax.plot(x, mean, "o--" if is_reference else "o-", **style)
        ax.fill_between(x, *ends.T, color=colour, alpha=0.12, lw=0)
    ticks = sorted({group.labels for group in groups})
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set_xlabel("training labels")
    ax.set_ylabel(_plain(groups[0].metric_label))
    ax.grid(axis="y", color=_COLOURS["line"], lw=0.7)
    _legend(figure, ax)
    return _svg(
        figure, f"{groups[0].metric_label} against the number of training labels"
    )


def sparkline(values: Sequence[float], chance: float = math.nan) -> Markup:
    """Draw a number over the epochs as a word-sized picture, with its chance level.

    Args:
        values: one for each epoch, (n,).
        chance: drawn as a dashed line; NaN for none.
    """
    figure = Figure(figsize=(1.9, 0.42), facecolor="none")
    ax = figure.add_axes((0.01, 0.08, 0.96, 0.84))
    ax.set_axis_off()
    x = np.arange(len(values))
    ax.plot(x, values, color=_COLOURS["series-1"], lw=1.6, solid_capstyle="round")
    ax.plot(x[-1:], values[-1:], "o", color=_COLOURS["series-1"], ms=3.5, clip_on=False)
    if math.isfinite(chance):
        ax.axhline(chance, color=_COLOURS["muted"], lw=1, ls=(0, (3, 2)))
    ax.margins(x=0.04, y=0.15)
    return _svg(figure, "course over the epochs; the dashed line is chance")


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
        title: above the picture.
        unit: of both axes; "" for none.
        limits: of both axes.
        reference: whether to draw in the neutral colour.
    """
    figure, ax = _canvas(4.1, 4.1)
    truth = predictions["truth"].to_numpy(float)
    guess = predictions["prediction"].to_numpy(float)
    ax.plot(limits, limits, color=_COLOURS["muted"], lw=1, zorder=1)
    many = len(truth) > _MANY
    cloud: dict[str, Any] = {
        "s": 9 if many else 14,
        "alpha": 0.35 if many else 0.55,
        "lw": 0,
        "zorder": 2,
    }
    vector = _COLOURS["none" if reference else "series-1"]
    image = _CLOUD[reference]
    colour = image if many else vector
    ax.scatter(truth, guess, color=colour, rasterized=many, **cloud)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    for axis, word in ((ax.xaxis, "truth"), (ax.yaxis, "prediction")):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_label_text(_plain(f"{word} ({unit})" if unit else word))
    error = np.abs(guess - truth).mean()
    spread = ((truth - truth.mean()) ** 2).sum()
    r2 = 1 - ((guess - truth) ** 2).sum() / spread if spread > 0 else math.nan
    said = f"MAE {error:.3g} {unit}".rstrip() + f"\nR² {r2:.3f}\n{len(truth):,} points"
    place: dict[str, Any] = {"transform": ax.transAxes, "va": "top", "linespacing": 1.4}
    ax.text(0.04, 0.96, _plain(said), color=_COLOURS["ink"], **place)
    ax.set_title(_short(title, 40), loc="left", fontsize=10.5, fontweight="bold")
    return _svg(figure, f"predictions against truth: {title}")


def roc_figure(predictions: pd.DataFrame, title: str) -> Markup:
    """Draw the ROC curve of each seed of one arm.

    Args:
        predictions: columns `seed`, `prediction` (probability) and `truth` (0 or 1).
        title: above the picture.
    """
    figure, ax = _canvas(4.1, 4.1)
    ax.plot([0, 1], [0, 1], color=_COLOURS["muted"], lw=1, ls=(0, (4, 3)))
    areas = []
    for _, part in predictions.groupby("seed"):
        if part["truth"].nunique() < 2:
            continue  # no curve where the test part holds one class only
        wrong, right, _ = roc_curve(part["truth"], part["prediction"])
        ax.plot(wrong, right, color=_COLOURS["series-1"], lw=1.3, alpha=0.75)
        areas.append(roc_auc_score(part["truth"], part["prediction"]))
    if areas:
        said = f"AUC {np.mean(areas):.3f}\nseeds {len(areas)}"
        ax.text(0.96, 0.05, said, ha="right", color=_COLOURS["ink"], linespacing=1.4)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.set(xlabel="false positive rate", ylabel="true positive rate")
    ax.set_title(_short(title, 40), loc="left", fontsize=10.5, fontweight="bold")
    return _svg(figure, f"ROC curve: {title}")


def curves_figure(curves: pd.DataFrame, column: str, reference: str) -> Markup:
    """Draw one number of the training runs over the epochs, coloured by arm.

    Args:
        curves: columns `arm`, `run`, `epoch` and `column`.
        column: what to draw.
        reference: the arm in the neutral colour.
    """
    figure, ax = _canvas(_WIDTH, 2.9)
    known = curves[np.isfinite(pd.to_numeric(curves[column], errors="coerce"))]
    arms = list(dict.fromkeys(known["arm"]))
    others = [arm for arm in arms if arm != reference]
    for arm in arms:
        colour = _series(arm, others, arm == reference)
        wide = known[known["arm"] == arm].pivot_table(column, "epoch", "run")
        if wide.shape[1] > 1:
            ax.plot(wide.index, wide, color=colour, lw=0.7, alpha=0.35)
        mean = wide.dropna().mean(axis=1)  # as far as all runs of the arm go
        marker = "o" if len(mean) == 1 else None
        style: dict[str, Any] = {"color": colour, "lw": 1.8, "label": _short(arm)}
        ax.plot(mean.index, mean, marker=marker, **style)
    values = known[column].astype(float)
    if len(values) and values.min() > 0 and values.max() > 8 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set(xlabel="epoch", ylabel=_plain(column.replace("_", " ")))
    ax.grid(axis="y", color=_COLOURS["line"], lw=0.7)
    _legend(figure, ax)
    return _svg(figure, f"{column} over the epochs")


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure, in inches, in the page's colours, outside pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    ax = figure.add_subplot(facecolor="none")
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=_COLOURS["muted"], lw=0.8)
    ax.tick_params(color=_COLOURS["muted"], labelcolor=_COLOURS["muted"], labelsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=_COLOURS["muted"], fontsize=9.5)
    ax.title.set_color(_COLOURS["ink"])
    ax._left_title.set_color(_COLOURS["ink"])  # type: ignore[attr-defined]
    return figure, ax


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
    """Draw one arm: the interval with its middle on a line, the seeds below it."""
    colour = _COLOURS[row.tone]
    if not low <= middle <= high:
        far = middle > high
        said = f"{label} →" if far else f"← {label}"
        side: dict[str, Any] = {
            "ha": "right" if far else "left",
            "va": "center",
            "fontsize": 9.5,
        }
        ax.text(high if far else low, place, said, color=colour, **side)
        return
    ax.plot(interval, [place - 0.08] * 2, color=colour, lw=2.4, solid_capstyle="butt")
    ax.plot(middle, place - 0.08, "D", color=colour, ms=6.5, mec=_COLOURS["surface"])
    dot: dict[str, Any] = {"s": 15, "color": colour, "alpha": 0.55, "lw": 0}
    ax.scatter(dots, [place + 0.22] * len(dots), **dot)


def _arm_axis(
    ax: Axes, rows: Sequence[ResultRow], low: float, high: float, title: str
) -> None:
    """Name the arms at the left, best on top, and the number below."""
    ax.set(xlim=(low, high), ylim=(len(rows) - 0.45, -0.55), xlabel=_plain(title))
    ax.set_yticks(range(len(rows)), [_short(row.arm) for row in rows])
    ax.tick_params(axis="y", length=0, labelsize=10, labelcolor=_COLOURS["ink"])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", color=_COLOURS["line"], lw=0.7)
    ax.set_axisbelow(True)


def _limits(spans: Sequence[Sequence[float]], anchor: float) -> tuple[float, float]:
    """Return limits that show all arms but those far from the rest.

    An arm whose middle (the first of its numbers) is more than four times as far from
    the anchor as the typical arm would squeeze the others; it becomes an arrow.
    """
    kept = [np.array(span)[np.isfinite(span)] for span in spans]
    reach = [np.abs(span - anchor).max() for span in kept]
    typical = float(np.median([r for r in reach if r > 0] or [abs(anchor) or 1.0]))
    shown = [s for s in kept if abs(s[0] - anchor) <= 4 * typical]
    ends = np.concatenate([*shown, [anchor]])
    margin = 0.06 * (float(np.ptp(ends)) or typical)
    return float(ends.min() - margin), float(ends.max() + margin)


def _series(arm: str, others: Sequence[str], reference: bool) -> str:
    """Return the colour of an arm among others."""
    if reference:
        return _COLOURS["reference"]
    return _COLOURS[f"series-{others.index(arm) % 6 + 1}"]


def _short(name: str, most: int = 22) -> str:
    """Return a name that fits beside an axis."""
    return _plain(name if len(name) <= most else name[: most - 1] + "…")


def _plain(text: str) -> str:
    """Return text in which matplotlib finds no mathematics."""
    return text.replace("$", r"\$")


def _legend(figure: Figure, ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    if not handles:
        return
    style: dict[str, Any] = {
        "frameon": False,
        "fontsize": 9.5,
        "labelcolor": _COLOURS["ink"],
    }
    spacing: dict[str, Any] = {"columnspacing": 1.4, "handlelength": 1.6}
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": min(len(names), 4)}
    figure.legend(handles, names, **place, **style, **spacing)


def _svg(figure: Figure, title: str) -> Markup:
    """Return a figure as an SVG element that needs nothing from elsewhere."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # the same picture has the same ids
        "font.family": ["DejaVu Sans"],
        "axes.unicode_minus": True,
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, dpi=160)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = (72 * inches for inches in figure.get_size_inches())
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width: {1.35 * width:.0f}px"'
    head = f'<svg {size} role="img" aria-label="{escape(title)}">'
    text = head + text[text.index(">") + 1 :]
    # Ids are those of the whole page: two pictures must not share them.
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', text)
    text = text.replace("url(#", f"url(#{prefix}")
    for name, stand_in in _COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    return Markup(text)
