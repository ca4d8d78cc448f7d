"""The table of results: one row for each run of a study.

Its columns are `arm`, `target`, `metric`, `labels` (number of training labels), `seed`
and `value` (on test). It may also have `task` (the target if absent), `unit`, `fold`,
`validation`, `processor` (seconds), `run` (the folder), `error` (why a run has no
value) and `test_train` (see `crysdistill.studies.statistics.paired`). Every other
column is a further axis of the study, such as `freeze.convolutions`; it is empty where
it does not apply to the arm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from crysdistill.errors import InputError, did_you_mean

REQUIRED = ("arm", "target", "metric", "labels", "seed", "value")
"""The columns that results must have."""

HIGHER_IS_BETTER = {"mae": False, "auc": True, "accuracy": True, "score": False}
"""The metrics of runs, and whether higher values are better."""

GROUP = ["task", "target", "unit", "metric", "labels", "condition"]
"""Runs with the same values in these columns may be compared."""

_OPTIONAL: dict[str, Any] = {
    "unit": "",
    "validation": np.nan,
    "processor": np.nan,
    "fold": "",
    "run": "",
    "error": "",
    "test_train": np.nan,
}
_MADE = ("task", "method", "condition")
_TEXT = ("task", "arm", "target", "unit", "metric", "fold", "run", "error")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as mappings.

    Args:
        table: any table with names as columns.
    """
    names = [str(name) for name in table.columns]
    return [
        dict(zip(names, row.values(), strict=True)) for row in table.to_dict("records")
    ]


def axes(results: pd.DataFrame) -> list[str]:
    """Return the columns that are further axes of the study."""
    known = {*REQUIRED, *_OPTIONAL, *_MADE}
    return [str(name) for name in results.columns if name not in known]


def check_results(results: pd.DataFrame, reference: str = "scratch") -> pd.DataFrame:
    """Return results with all columns that the statistics need, in plain types.

    An axis along which the reference arm varies, such as `encoder.name`, is a
    condition: arms are compared under the same condition only. An axis along which
    only other arms vary, such as `freeze.convolutions`, is part of their name: `arm`
    becomes `finetuned convolutions=2`. `method` holds the name without axes. Failed
    runs of which not even the number of labels is known are left out.

    Args:
        results: one row for each run; see the top of this module.
        reference: the arm that the others are compared with.

    Returns:
        A copy with all columns. A checked table, which has `method`, stays as it is.

    Raises:
        InputError: a column is missing, there is no row, a metric is unknown, a target
            has two units, a value is not a number, or two rows describe the same run.
    """
    columns = [str(name) for name in results.columns]
    if set(_MADE) <= set(columns):
        return results.reset_index(drop=True)
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
    for name, default in _OPTIONAL.items():
        if name not in columns:
            table[name] = default
    if "task" not in columns:
        table["task"] = table["target"]
    table = _without_unknown_cells(table)
    table["task"] = table["task"].fillna(table["target"])
    for name in _TEXT:
        table[name] = as_texts(table[name])
    for name in ("value", "validation", "labels", "processor", "test_train"):
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
    table["labels"] = _whole(table["labels"])
    table["seed"] = _whole(table["seed"].fillna(0))  # a study over folds may have none
    for metric in table["metric"].unique():
        higher_is_better(metric)
    for (_, target, _), part in table.groupby(["task", "target", "metric"]):
        units = list(part["unit"].unique())
        if len(units) > 1:
            raise InputError(
                f"the target `{target}` has the units {', '.join(map(repr, units))}; "
                "convert its values to one of them"
            )
    table = _named(table, reference)
    twice = table[table.duplicated([*GROUP, "arm", "seed", "fold"])]
    if not twice.empty:
        row = twice.iloc[0]
        fold = f" and fold {row.fold}" if row.fold else ""
        raise InputError(
            f"the arm `{row.arm}` has seed {row.seed}{fold} twice for `{row.target}` "
            f"with {row.labels} labels; keep one row for each run"
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


def comparable(
    table: pd.DataFrame, apart: bool = True
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield runs that may be compared: tasks in order, labels ascending.

    Arms to which a condition does not apply stand in the groups of all its values.

    Args:
        table: the table from `check_results`.
        apart: whether numbers of labels are groups of their own.

    Yields:
        The values of `GROUP` (without `labels` if they are not apart), and the runs.
    """
    names = [name for name in GROUP if apart or name != "labels"]
    found = table[names].drop_duplicates()
    for name in ("task", "target"):
        rank = {value: i for i, value in enumerate(found[name].unique())}
        found[f"{name} rank"] = found[name].map(rank)
    order = ["task rank", "target rank", "metric", "condition", *names[4:-1]]
    for key in records(found.sort_values(order)[names]):
        mask = np.logical_and.reduce([table[name] == key[name] for name in names[:-1]])
        if not key["condition"] and table.loc[mask, "condition"].nunique() > 1:
            continue
        mask &= table["condition"].isin([key["condition"], ""])
        yield key, table[mask]


def runs_of(table: pd.DataFrame, place: Any) -> pd.DataFrame:
    """Return the runs of a group, with the arms to which no condition applies.

    Args:
        table: the table from `check_results`.
        place: has the columns of `GROUP` as attributes.
    """
    mask = np.logical_and.reduce(
        [table[name] == getattr(place, name) for name in GROUP[:-1]]
    )
    return table[mask & table["condition"].isin([place.condition, ""])]


def as_texts(column: pd.Series) -> pd.Series:
    """Return a column as texts; a gap is "", and 2.0 is 2.

    Args:
        column: any values.
    """
    return column.map(_text).astype(object)


def _text(value: Any) -> str:
    if (
        value is None
        or (isinstance(value, float) and np.isnan(value))
        or value is pd.NA
    ):
        return ""
    if isinstance(value, float | np.floating) and value == int(value):
        return str(int(value))
    return str(value)


def _without_unknown_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out failed runs whose place in the tables is not known."""
    failed = table["error"].fillna("").astype(str) != ""
    unknown = table[["target", "metric", "labels"]].isna().any(axis=1)
    kept = table[~(failed & unknown)].reset_index(drop=True)
    if kept.empty:
        first = table.loc[failed, "error"].iloc[0]
        raise InputError(f"all runs failed, the first with: {first}")
    return kept


def _whole(column: pd.Series) -> pd.Series:
    """Return whole numbers as integers; a column with a gap was read as floats."""
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().all() and (numbers == numbers.round()).all():
        return numbers.astype(int)
    return column


def _named(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the table with the axes in `condition` and in the names of the arms."""
    table["method"] = table["arm"]
    table["condition"] = ""
    own = table["method"] == reference
    for axis in axes(table):
        values = as_texts(table[axis])
        said = values.map(_distinct(values))
        name = axis.rpartition(".")[2]
        if values[own].nunique() > 1:
            table["condition"] = _joined(table["condition"], name, said, ", ")
            continue
        varies = values.groupby(table["method"]).transform("nunique") > 1
        table["arm"] = _joined(table["arm"], name, said.where(varies, ""), " ")
    return table


def _joined(before: pd.Series, name: str, values: pd.Series, between: str) -> pd.Series:
    """Add `name=value` to texts where there is a value."""
    return pd.Series(
        [
            f"{old}{between if old else ''}{name}={value}" if value else old
            for old, value in zip(before, values, strict=True)
        ],
        index=before.index,
        dtype=object,
    )


def _distinct(values: pd.Series) -> dict[str, str]:
    """Return values without the path parts that all of them share."""
    known = [value for value in values.unique() if value]
    parts = [list(PurePath(value).parts) for value in known]
    if not any("/" in value for value in known):
        return {value: value for value in values.unique()}
    for end in (0, -1):
        while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            for p in parts:
                p.pop(end)
    return {"": "", **{v: "/".join(p) for v, p in zip(known, parts, strict=True)}}
