"""The base of all figures in the report: colours, an empty figure, and the SVG text.

A figure is drawn in stand-in colours. CSS variables of the page then replace them, so
that one file is readable on light, dark and printed pages. Text stays text.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
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
    """Return a name that fits beside an axis, for matplotlib to draw.

    The middle goes: the ends are what tells the variants of an arm apart.
    """
    if len(name) > most:
        end = most // 2
        name = f"{name[: most - 1 - end]}…{name[-end:]}"
    return plain(name)


def show_means(ax: Axes, means: Sequence[float]) -> None:
    """Cut a vertical axis where wide bands would squeeze the means.

    Args:
        ax: with bands and lines drawn.
        means: of the lines.
    """
    low, high = min(means), max(means)
    room = 0.6 * (high - low) or 0.1 * abs(high) or 1.0
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, low - room), min(top, high + room))


def plain(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def headline(ax: Axes, title: str, most: int = 40) -> None:
    """Write a title above the axes, at their left end."""
    style: dict[str, Any] = {"fontsize": 10.5, "fontweight": "bold"}
    ax.set_title(short(title, most), loc="left", color=COLOURS["ink"], **style)


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
    wide = 12 * figure.get_figwidth() / (6 + max(map(len, names)))  # by characters
    columns = max(1, min(len(names), 4, int(wide)))
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": columns}
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


def alone(picture: str) -> str:
    """Return a picture of the page as a file of its own, in the colours of print.

    Args:
        picture: what `svg` returned.
    """
    spaces = (
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    )
    plain_text = str.__str__(picture)  # markup would escape what is put into it
    text = plain_text.replace("<svg ", f"<svg {spaces} ", 1)
    fonts = "DejaVu Sans, Arial, sans-serif"
    for name, colour in {**_light(), "font": fonts}.items():
        text = text.replace(f"var(--{name})", colour)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


@cache
def _light() -> dict[str, str]:
    """Return the colours of the page on white, from its style sheet."""
    sheet = resources.files("crysdistill.studies").joinpath("style.css.j2")
    first = sheet.read_text("utf-8").partition("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", first))
