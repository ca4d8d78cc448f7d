"""The base of all figures in the report: colours, an empty figure, and the SVG text.

A figure is drawn in stand-in colours. CSS variables of the page then replace them, so
that one file is readable on light, dark and printed pages. Text stays text.
"""

from __future__ import annotations

import hashlib
import io
import re
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

COLOURS = {
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
"""Stand-in colours, by the name of the CSS variable that replaces each."""


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure, in inches, in the page's colours, outside pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    ax = figure.add_subplot(facecolor="none")
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=COLOURS["muted"], lw=0.8)
    ax.tick_params(color=COLOURS["muted"], labelcolor=COLOURS["muted"], labelsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=COLOURS["muted"], fontsize=9.5)
    return figure, ax


def plain_log_axis(ax: Axes) -> None:
    """Write 0.2 and not a power of ten beside a logarithmic axis."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def short(name: str, most: int = 22) -> str:
    """Return a name that fits beside an axis, for matplotlib to draw."""
    return plain(name if len(name) <= most else name[: most - 1] + "…")


def plain(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def headline(ax: Axes, title: str) -> None:
    """Write a title above the axes, at their left end."""
    style: dict[str, Any] = {"fontsize": 10.5, "fontweight": "bold"}
    ax.set_title(short(title, 40), loc="left", color=COLOURS["ink"], **style)


def legend(figure: Figure, ax: Axes) -> None:
    """Name the lines above the axes, if any has a name."""
    handles, names = ax.get_legend_handles_labels()
    if not handles:
        return
    style: dict[str, Any] = {
        "frameon": False,
        "fontsize": 9.5,
        "labelcolor": COLOURS["ink"],
    }
    spacing: dict[str, Any] = {"columnspacing": 1.4, "handlelength": 1.6}
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": min(len(names), 4)}
    figure.legend(handles, names, **place, **style, **spacing)


def svg(figure: Figure, title: str) -> Markup:
    """Return a figure as a self-contained SVG element."""
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
    # Ids must be unique on the page, so two figures must not share them.
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', text)
    text = text.replace("url(#", f"url(#{prefix}")
    for name, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    return Markup(text)
