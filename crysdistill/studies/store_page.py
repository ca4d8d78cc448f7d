"""The content of a store as one self-contained HTML page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from crysdistill.corpus.inspection import Inspection
from crysdistill.errors import InputError
from crysdistill.files import writable
from crysdistill.structures.elements import symbols
from crysdistill.structures.symmetry import CRYSTAL_SYSTEMS
from crysdistill.studies.canvas import COLOURS, canvas, headline, plain, svg

_NOBLE = (0, 2, 10, 18, 36, 54, 86, 118)
_BINS = 50
_WIDE = 20  # values that span this factor are drawn on a logarithmic axis


def write_page(inspection: Inspection, path: str | Path) -> Path:
    """Write the page and return its path.

    Args:
        inspection: the result of `inspect`.
        path: the HTML file; missing folders are made.

    Raises:
        InputError: the path is a folder, or the store itself.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of an HTML file")
    path.parent.mkdir(parents=True, exist_ok=True)
    writable(path, [inspection.store])
    environment = Environment(
        loader=PackageLoader("crysdistill.studies", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = _pictures(inspection)
    text = environment.get_template("inspection.html.j2").render(
        title=inspection.store.name,
        facts=inspection.facts,
        sections=[(s, pictures.get(s.title, [])) for s in inspection.sections],
    )
    path.write_text(text, encoding="utf-8")
    return path


def _pictures(inspection: Inspection) -> dict[str, list[Markup]]:
    """Return the pictures below each table."""
    pictures = {
        "Sizes": _histograms(inspection.sizes),
        "Properties": _histograms(inspection.properties),
        "Crystal systems": [systems_figure(inspection.systems)],
    }
    if inspection.element_counts.any():
        pictures["Elements"] = [elements_figure(inspection.element_counts)]
    return pictures


def _histograms(columns: Mapping[str, np.ndarray]) -> list[Markup]:
    return [histogram(v, name) for name, v in columns.items() if np.isfinite(v).any()]


def histogram(values: np.ndarray, name: str) -> Markup:
    """Draw a histogram of crystals, on a logarithmic axis if the range is wide.

    Args:
        values: one value for each crystal; values that are not finite are left out.
        name: the name of the values.
    """
    known = values[np.isfinite(values)].astype(float)
    low, high = float(known.min()), float(known.max())
    far = low > 0 and high > _WIDE * low
    whole = np.array_equal(known, np.round(known))
    if far:
        edges = np.geomspace(low, high, _BINS + 1)
        if whole:
            # Bins without an integer would show as gaps; join them with the next.
            edges = np.unique(np.append(np.ceil(edges - 0.5) - 0.5, high + 0.5))
    elif whole and high - low < _BINS:
        edges = np.arange(low - 0.5, high + 1)
    else:
        edges = np.histogram_bin_edges(known, _BINS)
    counts, edges = np.histogram(known, edges)
    figure, ax = canvas(5.4, 2.5)
    style: dict[str, Any] = {"color": COLOURS["series-1"], "linewidth": 0}
    ax.bar(edges[:-1], counts, np.diff(edges), align="edge", **style)
    if far:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set(ylabel="crystals", xlabel=plain(name))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    ax.grid(axis="y", color=COLOURS["line"], lw=0.7)
    ax.set_axisbelow(True)
    return svg(figure, f"histogram of {name}")


def systems_figure(counts: np.ndarray) -> Markup:
    """Draw the number of crystals in each crystal system.

    Args:
        counts: (7,), in the order of `CRYSTAL_SYSTEMS`.
    """
    figure, ax = canvas(5.4, 2.5)
    ax.barh(CRYSTAL_SYSTEMS, counts, color=COLOURS["series-1"], height=0.7)
    ax.invert_yaxis()
    ax.set(xlabel="crystals")
    ax.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.grid(axis="x", color=COLOURS["line"], lw=0.7)
    ax.set_axisbelow(True)
    return svg(figure, "crystals of each crystal system")


def elements_figure(counts: np.ndarray) -> Markup:
    """Draw the periodic table; a darker element occurs in more crystals.

    Shades are logarithmic, so that rare elements differ from absent ones.

    Args:
        counts: (101,) crystals that hold each element, by atomic number.
    """
    figure, ax = canvas(10.2, 5.4)
    ax.set_axis_off()
    top = np.log1p(counts.max())
    for number in range(1, len(counts)):
        row, column = table_place(number)
        count = int(counts[number])
        shade = 0.12 + 0.78 * float(np.log1p(count) / top) if count else 0.0
        box = (column + 0.03, row + 0.03)
        fill = Rectangle(box, 0.94, 0.94, fc=COLOURS["series-1"], alpha=shade, lw=0)
        frame = Rectangle(box, 0.94, 0.94, fc="none", ec=COLOURS["line"], lw=0.8)
        for patch in (fill, frame) if count else (frame,):
            ax.add_patch(patch)
        # On a dark shade, text in the page's background colour is easy to read.
        word = "surface" if shade > 0.75 else "ink" if count else "muted"
        style: dict[str, Any] = {"ha": "center", "color": COLOURS[word]}
        ax.text(column + 0.5, row + 0.5, symbols()[number], fontsize=11, **style)
        if count:
            ax.text(column + 0.5, row + 0.83, _brief(count), fontsize=7, **style)
    ax.set(xlim=(0, 18), ylim=(9.4, 0), aspect="equal")
    headline(ax, "crystals that hold the element")
    return svg(figure, "periodic table, shaded by the crystals that hold each element")


def table_place(number: int) -> tuple[float, int]:
    """Return the row and column, from 0, of an element in the usual periodic table.

    The lanthanides and actinides stand in two rows of their own below.
    """
    period = next(p for p, last in enumerate(_NOBLE) if number <= last)
    place = number - _NOBLE[period - 1]  # from 1 within the period
    length = _NOBLE[period] - _NOBLE[period - 1]
    if place <= 2 and number != 2:
        return period - 1, place - 1
    if length == 32 and place <= 17:  # La-Lu and Ac-Lr
        return period + 1.3, place - 1
    return period - 1, 18 - length + place - 1


def _brief(count: int) -> str:
    """Return a count in a few characters: 12,345 is 12k."""
    for size, letter in ((10**6, "M"), (1000, "k")):
        if count >= size:
            return f"{count / size:.{int(count < 10 * size)}f}{letter}"
    return str(count)
