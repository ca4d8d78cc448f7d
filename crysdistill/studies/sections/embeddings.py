"""Maps of embeddings: what pretraining ordered, and what fine-tuning made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from sklearn.linear_model import LinearRegression

from crysdistill.studies.canvas import COLOURS, canvas, headline, plain, svg
from crysdistill.studies.exhibits import Column, Picture, Section, exhibit, stem
from crysdistill.studies.needs import need
from crysdistill.studies.numbers import number
from crysdistill.studies.tables import ResultGroup

# An image has no CSS: all shades can be seen on light and on dark.
_SHADES = LinearSegmentedColormap.from_list("", ["#2f7fd1", "#a78bb5", "#e8702a"])

_TASK = ["task", "target", "arm"]


def maps(points: pd.DataFrame | None, groups: Sequence[ResultGroup]) -> Section | None:
    """Return maps of each task before and after fine-tuning; None without any.

    Args:
        points: columns `task, target, arm, stage, x, y, value, explained_x,
            explained_y`; see `embedding_maps`.
        groups: the groups from `result_groups`, for units.
    """
    if points is None or points.empty:
        return None
    columns = [
        "task",
        "target",
        "arm",
        "stage",
        "x",
        "y",
        "value",
        "explained_x",
        "explained_y",
    ]
    need(points, "points", columns)
    units = {group.target: group.unit for group in groups}
    rows: list[dict[str, Any]] = []
    pictures = []
    for (task, target, arm), part in points.groupby(_TASK, sort=False):
        known = units.get(str(target))
        unit = f"{target} ({known})" if known else str(target)
        for stage, found in part.groupby("stage", sort=False):
            title = f"{task}: {stage}"
            picture = map_figure(found, title, unit)
            pictures.append(
                Picture(
                    stem("embeddings", *dict.fromkeys((task, target)), stage), picture
                )
            )
            rows.append(
                {
                    "task": task, "arm": arm, "stage": stage, "crystals": len(found),
                    "variance": float(found["explained_x"].iloc[0])
                    + float(found["explained_y"].iloc[0]),
                    "r2": _explained(found),
                }
            )  # fmt: skip
    return Section(
        "Embeddings in two dimensions",
        note="Embeddings of test crystals on their two principal components, by the "
        "pretrained encoder and by the best arm that fine-tunes it, in its first run "
        "with the most labels. Colours are values of the target. R² says how much of "
        "the target is a linear function of the two components.",
        exhibits=[
            exhibit(
                "embeddings",
                "What two components hold",
                rows,
                [
                    Column("Task", lambda r: str(r["task"])),
                    Column("Encoder", _named, word=True),
                    Column("Variance", lambda r: f"{100 * r['variance']:.0f} %"),
                    Column("R² of the target", lambda r: number(r["r2"], 2)),
                    Column("Crystals", lambda r: f"{r['crystals']:,}"),
                ],
            )
        ],
        pictures=pictures,
    )


def _named(row: dict[str, Any]) -> str:
    return (
        f"{row['stage']} ({row['arm']})"
        if row["stage"] != "pretrained"
        else (str(row["stage"]))
    )


def _explained(found: pd.DataFrame) -> float:
    x, y = found[["x", "y"]].to_numpy(), found["value"].to_numpy()
    return float(LinearRegression().fit(x, y).score(x, y)) if np.ptp(y) > 0 else np.nan


def map_figure(found: pd.DataFrame, title: str, unit: str) -> Markup:
    """Draw crystals on two components, coloured by a value.

    Args:
        found: columns `x, y, value, explained_x, explained_y`.
        title: above the figure.
        unit: the name of the value, with its unit.
    """
    figure, ax = canvas(4.1, 4.3)
    values = found["value"].to_numpy(float)
    low, high = np.quantile(values, (0.02, 0.98))  # outliers take the end colours
    order = np.random.default_rng(0).permutation(len(found))  # no value lies on top
    style: dict[str, Any] = {"s": 13, "lw": 0, "alpha": 0.85, "rasterized": True}
    drawn = ax.scatter(
        found["x"].to_numpy()[order], found["y"].to_numpy()[order], c=values[order],
        cmap=_SHADES, vmin=low, vmax=high if high > low else low + 1, **style,
    )  # fmt: skip
    for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        share = 100 * float(found[f"explained_{name}"].iloc[0])
        number_ = 1 if name == "x" else 2
        axis.set_label_text(f"component {number_} ({share:.0f} % of the variance)")
        axis.set_ticks([])
    bar = figure.colorbar(drawn, ax=ax, orientation="horizontal", aspect=30, pad=0.02)
    if bar.solids is not None:
        bar.solids.set(rasterized=True, alpha=1)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.ax.tick_params(color=COLOURS["muted"], labelcolor=COLOURS["muted"], labelsize=9)
    bar.set_label(plain(unit), color=COLOURS["muted"], fontsize=9.5)
    headline(ax, title)
    return svg(figure, f"embeddings, {title}")
