"""Numbers as people write them: true minus signs, percent, intervals, p values."""

from __future__ import annotations

import math


def number(value: float, decimals: int) -> str:
    """Return a number with a true minus sign, or a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(value: float) -> str:
    """Return a signed change in percent, without the percent sign."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:+.{0 if abs(value) >= 100 else 1}f}"
    return text.replace("-", "−")


def span(interval: tuple[float, float], decimals: int) -> str:
    """Return an interval, or a dash where there is none."""
    if not all(map(math.isfinite, interval)):
        return "–"
    return " to ".join(number(end, decimals) for end in interval)


def percent_span(interval: tuple[float, float]) -> str:
    """Return an interval of changes in percent, or a dash where there is none."""
    if not all(map(math.isfinite, interval)):
        return "–"
    return " to ".join(percent(end) for end in interval)


def p_text(p: float) -> str:
    """Return a p value, or a dash for NaN."""
    if not math.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 seed`, `5 seeds`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
