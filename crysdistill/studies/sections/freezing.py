"""Which layers to freeze: error, drift and similarity against the frozen layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from crysdistill.studies.canvas import (
    COLOURS,
    canvas,
    legend,
    plain,
    short,
    show_means,
    svg,
)
from crysdistill.studies.exhibits import Column, Picture, Section, exhibit, stem
from crysdistill.studies.numbers import number, p_text, percent, percent_span
from crysdistill.studies.statistics import paired_values
from crysdistill.studies.statistics.paired import compare_pairs
from crysdistill.studies.statistics.results import as_texts, runs_of
from crysdistill.studies.tables import ResultGroup, ResultRow

AXIS = "freeze.convolutions"
_PICTURES = 12


def freezing(
    groups: Sequence[ResultGroup],
    table: pd.DataFrame,
    blocks: pd.DataFrame | None = None,
) -> Section | None:
    """Return errors against the number of frozen layers; None if it does not vary.

    Args:
        groups: the groups from `result_groups`.
        table: the table from `check_results`.
        blocks: of runs, what became of each block of the encoder: columns `run, block,
            drift, cka`.
    """
    if AXIS not in table:
        return None
    kept = as_texts(table[AXIS])
    counts = sorted({value for value in kept if value}, key=_order)
    if len(counts) < 2:
        return None
    places = {
        arm: (_line(arm, k), k) for arm, k in zip(table["arm"], kept, strict=True) if k
    }
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    pictures: list[Picture] = []
    for group in groups:
        found = _compared(group, table, places)
        if not found:
            continue
        rows += found
        said += _sentence(group, found)
        if len(pictures) < _PICTURES:
            name = stem("freezing", group.name, group.labels)
            pictures.append(Picture(name, _figure(group, places, counts)))
    if not rows:
        return None
    if blocks is not None and len(blocks):
        pictures += _block_pictures(blocks, table, kept, counts)
    columns = [
        Column("Task", lambda r: f"{r['task']}, {r['labels']:,} labels"),
        Column("Arm", lambda r: r["line"], word=True),
        Column("Frozen", lambda r: r["frozen"]),
        Column("Error", lambda r: number(r["mean"], r["decimals"])),
        Column("Against the best (%)", lambda r: percent(r["change"])),
        Column("95 % CI", lambda r: percent_span((r["change_low"], r["change_high"]))),
        Column("p", lambda r: p_text(r["p"])),
    ]
    return Section(
        "Which layers to freeze",
        note="The embedding and this many convolutions of the pretrained encoder are "
        "frozen. Changes are paired by seed, against the best number of frozen "
        "layers of the same task, which was picked by its test values.",
        said=said,
        exhibits=[exhibit("freezing", "Error by frozen layers", rows, columns)],
        pictures=pictures,
    )


def _order(value: str) -> tuple[bool, float, str]:
    """Sort numbers before words such as `all`."""
    return (False, float(value), "") if value.isdigit() else (True, 0.0, value)


def _line(arm: str, frozen: str) -> str:
    """Return the name of an arm without its number of frozen layers."""
    return arm.replace(f" {AXIS.rpartition('.')[2]}={frozen}", "")


def _compared(
    group: ResultGroup, table: pd.DataFrame, places: dict[str, tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return every number of frozen layers against the best of the group."""
    rows = [row for row in group.rows if row.arm in places and row.n]
    if len(rows) < 2:
        return []
    runs, best = runs_of(table, group), rows[0]
    found = []
    for row in rows:
        line, frozen = places[row.arm]
        about = {"task": group.name, "labels": group.labels, "line": line}
        numbers = {"mean": row.mean, "sd": row.sd, "decimals": group.decimals}
        pair: dict[str, Any] = {}
        if row is not best:
            values = paired_values(runs, row.arm, best.arm)
            pair = compare_pairs(*values, group.higher, ratio=best.ratio)
        names = ("n", "change", "change_low", "change_high", "p", "verdict")
        paired = {name: pair.get(name, math.nan) for name in names}
        found.append({**about, "frozen": frozen, **numbers, **paired})
    return found


def _sentence(group: ResultGroup, found: Sequence[dict[str, Any]]) -> list[str]:
    """Say which number is best, how sure that is, and what the others cost."""
    best, *rest = found
    known = [row for row in rest if math.isfinite(row["change"])]
    if not known:
        return []
    open_ones = [row for row in known if not row["p"] < 0.05]
    sign = -1 if group.higher else 1
    worst = max(known, key=lambda row: sign * row["change"])
    place = f"{group.name}, {group.labels:,} labels"
    text = f"{place}: {_named(best)} has the best mean"
    if open_ones:
        text += f"; {len(open_ones)} of {len(known)} others are not shown to be worse"
        text += f", first {_named(open_ones[0])} ({percent(open_ones[0]['change'])} %)"
    else:
        text += ", and every other choice is shown to be worse"
    return [f"{text}. The worst choice, {_named(worst)}, costs {_cost(worst)}."]


def _named(row: dict[str, Any]) -> str:
    count = str(row["frozen"])
    plural = "" if count == "1" else "s"
    words = {"null": "nothing", "0": "the embedding", "all": "all layers"}
    frozen = words.get(count, f"{count} convolution{plural}")
    return f"{row['line']} with {frozen} frozen"


def _cost(row: dict[str, Any]) -> str:
    ends = percent_span((row["change_low"], row["change_high"]))
    said = f"{percent(row['change'])} %"
    return said if ends == "–" else f"{said} (95 % CI {ends} %)"


def _figure(
    group: ResultGroup,
    places: dict[str, tuple[str, str]],
    counts: Sequence[str],
) -> Markup:
    """Draw the error against the number of frozen layers, one line for each arm."""
    figure, ax = canvas(5.4, 3.1)
    reference = group.reference
    if reference is not None and reference.n:
        colour = COLOURS["reference"]
        ax.axhline(reference.mean, color=colour, ls="--", lw=1.4, label=reference.arm)
        if np.isfinite(reference.interval).all():
            ax.axhspan(*reference.interval, color=colour, alpha=0.08, lw=0)
    lines: dict[str, list[tuple[int, ResultRow]]] = {}
    for row in group.rows:
        if row.arm in places and row.n:
            line, frozen = places[row.arm]
            lines.setdefault(line, []).append((counts.index(frozen), row))
    for number_, (line, points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda point: point[0])
        x = [place for place, _ in points]
        colour = COLOURS[f"series-{number_ % 6 + 1}"]
        ends = np.array([row.interval for _, row in points])
        ax.fill_between(x, ends[:, 0], ends[:, 1], color=colour, alpha=0.12, lw=0)
        y = [row.mean for _, row in points]
        ax.plot(x, y, marker="o", ms=5, lw=1.6, color=colour, label=short(line, 34))
    show_means(ax, [row.mean for row in group.rows if row.n and _shown(row, places)])
    ax.set_xticks(range(len(counts)), list(counts))
    ax.set(xlabel="frozen convolutions", ylabel=plain(group.metric_label))
    ax.grid(axis="y", color=COLOURS["line"], lw=0.7)
    legend(figure, ax)
    return svg(figure, f"{group.name}, {group.labels:,} labels: error by frozen layers")


def _shown(row: ResultRow, places: dict[str, tuple[str, str]]) -> bool:
    return row.reference or row.arm in places


def _block_pictures(
    blocks: pd.DataFrame, table: pd.DataFrame, kept: pd.Series, counts: Sequence[str]
) -> list[Picture]:
    """Return drift of weights and CKA of each block, one line for each number."""
    frozen = pd.DataFrame({"run": table["run"], "frozen": kept})
    mean = blocks.merge(frozen[frozen["frozen"] != ""], on="run")
    names = list(dict.fromkeys(mean["block"]))
    pictures = []
    words = {
        "drift": "relative change of the weights",
        "cka": "linear CKA with the pretrained encoder",
    }
    for column, word in words.items():
        if column not in mean or not mean[column].notna().any():
            continue
        figure, ax = canvas(5.4, 3.1)
        for number_, count in enumerate(counts):
            part = mean[mean["frozen"] == count].groupby("block")[column].mean()
            colour = COLOURS[f"series-{number_ % 6 + 1}"]
            ax.plot(
                range(len(names)), part.reindex(names), marker="o", ms=5, lw=1.6,
                color=colour, label=f"{count} frozen",
            )  # fmt: skip
        ax.set_xticks(range(len(names)), [short(name, 16) for name in names])
        ax.set(xlabel="block of the encoder", ylabel=word)
        ax.grid(axis="y", color=COLOURS["line"], lw=0.7)
        legend(figure, ax)
        picture = svg(figure, f"{word}, by block and frozen layers")
        pictures.append(Picture(f"freezing-{column}", picture))
    return pictures
