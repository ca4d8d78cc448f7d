"""Learning curves, saved labels and closed gaps, against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crysdistill.errors import InputError
from crysdistill.studies.statistics import (
    fit_power_law,
    gap_closed,
    label_efficiency,
    labels_needed,
    learning_exponents,
)

SIZES = np.array([100, 200, 400, 800])


def study(metric: str = "mae", seeds: int = 4, **arms: np.ndarray) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        luck = np.exp(rng.normal(0, 0.01, len(SIZES)))
        for arm, errors in arms.items():
            found = errors * luck * np.exp(rng.normal(0, 0.002, len(SIZES)))
            rows += [
                {"arm": arm, "target": "gap", "unit": "eV", "metric": metric}
                | {"labels": labels, "seed": seed}
                | {"value": 1 - error if metric == "auc" else error}
                for labels, error in zip(SIZES, found, strict=True)
            ]
    return pd.DataFrame(rows)


def test_power_law_is_found_again():
    law = fit_power_law(SIZES, 3.0 * SIZES**-0.4)
    assert law == pytest.approx((3.0, 0.4, 0.0))
    law = fit_power_law(SIZES, 3.0 * SIZES**-0.7 + 0.05, floor=True)
    assert law == pytest.approx((3.0, 0.7, 0.05), rel=1e-3)
    assert law(np.array([100.0]))[0] == pytest.approx(3 * 100**-0.7 + 0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "errors", "floor", "match"),
    [
        ([100, 100], [1.0, 1.1], False, "needs 2 numbers of labels, not 1"),
        ([1, 2, 3], [1.0, 0.9, 0.8], True, "needs 4 numbers of labels, not 3"),
        ([1, 2], [1.0, 0.0], False, "needs positive labels and errors"),
    ],
)
def test_what_is_no_learning_curve(labels, errors, floor, match):
    with pytest.raises(InputError, match=match):
        fit_power_law(np.array(labels), np.array(errors), floor)


def test_labels_needed():
    errors = 2.0 * SIZES**-0.5
    assert labels_needed(SIZES, errors, 2 * 300**-0.5) == pytest.approx(300)
    assert labels_needed(SIZES, errors, errors[0]) == pytest.approx(100)
    assert labels_needed(SIZES, errors, errors[-1]) == pytest.approx(800)
    assert labels_needed(SIZES, errors, 0.9 * errors[-1]) == math.inf
    assert labels_needed(SIZES, errors, 1.1 * errors[0]) == 0
    # If a curve rises again, its lowest value so far counts.
    assert labels_needed(SIZES, np.array([1.0, 0.5, 0.7, 0.4]), 0.5) == (
        pytest.approx(200)
    )


@pytest.mark.parametrize("metric", ["mae", "auc"])
def test_an_arm_that_saves_half_of_the_labels(metric):
    scratch = 2.0 * SIZES**-0.5
    table = study(metric, scratch=scratch, good=2.0 * (2 * SIZES) ** -0.5)
    found = label_efficiency(table).set_index("labels")
    assert list(found.loc[[100, 200], "factor"]) == pytest.approx([2, 2], rel=0.05)
    assert found.loc[800, "factor"] == math.inf
    for labels in (100, 200):
        row = found.loc[labels]
        assert row["low"] <= row["factor"] <= row["high"] < 2.2
        assert row["needed"] == pytest.approx(labels * row["factor"])


def test_an_arm_that_costs_labels():
    scratch = 2.0 * SIZES**-0.5
    table = study(scratch=scratch, bad=2.0 * (SIZES / 2) ** -0.5)
    found = label_efficiency(table).set_index("labels")
    assert found.loc[100, "factor"] == 0  # fewer labels than in the study
    assert found.loc[400, "factor"] == pytest.approx(0.5, rel=0.05)


def test_one_number_of_labels_is_no_curve():
    table = study(scratch=1.0 / SIZES, good=0.5 / SIZES)
    one = table[table["labels"] == 100]
    assert label_efficiency(one).empty
    assert learning_exponents(one).empty


def test_exponents_with_their_intervals():
    found = learning_exponents(
        study(scratch=2.0 * SIZES**-0.5, flat=1.0 + 3.0 * SIZES**-1.0)
    ).set_index("arm")
    assert found.loc["scratch", "b"] == pytest.approx(0.5, abs=0.01)
    low, high = found.loc["scratch", ["b_low", "b_high"]]
    assert low < 0.5 < high
    assert high - low < 0.05
    assert found.loc["flat", "c"] > 0.9


def test_share_of_a_closed_gap():
    alone = np.array([1.0, 1.1, 0.9, 1.05])
    teacher = alone - [0.40, 0.42, 0.38, 0.41]
    taught = alone - [0.20, 0.22, 0.18, 0.23]
    share, (low, high) = gap_closed(alone, taught, teacher)
    assert share == pytest.approx(0.2075 / 0.4025)
    # A paired t test just fails to reject the ends of the interval.
    for end in (low, high):
        p = stats.ttest_1samp((alone - taught) - end * (alone - teacher), 0).pvalue
        assert p == pytest.approx(0.05)
    assert low < share < high
    assert gap_closed(alone, alone, teacher).value == 0
    assert gap_closed(alone, teacher, teacher).value == 1


def test_no_gap_no_share():
    alone = np.array([1.0, 1.1])
    assert math.isnan(gap_closed(alone, alone - 0.1, alone + 0.1).value)
    noisy = gap_closed(alone, alone - 0.1, alone - [0.4, 0.0])
    assert noisy.value == pytest.approx(0.5)
    assert math.isnan(noisy.interval.low)
    one = gap_closed(alone[:1], alone[:1] - 0.1, alone[:1] - 0.2)
    assert one.value == pytest.approx(0.5)
    assert math.isnan(one.interval.low)
    with pytest.raises(InputError, match="have 2, 1 and 2 values; give those of the"):
        gap_closed(alone, alone[:1], alone)
