"""Learning curves: their exponent, and how many labels an arm saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize

from crysdistill.errors import InputError
from crysdistill.studies.statistics.intervals import Interval, check_confidence
from crysdistill.studies.statistics.results import (
    GROUP,
    check_results,
    comparable,
    higher_is_better,
)

_CURVE = [name for name in GROUP if name != "labels"]
_DRAWS = 500


class PowerLaw(NamedTuple):
    """error = a n^-b + c, for n labels."""

    a: float
    b: float
    c: float

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Return the error for numbers of labels."""
        return self.a * labels**-self.b + self.c


def fit_power_law(
    labels: np.ndarray, errors: np.ndarray, floor: bool = False
) -> PowerLaw:
    """Fit error = a n^-b by least squares of logarithms, or with a floor c >= 0.

    Args:
        labels: numbers of labels, (n,), at least two of them different.
        errors: positive errors, (n,).
        floor: whether to fit c as well; this needs four numbers of labels.

    Raises:
        InputError: there are too few numbers, or one is not positive.
    """
    n, e = np.asarray(labels, float), np.asarray(errors, float)
    need = 4 if floor else 2
    if len(np.unique(n)) < need:
        raise InputError(
            f"a learning curve needs {need} numbers of labels, not {len(np.unique(n))}"
        )
    if not (n > 0).all() or not (e > 0).all():
        raise InputError("a learning curve needs positive labels and errors")
    slope, start = np.polyfit(np.log(n), np.log(e), 1)
    plain = PowerLaw(float(np.exp(start)), float(-slope), 0.0)
    if not floor:
        return plain

    def misfit(parameters: np.ndarray) -> np.ndarray:
        log_a, b, c = parameters
        return np.log(np.exp(log_a) * n**-b + c) - np.log(e)

    first = [np.log(plain.a), max(plain.b, 0.01), 0.1 * e.min()]
    ends = ([-np.inf, 0, 0], [np.inf, np.inf, e.min()])
    log_a, b, c = optimize.least_squares(misfit, first, bounds=ends, xtol=1e-12).x
    return PowerLaw(float(np.exp(log_a)), float(b), float(c))


def labels_needed(labels: np.ndarray, errors: np.ndarray, error: float) -> float:
    """Return how many labels a learning curve needs for an error.

    The curve is straight between its points on logarithmic axes; where the error rises
    with labels, its smallest value so far counts.

    Args:
        labels: ascending numbers of labels, (n,).
        errors: the errors, (n,).
        error: the error to reach.

    Returns:
        The number; infinity if the curve never reaches the error, 0 if it is below the
        error from the start.
    """
    sizes, curve = np.asarray(labels, float), np.asarray(errors, float)
    return float(_needed(sizes, curve[None], np.array([[error]]))[0, 0])


def _needed(labels: np.ndarray, curves: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the labels that curves (D, L) need for errors (D, K), as (D, K)."""
    lowest = np.minimum.accumulate(curves, axis=1)
    reached = lowest[:, None, :] <= errors[:, :, None]  # (D, K, L)
    after = np.maximum(reached.argmax(axis=2), 1)  # (D, K)
    before, end = (
        np.log(np.take_along_axis(lowest, place, axis=1))
        for place in (after - 1, after)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (before - np.log(errors)) / (before - end)
    share = np.nan_to_num(share, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 1)
    x = np.log(labels)
    found = np.exp(x[after - 1] + share * (x[after] - x[after - 1]))
    found[errors > lowest[:, :1]] = 0.0
    found[~reached.any(axis=2)] = np.inf
    return found


def label_efficiency(
    results: pd.DataFrame, reference: str = "scratch", confidence: float = 0.95
) -> pd.DataFrame:
    """Return how many times as many labels the reference needs for the same error.

    The interval is a bootstrap over the seeds that all runs of the reference and the
    arm have. The error of a metric of which more is better is 1 minus it.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics.results`.
        reference: the arm whose learning curve is the measure.
        confidence: the confidence level.

    Returns:
        Columns `task, target, unit, metric, condition, arm, labels, seeds`, `needed`
        (labels that the reference needs), `factor` (needed over labels), `low` and
        `high`. Infinity means more than the study tried, 0 fewer; the interval is NaN
        for one seed. Tasks with one number of labels have no row.

    Raises:
        InputError: see `check_results`.
    """
    check_confidence(confidence)
    rows: list[dict[str, Any]] = []
    for key, curves in _curves(check_results(results, reference)):
        base = curves.pop(reference, None)
        if base is None or base.shape[1] < 2:
            continue
        for arm, mine in curves.items():
            seeds = base.index.intersection(mine.index)
            sizes = [n for n in mine.columns if n in base.columns]
            if not len(seeds) or not sizes:
                continue
            own = base.loc[seeds].to_numpy(float)  # (S, L)
            other = mine.loc[seeds, sizes].to_numpy(float)
            x, drawn = base.columns.to_numpy(float), _drawn(len(seeds))
            needed = _needed(x, own.mean(axis=0)[None], other.mean(axis=0)[None])[0]
            many = _needed(x, own[drawn].mean(axis=1), other[drawn].mean(axis=1))
            for place, labels in enumerate(sizes):
                ends = _ends(many[:, place] / labels, confidence)
                about = {"arm": arm, "labels": labels, "seeds": len(seeds)}
                found = {"needed": needed[place], "factor": needed[place] / labels}
                rows.append({**key, **about, **found, "low": ends[0], "high": ends[1]})
    columns = [*_CURVE, "arm", "labels", "seeds", "needed", "factor", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def learning_exponents(
    results: pd.DataFrame, reference: str = "scratch", confidence: float = 0.95
) -> pd.DataFrame:
    """Fit the learning curve of each arm: error = a n^-b, and with a floor c.

    Args:
        results: one row for each run; see `crysdistill.studies.statistics.results`.
        reference: the arm that sets the conditions; see `check_results`.
        confidence: the level of the interval, a bootstrap over seeds.

    Returns:
        Columns `task, target, unit, metric, condition, arm, sizes` (numbers of labels),
        `a`, `b`, `b_low`, `b_high` and, if there are four numbers of labels, `b_floor`
        and `c` of the fit with a floor. Arms with one number of labels have no row.

    Raises:
        InputError: see `check_results`.
    """
    check_confidence(confidence)
    rows: list[dict[str, Any]] = []
    for key, curves in _curves(check_results(results, reference)):
        for arm, values in curves.items():
            labels = values.columns.to_numpy(float)
            errors = values.to_numpy(float)  # (S, L)
            means = errors.mean(axis=0)
            if len(labels) < 2 or not (means > 0).all():
                continue
            law = fit_power_law(labels, means)
            drawn = np.log(errors[_drawn(len(errors))].mean(axis=1))  # (D, L)
            slopes = -np.polyfit(np.log(labels), drawn.T, 1)[0]
            low, high = _ends(slopes, confidence)
            if len(errors) < 2:
                low, high = Interval(np.nan, np.nan)
            bent = fit_power_law(labels, means, floor=True) if len(labels) > 3 else None
            rows.append(
                {
                    **key,
                    "arm": arm,
                    "sizes": len(labels),
                    "a": law.a,
                    "b": law.b,
                    "b_low": low,
                    "b_high": high,
                    "b_floor": bent.b if bent else np.nan,
                    "c": bent.c if bent else np.nan,
                }
            )
    columns = [*_CURVE, "arm", "sizes", "a", "b", "b_low", "b_high", "b_floor", "c"]
    return pd.DataFrame(rows, columns=columns)


def _curves(
    table: pd.DataFrame,
) -> Iterator[tuple[dict[str, Any], dict[str, pd.DataFrame]]]:
    """Yield for each task the errors of every arm, (seeds, numbers of labels)."""
    for key, group in comparable(table[np.isfinite(table["value"])], apart=False):
        if higher_is_better(key["metric"]):
            group = group.assign(value=1 - group["value"])
        wide = group.pivot_table("value", ["arm", "fold", "seed"], "labels", sort=True)
        arms = list(group["arm"].unique())
        found = {arm: wide.loc[arm].dropna(axis=1, how="all") for arm in arms}
        whole = {arm: curve.dropna() for arm, curve in found.items()}
        yield key, {arm: curve for arm, curve in whole.items() if len(curve)}


def _drawn(seeds: int) -> np.ndarray:
    """Return seeds drawn with replacement, (D, S)."""
    return np.random.default_rng(0).integers(seeds, size=(_DRAWS, seeds))


def _ends(values: np.ndarray, confidence: float) -> Interval:
    """Return quantiles of a bootstrap; they are among its values, for some are inf."""
    ordered = np.sort(values)
    cut = int(np.floor((1 - confidence) / 2 * len(ordered)))
    return Interval(float(ordered[cut]), float(ordered[len(ordered) - 1 - cut]))
