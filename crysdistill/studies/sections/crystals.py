"""Errors by kind of crystal: by element, crystal system, and distance to training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.patches import Rectangle

from crysdistill.structures.elements import symbols
from crysdistill.structures.symmetry import CRYSTAL_SYSTEMS
from crysdistill.studies.canvas import (
    COLOURS,
    canvas,
    headline,
    legend,
    plain,
    svg,
)
from crysdistill.studies.exhibits import Column, Exhibit, Picture, exhibit, stem
from crysdistill.studies.numbers import number
from crysdistill.studies.statistics.results import records
from crysdistill.studies.store_page import table_place
from crysdistill.studies.tables import ResultGroup

_LEAST = 3  # crystals, for a mean error that says anything
_SHOWN = 8


class Kinds(NamedTuple):
    """A table and a figure; None where the crystals are not known."""

    exhibit: Exhibit | None
    picture: Picture | None


def _errors(predictions: pd.DataFrame) -> pd.Series:
    """Return the mean absolute error of each crystal over its seeds."""
    errors = (predictions["prediction"] - predictions["truth"]).abs()
    return errors.groupby(predictions["material_id"]).mean()


def error_by_element(
    predictions: pd.DataFrame, crystals: pd.DataFrame, group: ResultGroup, arm: str
) -> Kinds:
    """Return the mean error of the crystals that hold each element.

    Args:
        predictions: of one arm.
        crystals: columns `material_id` and `elements` (atomic numbers).
        group: the group of the arm.
        arm: its name.
    """
    errors = _errors(predictions)
    known = crystals.drop_duplicates("material_id").set_index("material_id")["elements"]
    both = errors.index.intersection(known.index)
    long = pd.DataFrame({"element": known.loc[both], "error": errors.loc[both]})
    long = long.explode("element")
    found = long.groupby("element")["error"].agg(["size", "mean"]).reset_index()
    found = found[found["size"] >= _LEAST]
    if found.empty:
        return Kinds(None, None)
    found["symbol"] = [symbols()[int(z)] for z in found["element"]]
    overall = float(errors.loc[both].mean())
    found["ratio"] = found["mean"] / overall if overall > 0 else np.nan
    rows = found.sort_values("ratio", ascending=False)
    table = exhibit(
        stem("elements", group.name),
        f"Elements with the largest mean error of {arm}",
        records(rows.head(_SHOWN)),
        [
            Column("Element", lambda r: r["symbol"]),
            Column("Crystals", lambda r: f"{r['size']:,}"),
            Column(group.metric_label, lambda r: number(r["mean"], group.decimals)),
            Column("Mean of all = 1", lambda r: number(r["ratio"], 2)),
        ],
    )
    table = Exhibit(table.name, table.caption, rows, table.shown, words=table.words)
    title = f"{group.name}: error of {arm} by element, mean of all crystals = 1"
    return Kinds(table, Picture(table.name, elements_figure(found, title), wide=True))


def elements_figure(found: pd.DataFrame, title: str) -> Markup:
    """Draw errors on the periodic table; the stronger the shade, the larger the error.

    Args:
        found: columns `element` (atomic number), `ratio` and `size`.
        title: above the figure.
    """
    figure, ax = canvas(8.2, 4.4)
    ax.set_axis_off()
    ratios = dict(zip(found["element"].astype(int), found["ratio"], strict=True))
    for element in range(1, 101):
        row, column = table_place(element)
        box = (column + 0.03, row + 0.03)
        frame: dict[str, Any] = {"fc": "none", "ec": COLOURS["line"], "lw": 0.8}
        ratio = ratios.get(element)
        word = "muted"
        if ratio is not None and np.isfinite(ratio):
            above = ratio > 1
            shade = min(1.0, abs(float(np.log2(max(ratio, 1e-3)))))
            tone = COLOURS["worse" if above else "better"]
            ax.add_patch(Rectangle(box, 0.94, 0.94, fc=tone, alpha=0.6 * shade, lw=0))
            word = "ink"
        ax.add_patch(Rectangle(box, 0.94, 0.94, **frame))
        style: dict[str, Any] = {"ha": "center", "color": COLOURS[word]}
        ax.text(column + 0.5, row + 0.5, symbols()[element], fontsize=10, **style)
        if word == "ink":
            ax.text(column + 0.5, row + 0.83, f"{ratio:.2g}", fontsize=7.5, **style)
    ax.set(xlim=(0, 18), ylim=(9.4, 0), aspect="equal")
    headline(ax, title, most=90)
    return svg(figure, title)


def error_by_system(
    parts: Mapping[str, pd.DataFrame], crystals: pd.DataFrame, group: ResultGroup
) -> Kinds:
    """Return the mean error of each arm in each crystal system.

    Args:
        parts: predictions of arms by name.
        crystals: columns `material_id` and `system` ("" if not known).
        group: the group of the arms.
    """
    known = crystals.drop_duplicates("material_id").set_index("material_id")["system"]
    known = known[known != ""]
    found: dict[str, pd.Series] = {}
    sizes = pd.Series(dtype=int)
    for arm, part in parts.items():
        errors = _errors(part)
        both = errors.index.intersection(known.index)
        grouped = errors.loc[both].groupby(known.loc[both])
        found[arm], sizes = grouped.mean(), grouped.size()
    systems = [s for s in CRYSTAL_SYSTEMS if sizes.get(s, 0) >= _LEAST]
    if len(systems) < 2:
        return Kinds(None, None)
    rows: list[dict[str, Any]] = [
        {"system": s, "crystals": int(sizes[s])}
        | {arm: float(values.get(s, np.nan)) for arm, values in found.items()}
        for s in systems
    ]

    def column(arm: str) -> Column:
        return Column(arm, lambda r: number(r[arm], group.decimals))

    table = exhibit(
        stem("systems", group.name),
        f"{group.metric_label} by crystal system",
        rows,
        [
            Column("Crystal system", lambda r: r["system"]),
            Column("Crystals", lambda r: f"{r['crystals']:,}"),
            *map(column, found),
        ],
    )
    figure, ax = canvas(5.4, 0.9 + 0.36 * len(systems))
    height = 0.75 / len(found)
    for place, arm in enumerate(found):
        y = np.arange(len(systems)) + (place - (len(found) - 1) / 2) * height
        tone = "reference" if group.reference and arm == group.reference.arm else ""
        colour = COLOURS[tone or f"series-{place + 1}"]
        values = found[arm].reindex(systems).to_numpy(float)
        style: dict[str, Any] = {"height": 0.9 * height, "color": colour, "alpha": 0.75}
        ax.barh(y, values, label=arm, **style)
    ax.set_yticks(range(len(systems)), systems)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    ax.set_xlabel(plain(group.metric_label))
    ax.grid(axis="x", color=COLOURS["line"], lw=0.7)
    ax.set_axisbelow(True)
    legend(figure, ax)
    return Kinds(table, Picture(table.name, svg(figure, table.caption)))


DISTANCES = {
    "distance": "nearest training crystal",
    "corpus_distance": "nearest crystal of the corpus",
}
"""Columns of predictions with a distance, and to what it is."""


def error_by_distance(
    parts: Mapping[str, pd.DataFrame], group: ResultGroup, to: str = "distance"
) -> Exhibit | None:
    """Return the mean error by distance; None if too few distances are known.

    Args:
        parts: predictions of arms by name.
        group: the group of the arms.
        to: a column of `DISTANCES`.
    """
    table = pd.concat([part.assign(arm=arm) for arm, part in parts.items()])
    if to not in table:
        return None
    table = table[table[to].notna()]
    edges = np.unique(np.round(table[to].quantile([0, 0.25, 0.5, 0.75, 1]), 3))
    if table.empty or len(edges) < 3:
        return None
    table["bin"] = np.clip(np.searchsorted(edges, table[to]), 1, len(edges) - 1)
    table["error"] = (table["prediction"] - table["truth"]).abs()
    means = table.pivot_table("error", "bin", "arm")
    sizes = table.groupby("bin")["material_id"].nunique()
    rows: list[dict[str, Any]] = [
        {"low": edges[place - 1], "high": edges[place], "crystals": int(sizes[place])}
        | {arm: float(means.loc[place].get(arm, np.nan)) for arm in parts}
        for place in sizes.index
    ]

    def column(arm: str) -> Column:
        return Column(arm, lambda r: number(r[arm], group.decimals))

    return exhibit(
        stem(to, group.name),
        f"{group.metric_label} by distance to the {DISTANCES[to]}",
        rows,
        [
            Column(
                "Atoms to exchange",
                lambda r: f"{100 * r['low']:.0f} to {100 * r['high']:.0f} %",
            ),
            Column("Crystals", lambda r: f"{r['crystals']:,}"),
            *map(column, parts),
        ],
    )
