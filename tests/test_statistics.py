"""Means, intervals and verdicts: by hand, and beside scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crysdistill.errors import InputError
from crysdistill.studies.statistics import (
    BETTER,
    NO_DIFFERENCE,
    NO_PAIR,
    ONE_SEED,
    WORSE,
    check_results,
    compare_paired,
    holm,
    summarise,
    t_interval,
)

T2 = 4.302652729911275  # Student's t, 97.5 %, two degrees of freedom (any table)


def results(**arms: list[float]) -> pd.DataFrame:
    rows = [
        {
            "arm": arm.replace("_", "-"),
            "target": "formation_energy",
            "unit": "eV/atom",
            "metric": "mae",
            "labels": 100,
            "seed": seed,
            "value": value,
            "validation": value - 0.5,
        }
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def only(table: pd.DataFrame, arm: str) -> pd.Series:
    found = table[table["arm"] == arm]
    assert len(found) == 1
    return found.iloc[0]


def test_summary_by_hand():
    row = only(summarise(results(scratch=[3.0, 1.0, 2.0])), "scratch")
    assert row["n"] == 3
    assert row["mean"] == 2
    assert row["sd"] == 1
    assert row["ci_low"] == pytest.approx(2 - T2 / math.sqrt(3))
    assert row["ci_high"] == pytest.approx(2 + T2 / math.sqrt(3))
    assert (row["best"], row["worst"]) == (1, 3)
    assert row["validation"] == 1.5


def test_best_of_a_metric_where_more_is_better():
    table = results(scratch=[0.7, 0.9, 0.8]).assign(metric="auc")
    row = only(summarise(table), "scratch")
    assert (row["best"], row["worst"]) == (0.9, 0.7)


def test_paired_comparison_by_hand():
    table = results(scratch=[10, 12, 14], distilled=[9, 11.5, 12])
    row = only(compare_paired(table), "distilled")
    sd = math.sqrt(7 / 12)  # of -1, -1/2, -2
    assert row["difference"] == pytest.approx(-7 / 6)
    assert row["sd_difference"] == pytest.approx(sd)
    assert row["ci_low"] == pytest.approx(-7 / 6 - T2 * sd / math.sqrt(3))
    assert row["ci_high"] == pytest.approx(-7 / 6 + T2 * sd / math.sqrt(3))
    assert row["change"] == pytest.approx(-100 * 7 / 6 / 12)
    assert row["wins"] == 3
    assert row["verdict"] == NO_DIFFERENCE  # all three better, and yet too few
    assert not row["holds"]


@pytest.mark.parametrize("seed", range(3))
def test_paired_comparison_as_scipy_has_it(seed):
    rng = np.random.default_rng(seed)
    scratch, other = rng.normal(0.2, 0.02, (2, 6))
    row = only(compare_paired(results(scratch=scratch, other=other)), "other")
    scipy = stats.ttest_rel(other, scratch)
    ends = scipy.confidence_interval(0.95)
    assert row["p"] == pytest.approx(scipy.pvalue)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((ends.low, ends.high))
    assert (row["verdict"] == NO_DIFFERENCE) == (scipy.pvalue >= 0.05)


@pytest.mark.parametrize(
    ("metric", "verdict"), [("mae", BETTER), ("auc", WORSE), ("accuracy", WORSE)]
)
def test_verdict_knows_the_direction_of_the_metric(metric, verdict):
    table = results(scratch=[0.5, 0.6, 0.7], other=[0.4, 0.51, 0.59])
    row = only(compare_paired(table.assign(metric=metric)), "other")
    assert row["verdict"] == verdict
    assert row["wins"] == (3 if verdict == BETTER else 0)
    table["value"] = 1 - table["value"]
    row = only(compare_paired(table.assign(metric=metric)), "other")
    assert row["verdict"] == (WORSE if verdict == BETTER else BETTER)


def test_pairing_sees_what_unpaired_spread_hides():
    scratch = np.array([0.1, 0.2, 0.3, 0.4])
    table = results(scratch=scratch, other=0.95 * scratch - 0.001)
    assert stats.ttest_ind(0.95 * scratch - 0.001, scratch).pvalue > 0.8
    assert only(compare_paired(table), "other")["verdict"] == BETTER


def test_order_of_rows_does_not_matter():
    table = results(scratch=[1.0, 2.0, 4.0], a=[0.9, 1.7, 3.1], b=[1.1, 2.4, 4.1])
    mixed = table.sample(frac=1, random_state=0)
    for function in (summarise, compare_paired):
        first = function(table).sort_values("arm").reset_index(drop=True)
        second = function(mixed).sort_values("arm").reset_index(drop=True)
        pd.testing.assert_frame_equal(first, second)


def test_arm_like_the_reference_is_no_difference():
    row = only(compare_paired(results(scratch=[1.0, 2.0], same=[1.0, 2.0])), "same")
    assert row["verdict"] == NO_DIFFERENCE
    assert row["p"] == 1
    assert (row["ci_low"], row["ci_high"]) == (0, 0)


def test_one_seed_gives_no_interval_and_no_verdict():
    table = results(scratch=[0.25], distilled=[0.2])
    row = only(summarise(table), "distilled")
    assert row["mean"] == 0.2
    assert np.isnan([row["sd"], row["ci_low"], row["ci_high"]]).all()
    row = only(compare_paired(table), "distilled")
    assert row["change"] == pytest.approx(-20)
    assert np.isnan([row["ci_low"], row["ci_high"], row["p"], row["p_holm"]]).all()
    assert row["verdict"] == ONE_SEED
    assert not row["holds"]


def test_only_common_seeds_are_compared_and_the_rest_is_counted():
    table = results(scratch=[1.0, 2.0, 3.0, np.nan], other=[0.9, 1.9, 2.9, 4.0, 5.0])
    row = only(compare_paired(table), "other")
    assert (row["n"], row["unpaired"]) == (3, 2)
    assert row["reference_mean"] == 2
    row = only(summarise(table), "scratch")
    assert (row["n"], row["failed"]) == (3, 1)
    assert row["mean"] == 2


def test_no_common_seed():
    table = results(scratch=[1.0, 2.0], other=[1.0, 2.0])
    table.loc[table["arm"] == "other", "seed"] += 10
    row = only(compare_paired(table), "other")
    assert (row["n"], row["unpaired"], row["verdict"]) == (0, 2, NO_PAIR)


def test_targets_and_labels_are_judged_apart():
    few = results(scratch=[1.0, 1.1], other=[0.5, 0.5])
    many = results(scratch=[0.1, 0.2], other=[0.1, 0.2]).assign(labels=1000)
    band_gap = few.assign(target="band_gap")
    table = compare_paired(pd.concat([many, few, band_gap]))
    found = list(zip(table["target"], table["labels"], strict=True))
    formation = "formation_energy"
    assert found == [(formation, 100), (formation, 1000), ("band_gap", 100)]
    assert list(table["change"]) == pytest.approx([-100 * 0.55 / 1.05, 0, -52.38095])


def test_holm_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, np.nan]) == pytest.approx([0.02, np.nan], nan_ok=True)
    assert len(holm([])) == 0


@pytest.mark.parametrize("seed", range(5))
def test_holm_as_the_closed_test_of_all_subsets(seed):
    # Holm's procedure is Bonferroni's test on every set of hypotheses that holds the
    # one in question: the largest of size x smallest p.
    p = np.random.default_rng(seed).random(5) ** 3
    for i in range(5):
        sets = [
            {i, *others}
            for size in range(5)
            for others in itertools.combinations(range(5), size)
        ]
        expected = max(min(1, len(s) * min(p[j] for j in s)) for s in sets)
        assert holm(p)[i] == pytest.approx(expected)


def test_holm_counts_all_arms_of_the_comparison():
    scratch = np.array([1.0, 1.1, 0.9, 1.2, 1.0])
    better = scratch - [0.05, 0.03, 0.04, 0.06, 0.01]  # t = -4.4, p = 0.011
    noise = np.array([0.1, -0.1, 0.1, -0.1, 0.0])
    near = {f"arm_{i}": scratch + noise * (1 + i) for i in range(8)}
    alone = only(compare_paired(results(scratch=scratch, good=better)), "good")
    among = only(compare_paired(results(scratch=scratch, good=better, **near)), "good")
    assert alone["verdict"] == among["verdict"] == BETTER
    assert alone["holds"]
    assert not among["holds"]
    assert among["p_holm"] > 0.05 > among["p"] == pytest.approx(alone["p"])


def test_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(3.0, 2.0, (2000, 4))
    inside = [low <= 3.0 <= high for low, high in (t_interval(d, 0.9) for d in draws)]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.drop(columns="seed"), "lack `seed`; they need the columns arm,"),
        (
            lambda t: t.rename(columns={"labels": "label", "seed": "x"}),
            "lack `labels` and `seed`.*is it the column `label`",
        ),
        (lambda t: t.iloc[:0], "have no row; run at least one arm"),
        (
            lambda t: t.assign(metric="mea"),
            "unknown metric `mea`.*did you mean `mae`",
        ),
        (lambda t: t.assign(value="x"), "the column `value` must hold numbers"),
        (lambda t: t.assign(labels=np.nan), "the column `labels` has gaps"),
        (lambda t: pd.concat([t, t]), "arm `scratch` has seed 0 twice"),
        (
            lambda t: t.assign(unit=["eV", "meV"]),
            "the units 'eV', 'meV'; convert its values",
        ),
    ],
)
def test_bad_results(change, match):
    table = results(scratch=[1.0, 2.0])
    for function in (check_results, summarise, compare_paired):
        with pytest.raises(InputError, match=match):
            function(change(table))


def test_bad_arguments():
    table = results(scratch=[1.0, 2.0], distilled=[1.0, 2.0])
    with pytest.raises(InputError, match=r"reference arm `scrach`.*mean `scratch`"):
        compare_paired(table, "scrach")
    with pytest.raises(InputError, match="`confidence` is 95 but must be between 0"):
        summarise(table, confidence=95)


def test_unit_and_validation_may_be_absent():
    table = results(scratch=[1.0, 2.0]).drop(columns=["unit", "validation"])
    row = only(summarise(table), "scratch")
    assert row["unit"] == ""
    assert math.isnan(row["validation"])
    table["unit"] = np.nan  # what an empty column of a CSV file becomes
    assert only(summarise(table), "scratch")["unit"] == ""
