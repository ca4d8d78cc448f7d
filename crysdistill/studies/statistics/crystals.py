"""Comparison with published predictions, crystal by crystal."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from scipy import stats

from crysdistill.errors import InputError
from crysdistill.studies.statistics.intervals import t_interval
from crysdistill.studies.statistics.paired import holm

_NOT_MODELS = ("fold", "truth", "target", "unit")


def read_published(path: str | Path) -> pd.DataFrame:
    """Read published predictions: `material_id` and a column for each model.

    Args:
        path: a CSV file; columns named `fold`, `truth`, `target` and `unit` are no
            models.

    Raises:
        InputError: the file is missing, has no `material_id`, no model, a crystal
            twice, or a prediction that is no number.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of published predictions")
    try:
        table = pd.read_csv(path, dtype={"material_id": str})
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable CSV file: {error}") from None
    if "material_id" not in table:
        raise InputError(f"{path}: lacks the column `material_id`")
    models = [name for name in table.columns if name != "material_id"]
    models = [name for name in models if name not in _NOT_MODELS]
    if not models:
        raise InputError(f"{path}: has no column with predictions of a model")
    twice = table.loc[table["material_id"].duplicated(), "material_id"]
    if len(twice):
        raise InputError(f"{path}: {twice.iloc[0]} occurs twice; keep one row")
    for name in models:
        numbers = pd.to_numeric(table[name], errors="coerce")
        wrong = table[numbers.isna() & table[name].notna()]
        if len(wrong):
            row = wrong.iloc[0]
            raise InputError(
                f"{path}: `{name}` of {row['material_id']} is {row[name]!r} but must "
                "be a number"
            )
        table[name] = numbers.astype(float)
    return table[["material_id", *models]]


def compare_published(
    predictions: pd.DataFrame, published: pd.DataFrame, confidence: float = 0.95
) -> pd.DataFrame:
    """Compare the absolute errors of an arm with those of published models.

    A crystal that several seeds test counts once, with its mean absolute error.

    Args:
        predictions: columns `material_id, truth, prediction` of one arm.
        published: the table from `read_published`.
        confidence: the level of the intervals.

    Returns:
        One row for each model: `model`, `crystals` (that both predict), `mae` (ours),
        `published_mae`, `difference` (ours minus theirs) with `ci_low` and `ci_high`
        (t interval over crystals), `ahead` (share of crystals on which ours is closer),
        `p` (Wilcoxon's signed-rank test) and `p_holm` (for the number of models).
        Models without a common crystal have no row.
    """
    errors = (predictions["prediction"] - predictions["truth"]).abs()
    ours = errors.groupby(predictions["material_id"]).mean().dropna()
    truth = predictions.groupby("material_id")["truth"].first()
    rows = []
    for name in published.columns.drop("material_id"):
        theirs = published.set_index("material_id")[name].dropna()
        both = ours.index.intersection(theirs.index)
        if both.empty:
            continue
        mine = ours.loc[both].to_numpy(float)
        other = (theirs.loc[both] - truth.loc[both]).abs().to_numpy(float)
        differences = mine - other
        low, high = t_interval(differences, confidence)
        rows.append(
            {
                "model": name,
                "crystals": len(both),
                "mae": float(mine.mean()),
                "published_mae": float(other.mean()),
                "difference": float(differences.mean()),
                "ci_low": low,
                "ci_high": high,
                "ahead": float((differences < 0).mean()),
                "p": (
                    float(stats.wilcoxon(differences).pvalue)
                    if differences.any()
                    else 1.0
                ),
            }
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["p_holm"] = holm(table["p"].to_numpy(float))
    return table
