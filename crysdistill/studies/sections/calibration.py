"""Whether the uncertainties that arms predict are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from crysdistill.studies.canvas import COLOURS, canvas, headline, legend, short, svg
from crysdistill.studies.exhibits import Column, Picture, Section, exhibit, stem
from crysdistill.studies.numbers import number
from crysdistill.studies.sections.predictions import judged_part, tasks_of
from crysdistill.studies.statistics.coverage import LEVELS, calibration
from crysdistill.studies.tables import ResultGroup

NONE = (
    "No arm predicts an uncertainty, so there is no calibration to show; ensembles of "
    "three or more networks do."
)

_CLOSE = 0.05  # of a nominal share: an interval that holds this much more or less
_SAID = 6
_MARKERS = "osD^vP"
_CURVE = tuple(round(0.05 * place, 2) for place in range(1, 20))

Curves = dict[str, tuple[float, ...]]


def calibrated(
    predictions: pd.DataFrame, groups: Sequence[ResultGroup]
) -> Section | None:
    """Return the coverage of the intervals of each arm; None if no arm has any.

    Args:
        predictions: columns `arm, target, prediction, truth, sd` and others of
            `predictions_sections`; also `sd_factor`, by which validation says that the
            deviations should be multiplied.
        groups: the groups from `result_groups`.
    """
    if "sd" not in predictions:
        return None
    rows: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    for of_task in tasks_of(groups):
        part, group, _ = judged_part(predictions, of_task)
        if group.metric != "mae":
            continue
        found, curves = _task(part, group)
        rows += found
        if curves:
            name = stem("calibration", group.name)
            pictures.append(Picture(name, reliability_figure(curves, group.name)))
    if not rows:
        return None
    several = len({row["task"] for row in rows}) > 1
    columns = [
        *([Column("Task", lambda r: r["task"])] if several else []),
        Column("Arm", _name, word=True),
        *(Column(f"Within {_percent(level)}", _covered(level)) for level in LEVELS),
        Column(
            f"Width of {_percent(LEVELS[-1])}",
            lambda r: f"{r['width']:.3g} {r['unit']}".rstrip(),
        ),
        Column("Rank correlation", lambda r: number(r["correlation"], 2)),
        Column("Predictions", lambda r: f"{r['predictions']:,}"),
    ]
    said = [_said(row, several) for row in rows if row["factor"] is None]
    return Section(
        "Calibration",
        note="An ensemble's standard deviation is that of its networks' predictions; a "
        "Gaussian process predicts its own. Intervals assume a normal distribution. "
        "The table shows how many test crystals lie within them, their mean width, and "
        "how well the deviation ranks the errors. A scaled arm multiplies its "
        "deviations by one number, so that one deviation covers 68 % of the "
        "validation crystals.",
        said=said[:_SAID],
        exhibits=[exhibit("calibration", "Coverage of intervals", rows, columns)],
        pictures=pictures,
    )


def _task(
    part: pd.DataFrame, group: ResultGroup
) -> tuple[list[dict[str, Any]], Curves]:
    rows: list[dict[str, Any]] = []
    curves: Curves = {}
    numbers_ = part[["prediction", "truth", "sd"]].astype(float)
    part = part.loc[pd.Series(np.isfinite(numbers_).all(axis=1))]
    for arm in [row.arm for row in group.rows if (part["arm"] == row.arm).any()]:
        mine = part[part["arm"] == arm]
        errors = (mine["prediction"] - mine["truth"]).to_numpy(float)
        sd = mine["sd"].to_numpy(float)
        factors = mine.get("sd_factor", pd.Series(np.nan, index=mine.index))
        kinds: list[tuple[np.ndarray, float | None]] = [(sd, None)]
        if factors.notna().all():
            kinds.append((sd * factors.to_numpy(float), float(factors.mean())))
        for deviations, factor in kinds:
            found = calibration(errors, deviations)
            row = {
                "task": group.name, "labels": group.labels, "arm": arm,
                "factor": factor,
                **{_key(n): c for n, c in zip(LEVELS, found.coverage, strict=True)},
                "width": found.width, "unit": group.unit,
                "correlation": found.correlation, "predictions": found.crystals,
            }  # fmt: skip
            rows.append(row)
            curves[_name(row)] = calibration(errors, deviations, _CURVE).coverage
    return rows, curves


def reliability_figure(curves: Curves, title: str) -> Markup:
    """Draw the share of truths in intervals against their nominal share.

    Args:
        curves: by name, one share for each nominal share of 5, 10, ... 95 %.
        title: above the figure.
    """
    figure, ax = canvas(4.1, 4.3)
    ax.plot([0, 100], [0, 100], color=COLOURS["muted"], lw=1, ls=(0, (4, 3)))
    for place, (name, shares) in enumerate(curves.items()):
        colour, marker = COLOURS[f"series-{place % 6 + 1}"], _MARKERS[place % 6]
        style: dict[str, Any] = {
            "color": colour,
            "lw": 1.7,
            "marker": marker,
            "ms": 3.5,
        }
        ax.plot(
            100 * np.array(_CURVE),
            100 * np.array(shares),
            label=short(name, 34),
            **style,
        )
    ax.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    ax.set(xlabel="nominal share (%)", ylabel="test crystals within (%)")
    ax.grid(color=COLOURS["line"], lw=0.7)
    ax.text(96, 3, "too sure", ha="right", va="bottom", color=COLOURS["muted"])
    ax.text(4, 97, "too unsure", ha="left", va="top", color=COLOURS["muted"])
    headline(ax, title)
    legend(figure, ax)
    return svg(figure, f"coverage of intervals: {title}")


def _name(row: Mapping[str, Any]) -> str:
    if row["factor"] is None:
        return str(row["arm"])
    return f"{row['arm']}, scaled by {row['factor']:.2g}"


def _covered(level: float) -> Any:
    return lambda row: f"{100 * row[_key(level)]:.0f} %"


def _key(level: float) -> str:
    return f"within_{100 * level:.0f}"


def _percent(level: float) -> str:
    return f"{100 * level:.0f}\u00a0%"  # a head that breaks before "%" is hard to read


def _said(row: Mapping[str, Any], several: bool) -> str:
    share = row[_key(0.9)]
    verdict = "as they should, within 5 points"
    if abs(share - 0.9) > _CLOSE:
        verdict = "they are too narrow" if share < 0.9 else "they are too wide"
    where = f"{row['task']}: the" if several else "The"
    return (
        f"{where} 90 % intervals of {row['arm']} hold {100 * share:.0f} % of the test "
        f"crystals: {verdict}."
    )
