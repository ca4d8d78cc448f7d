"""The template of the page, and values as it writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from crysdistill.studies import numbers
from crysdistill.studies.sections.costs import duration


def render(**content: Any) -> str:
    """Return the page of a report.

    Args:
        content: the variables of `report.html.j2`.
    """
    return _environment().get_template("report.html.j2").render(**content)


def _environment() -> Environment:
    """Return the templates, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("crysdistill.studies", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "percent", "span", "percent_span")
    environment.filters |= {name: getattr(numbers, name) for name in names}
    environment.filters |= {"value": _value, "code": _code, "words": _words}
    return environment


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value(value: Any, name: str = "") -> str:
    """Return a fact as text."""
    if name == "duration" and isinstance(value, int | float):
        return duration(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:.6g}" if math.isfinite(value) else "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(k)} {_value(v, k)}" for k, v in value.items())
    if isinstance(value, list | tuple | set | np.ndarray):
        return ", ".join(_value(v) for v in value) or "–"
    return str(value)


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _code(text: str) -> Markup:
    """Return text with its commands, between backticks or alone, set as code."""
    commands = ("crysdistill ", "make ", "python ", "pip ")
    if text.startswith(commands) and "`" not in text:
        text = f"`{text}`"
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    shown = [
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    ]
    return Markup("").join(shown)
