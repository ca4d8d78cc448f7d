"""Statistics over seeds: means, intervals and paired comparisons of arms.

Results are a tidy table with one row for each run. Its columns are `arm`, `target`,
`metric`, `labels` (number of training labels), `seed` and `value` (on test), and
optionally `unit` and `validation`. Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from crysdistill.errors import InputError, did_you_mean

REQUIRED = ("arm", "target", "metric", "labels", "seed", "value")
"""The columns that results must have."""

HIGHER_IS_BETTER = {"mae": False, "auc": True, "accuracy": True, "score": False}
"""The metrics of runs, and whether higher values are better."""

BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
ONE_SEED = "one seed: no verdict"
NO_PAIR = "no common seed: no verdict"

_GROUP = ["target", "unit", "metric", "labels"]


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval; NaN if there is none."""

    low: float
    high: float


def check_results(results: pd.DataFrame) -> pd.DataFrame:
    """Return results with all columns that the statistics need, in plain types.

    Args:
        results: one row for each run; see the top of this module.

    Returns:
        A copy with `unit` ("" if absent) and `validation` (NaN if absent).

    Raises:
        InputError: a column is missing, there is no row, a metric is unknown, a target
            has two units, a value is not a number, or two rows describe the same run.
    """
    columns = [str(name) for name in results.columns]
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        hint = did_you_mean(missing[0], [c for c in columns if c not in REQUIRED])
        hint = hint.replace("did you mean", "is it the column")
        names = " and ".join(f"`{name}`" for name in missing)
        raise InputError(
            f"the results lack {names}; they need the columns "
            f"{', '.join(REQUIRED)}{hint}"
        )
    if results.empty:
        raise InputError("the results have no row; run at least one arm")
    table = results.copy().reset_index(drop=True)
    for name, default in (("unit", ""), ("validation", np.nan)):
        if name not in columns:
            table[name] = default
    table["unit"] = table["unit"].astype(object).fillna("").astype(str)
    for name in ("arm", "target", "metric"):
        table[name] = table[name].astype(str)
    for name in ("value", "validation", "labels"):
        try:
            table[name] = pd.to_numeric(table[name])
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the column `{name}` must hold numbers: {error}"
            ) from None
    if table["labels"].isna().any():
        raise InputError(
            "the column `labels` has gaps; give the number of training labels"
        )
    for metric in table["metric"].unique():
        higher_is_better(metric)
    for (target, _), part in table.groupby(["target", "metric"]):
        units = list(part["unit"].unique())
        if len(units) > 1:
            raise InputError(
                f"the target `{target}` has the units {', '.join(map(repr, units))}; "
                "convert its values to one of them"
            )
    run = [*_GROUP, "arm", "seed"]
    twice = table[table.duplicated(run)]
    if not twice.empty:
        row = twice.iloc[0]
        raise InputError(
            f"the arm `{row.arm}` has seed {row.seed} twice for `{row.target}` with "
            f"{row.labels} labels; keep one row for each run"
        )
    return table


def higher_is_better(metric: str) -> bool:
    """Return whether higher values of a metric are better.

    Raises:
        InputError: the metric is not known.
    """
    if metric not in HIGHER_IS_BETTER:
        raise InputError(
            f"unknown metric `{metric}`; choose one of {', '.join(HIGHER_IS_BETTER)}"
            f"{did_you_mean(metric, HIGHER_IS_BETTER)}"
        )
    return HIGHER_IS_BETTER[metric]


def t_interval(
    values: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
) -> Interval:
    """Return Student's confidence interval of a mean.

    Args:
        values: a sample, (n,).
        confidence: the probability that such an interval contains the true mean.

    Returns:
        The interval in the unit of the values; NaN for n < 2.

    Raises:
        InputError: the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError(f"`confidence` is {confidence} but must be between 0 and 1")
    if len(values) < 2:
        return Interval(float("nan"), float("nan"))
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    mean = float(np.mean(values))
    return Interval(mean - float(half), mean + float(half))


def holm(p_values: Sequence[float] | np.ndarray | np.ndarray) -> np.ndarray:
    """Return p values corrected for the number of tests, (n,).

    Source: S. Holm, Scandinavian Journal of Statistics 6, 65-70 (1979),
    https://www.jstor.org/stable/4615733.

    Args:
        p_values: one for each test. NaN marks a test that could not be made; it stays
            NaN and does not count.
    """
    p = np.asarray(p_values, float)
    corrected = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def summarise(results: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Summarise each arm, for each target, metric and number of labels.

    Args:
        results: one row for each run; see the top of this module.
        confidence: the confidence level of the interval.

    Returns:
        Columns `target, unit, metric, labels, arm`, `n` (runs), `failed` (runs without
        a finite value, which the rest leaves out), `mean`, `sd` (between seeds, n - 1),
        `ci_low`, `ci_high` (t interval of the mean), `best`, `worst` and `validation`
        (mean selected value). Targets and arms keep their order, labels ascend. With
        one run, `sd` and the interval are NaN.

    Raises:
        InputError: see `check_results` and `t_interval`.
    """
    rows = []
    for key, group in _groups(check_results(results)):
        for arm, runs in group.groupby("arm", sort=False):
            finite = runs[np.isfinite(runs["value"])]
            values = finite["value"].to_numpy(float)
            ends = values.min(initial=np.inf), values.max(initial=-np.inf)
            best, worst = ends[::-1] if higher_is_better(key["metric"]) else ends
            interval = t_interval(values, confidence)
            rows.append(
                {
                    **key,
                    "arm": arm,
                    "n": len(values),
                    "failed": len(runs) - len(values),
                    "mean": values.mean() if len(values) else np.nan,
                    "sd": values.std(ddof=1) if len(values) > 1 else np.nan,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "best": best if len(values) else np.nan,
                    "worst": worst if len(values) else np.nan,
                    "validation": finite["validation"].mean(),
                }
            )
    return pd.DataFrame(rows)


def compare_paired(
    results: pd.DataFrame,
    reference: str = "scratch",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Compare every other arm with the reference, over the seeds that both have.

    Runs of one seed share the split, so a paired t test judges their differences.
    Holm's correction counts all arms of the same target, metric and number of labels.

    Args:
        results: one row for each run; see the top of this module.
        reference: the arm that the others are compared with.
        confidence: the level of the intervals; p values are compared with 1 minus it.

    Returns:
        One row for each other arm, with the columns `target, unit, metric, labels, arm,
        reference`; `n` (pairs), `unpaired` (runs of the arm without a partner or a
        finite value), `mean` and `reference_mean` (over the pairs); `difference` (arm
        minus reference), `sd_difference`, `ci_low`, `ci_high`; the same in percent of
        the reference's mean, which counts as exact: `change`, `change_low`,
        `change_high`; `wins` (pairs in which the arm is better), `p`, `p_holm`;
        `verdict` ("better" or "worse" if the interval excludes 0, else "no difference
        shown"; another text if one seed allows no verdict) and `holds` (whether a
        "better" or "worse" still holds after Holm's correction).

    Raises:
        InputError: the reference has no run; see also `check_results`, `t_interval`.
    """
    table = check_results(results)
    arms = list(table["arm"].unique())
    if reference not in arms:
        raise InputError(
            f"no run has the reference arm `{reference}`; the arms are "
            f"{', '.join(arms)}{did_you_mean(reference, arms)}"
        )
    rows: list[dict[str, Any]] = []
    for key, group in _groups(table):
        runs = group[np.isfinite(group["value"])].set_index("seed")
        values = {arm: part["value"] for arm, part in runs.groupby("arm", sort=False)}
        empty = pd.Series(dtype=float)
        other = values.get(reference, empty)
        compared = []
        for arm, part in group.groupby("arm", sort=False):
            if arm == reference:
                continue
            mine = values.get(arm, empty)
            common = mine.index.intersection(other.index)
            row = _pairs(
                mine.loc[common].to_numpy(float),
                other.loc[common].to_numpy(float),
                higher_is_better(key["metric"]),
                confidence,
            )
            unpaired = len(part) - len(common)
            head = {"arm": arm, "reference": reference, "unpaired": unpaired}
            compared.append({**key, **head, **row})
        corrected = holm([row["p"] for row in compared])
        for row, p in zip(compared, corrected, strict=True):
            decided = row["verdict"] in (BETTER, WORSE)
            rows.append(
                {**row, "p_holm": p, "holds": bool(decided and p < 1 - confidence)}
            )
    columns = (
        "target unit metric labels arm reference n unpaired mean reference_mean "
        "difference sd_difference ci_low ci_high change change_low change_high wins p "
        "p_holm verdict holds"
    )
    return pd.DataFrame(rows, columns=columns.split())


def _groups(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield runs that may be compared: targets in order, labels ascending."""
    found = table[_GROUP].drop_duplicates()
    rank = {target: i for i, target in enumerate(found["target"].unique())}
    found = found.assign(rank=found["target"].map(rank))
    for key in found.sort_values(["rank", "metric", "labels"])[_GROUP].to_dict(
        "records"
    ):
        mask = np.logical_and.reduce([table[name] == key[name] for name in _GROUP])
        yield {str(name): value for name, value in key.items()}, table[mask]


def _pairs(
    values: np.ndarray,
    reference: np.ndarray,
    higher: bool,
    confidence: float,
) -> dict[str, Any]:
    """Compare values, (n,), with those of the reference, (n,)."""
    n = len(values)
    if n == 0:
        return {"n": 0, "wins": 0, "p": np.nan, "verdict": NO_PAIR}
    differences = values - reference
    difference = float(differences.mean())
    low, high = t_interval(differences, confidence)
    scale = abs(float(reference.mean()))
    percent = 100 / scale if scale > 0 else np.nan
    if n == 1:
        verdict = ONE_SEED
    elif low <= 0 <= high:
        verdict = NO_DIFFERENCE
    else:
        verdict = BETTER if (difference > 0) == higher else WORSE
    return {
        "n": n,
        "mean": float(values.mean()),
        "reference_mean": float(reference.mean()),
        "difference": difference,
        "sd_difference": float(differences.std(ddof=1)) if n > 1 else np.nan,
        "ci_low": low,
        "ci_high": high,
        "change": difference * percent,
        "change_low": low * percent,
        "change_high": high * percent,
        "wins": int(((differences > 0) if higher else (differences < 0)).sum()),
        "p": _p_value(differences),
        "verdict": verdict,
    }


def _p_value(differences: np.ndarray) -> float:
    """Return the two-sided p value of a mean difference of zero; NaN for n < 2."""
    if len(differences) < 2:
        return float("nan")
    error = stats.sem(differences)
    if error == 0:  # the same difference in every pair
        return float(differences.mean() == 0)
    t = differences.mean() / error
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))
