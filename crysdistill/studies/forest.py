"""Figures of changes with their intervals, one below the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from crysdistill.studies.canvas import COLOURS, canvas, legend, plain, short, svg

_WIDTH = 5.4
_MARKERS = "oDs^vPX"


@dataclass(frozen=True)
class Change:
    """A change in percent with its interval.

    Args:
        row: the name beside the axis.
        series: the name in the legend; "" for none.
        middle: the change.
        ends: its interval.
        tone: the colour, if there is one series.
    """

    row: str
    series: str
    middle: float
    ends: tuple[float, float]
    tone: str = "none"


def forest_figure(changes: Sequence[Change], title: str) -> Markup:
    """Draw changes with their intervals; several series share a row.

    Changes that are far beyond all others become arrows at the edge.

    Args:
        changes: at least one, rows in the order in which they come.
        title: the name of the number.
    """
    rows = list(dict.fromkeys(change.row for change in changes))
    series = list(dict.fromkeys(change.series for change in changes))
    step = 0.7 / len(series)
    height = max(0.3, 0.14 * len(series) + 0.1)
    figure, ax = canvas(_WIDTH, 1.0 + height * len(rows) + 0.2 * (len(series) > 1))
    reach = _reach(changes)
    ax.axvline(0, color=COLOURS["reference"], lw=1, ls=(0, (4, 3)), zorder=1)
    for number, name in enumerate(series):
        colour = COLOURS[f"series-{number % 6 + 1}"]
        mine = [c for c in changes if c.series == name]
        for c in mine:
            y = rows.index(c.row) + (number - (len(series) - 1) / 2) * step
            own = colour if len(series) > 1 else COLOURS[c.tone]
            if abs(c.middle) > reach:
                side: dict[str, Any] = {"ha": "right" if c.middle > 0 else "left"}
                said = (
                    f"{c.middle:+.0f} % →" if c.middle > 0 else f"← {c.middle:+.0f} %"
                )
                x = math.copysign(reach, c.middle)
                ax.text(x, y, said, color=own, va="center", fontsize=9, **side)
                continue
            low, high = (float(np.clip(end, -reach, reach)) for end in c.ends)
            ax.plot((low, high), (y, y), color=own, lw=2, solid_capstyle="butt")
            marker = _MARKERS[number % len(_MARKERS)]
            ax.plot(c.middle, y, marker, color=own, ms=6, mec=COLOURS["surface"])
        if len(series) > 1:
            marker = _MARKERS[number % len(_MARKERS)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "ls": ""}
            ax.plot([], [], label=short(name, 30), **style)
    ax.set(xlim=(-1.04 * reach, 1.04 * reach), ylim=(len(rows) - 0.45, -0.55))
    ax.set_xlabel(plain(title))
    ax.set_yticks(range(len(rows)), [short(name, 26) for name in rows])
    ax.tick_params(axis="y", length=0, labelsize=9.5, labelcolor=COLOURS["ink"])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", color=COLOURS["line"], lw=0.7)
    ax.set_axisbelow(True)
    legend(figure, ax)
    return svg(figure, title)


def _reach(changes: Sequence[Change]) -> float:
    """Return a distance from 0 that shows all changes but those far from the rest.

    A fall by up to 100 percent is always shown: the best arms have it.
    """
    ends = np.array([[c.middle, *c.ends] for c in changes])
    far = np.nanmax(np.abs(ends), axis=1)
    typical = float(np.median([f for f in far if f > 0] or [1.0]))
    kept = far[np.abs(ends[:, 0]) <= 4 * typical]
    usual = float(kept.max()) if len(kept) and kept.max() > 0 else typical
    return max(usual, min(100.0, -float(np.nanmin(ends[:, 0]))))
