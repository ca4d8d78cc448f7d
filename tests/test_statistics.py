"""Means, intervals and verdicts, by hand and against scipy."""

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
    hierarchical_interval,
    holm,
    over_tasks,
    p_equal,
    p_no_worse,
    runs_needed,
    summarise,
    t_interval,
)
from crysdistill.studies.statistics.intervals import bootstrap_means
from crysdistill.studies.statistics.paired import p_value

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
    assert row["verdict"] == NO_DIFFERENCE  # all three are better, but too few
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
    # In order: 0.005 x 4, 0.01 x 3, 0.03 x 2; 0.04 x 1 is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, np.nan]) == pytest.approx([0.02, np.nan], nan_ok=True)
    assert len(holm([])) == 0


@pytest.mark.parametrize("seed", range(5))
def test_holm_as_the_closed_test_of_all_subsets(seed):
    # Holm's procedure equals Bonferroni's test on every set with the hypothesis: the
    # largest value of size x smallest p.
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
    table["unit"] = np.nan  # as read from an empty CSV column
    assert only(summarise(table), "scratch")["unit"] == ""


def test_corrected_interval_by_hand():
    # (1, 2, 3) has sd 1; the variance is times 1/3 + 1/4, as for 5 equal parts.
    low, high = t_interval([1.0, 2.0, 3.0], ratio=0.25)
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(T2 * math.sqrt(1 / 3 + 1 / 4))


def test_comparison_uses_the_ratio_of_its_splits():
    scratch = [10.0, 12.0, 14.0, 11.0]
    table = results(scratch=scratch, other=[9.0, 11.2, 12.9, 10.4])
    plain = only(compare_paired(table), "other")
    corrected = only(compare_paired(table.assign(test_train=0.25)), "other")
    assert plain["verdict"] == corrected["verdict"] == BETTER
    width = [row["ci_high"] - row["ci_low"] for row in (plain, corrected)]
    assert width[1] / width[0] == pytest.approx(math.sqrt((1 / 4 + 1 / 4) / (1 / 4)))
    t = -plain["difference"] / (plain["sd_difference"] * math.sqrt(1 / 4 + 1 / 4))
    assert corrected["p"] == pytest.approx(2 * stats.t.sf(t, 3))
    assert corrected["ratio"] == 0.25


def test_overlapping_splits_fool_the_plain_test_but_not_the_corrected_one():
    rng = np.random.default_rng(0)
    wrong = np.zeros(2)
    for _ in range(400):
        gains = rng.normal(size=60)  # two equally good arms
        splits = [gains[rng.permutation(60)[:12]].mean() for _ in range(10)]
        for place, ratio in enumerate((0.0, 12 / 48)):
            wrong[place] += p_value(np.array(splits), ratio) < 0.05
    plain, corrected = wrong / 400
    assert plain > 0.2
    assert corrected < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_equivalence_as_scipy_has_it(seed):
    differences = np.random.default_rng(seed).normal(0.01, 0.05, 8)
    above = stats.ttest_1samp(differences, -0.04, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.04, alternative="less").pvalue
    assert p_no_worse(differences, 0.04) == pytest.approx(above)
    assert p_equal(differences, 0.04) == pytest.approx(max(above, below))


def test_no_worse_is_not_the_same_as_no_difference():
    scratch = np.array([1.0, 1.1, 0.9, 1.2, 1.05])
    noise = np.array([0.002, -0.003, 0.001, -0.002, 0.003])
    near, far = scratch + noise, scratch + 100 * noise
    table = compare_paired(results(scratch=scratch, near=near, far=far))
    for arm, sure in (("near", True), ("far", False)):
        row = only(table, arm)
        assert row["verdict"] == NO_DIFFERENCE
        assert (row["p_no_worse"] < 0.05) == (row["p_equal"] < 0.05) == sure
    better = only(compare_paired(results(scratch=scratch, good=0.9 * scratch)), "good")
    assert better["p_no_worse"] < 0.05 < better["p_equal"]


def test_no_worse_knows_the_direction_of_the_metric():
    scratch = np.array([0.80, 0.82, 0.81])
    table = results(scratch=scratch, lower=scratch - [0.10, 0.11, 0.10])
    as_error = only(compare_paired(table), "lower")
    as_auc = only(compare_paired(table.assign(metric="auc")), "lower")
    assert as_error["p_no_worse"] < 0.01
    assert as_auc["p_no_worse"] > 0.99


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_runs_needed_as_cohens_tables_have_it(effect, pairs):
    # A paired t test, 5 % two-sided, power 0.8: J. Cohen, Statistical Power Analysis.
    assert runs_needed(effect, 1.0) == pairs


def test_runs_needed_with_overlapping_splits_as_drawn():
    assert runs_needed(3.0, 1.0, ratio=0.25) == 5
    rng = np.random.default_rng(0)
    for n, enough in ((4, False), (5, True)):
        error = math.sqrt(1 / n + 0.25)
        means = 3.0 + error * rng.normal(size=100_000)
        spreads = np.sqrt(rng.chisquare(n - 1, size=100_000) / (n - 1))
        found = means / (spreads * error) > stats.t.ppf(0.975, n - 1)
        assert (found.mean() >= 0.8) == enough


def test_runs_on_one_dataset_cannot_show_everything():
    assert runs_needed(0.5, 1.0, ratio=0.25) is None
    assert runs_needed(0.1, 0.0) == 2
    assert runs_needed(0.0, 0.0) is None


def test_margins_must_be_positive():
    for function in (p_no_worse, p_equal):
        with pytest.raises(InputError, match="`margin` is 0 but must be positive"):
            function(np.array([1.0, 2.0]), 0)


def test_bootstrap_over_folds_and_seeds_has_the_variance_of_theory():
    folds = [np.array([1.0, 2.0, 3.0]), np.array([5.0, 6.0, 10.0]), np.array([2.0] * 3)]
    means = bootstrap_means(folds, draws=200_000)
    centres = np.array([f.mean() for f in folds])
    inside = np.mean([f.var() / len(f) for f in folds])
    assert means.mean() == pytest.approx(centres.mean(), abs=0.01)
    assert means.var() == pytest.approx((centres.var() + inside) / 3, rel=0.02)


def test_bootstrap_over_folds_with_one_run_is_the_ordinary_one():
    values = np.random.default_rng(0).normal(size=12)
    ours = hierarchical_interval([[v] for v in values])
    scipy = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours == pytest.approx((scipy.low, scipy.high), abs=0.05)
    assert np.isnan(hierarchical_interval([[1.0, 2.0]])).all()


def test_folds_are_the_pairs_if_there_are_several():
    rng = np.random.default_rng(0)
    fold = np.repeat([0, 1, 2, 3], 2)
    scratch = 1.0 + 0.1 * fold + rng.normal(0, 0.01, 8)
    other = scratch - 0.1 + rng.normal(0, 0.01, 8)
    table = results(scratch=scratch, other=other)
    table["fold"], table["seed"] = [*fold, *fold], [0, 1] * 8
    row = only(compare_paired(table), "other")
    by_fold = stats.ttest_rel(*(v.reshape(4, 2).mean(1) for v in (other, scratch)))
    assert (row["n"], row["unpaired"]) == (4, 0)
    assert row["p"] == pytest.approx(by_fold.pvalue)
    means = only(summarise(table), "scratch")
    folds = [part["value"].to_numpy() for _, part in table[:8].groupby("fold")]
    assert (means["ci_low"], means["ci_high"]) == hierarchical_interval(folds)


def test_axes_of_one_arm_are_part_of_its_name():
    table = pd.concat(
        [
            results(scratch=[1.0, 1.1]),
            *(
                results(finetuned=[0.9 - k / 10, 1.0]).assign(
                    **{"freeze.convolutions": k, "weights": f"runs/{w}/w.safetensors"}
                )
                for k in (0, 1)
                for w in ("a", "b")
            ),
        ]
    )
    checked = check_results(table)
    assert set(checked["condition"]) == {""}
    assert list(summarise(table)["arm"]) == [
        "scratch",
        "finetuned convolutions=0 weights=a",
        "finetuned convolutions=0 weights=b",
        "finetuned convolutions=1 weights=a",
        "finetuned convolutions=1 weights=b",
    ]
    assert set(checked["method"]) == {"scratch", "finetuned"}
    pd.testing.assert_frame_equal(check_results(checked), checked)


def test_axes_of_the_reference_are_conditions():
    table = pd.concat(
        [
            results(scratch=[1.0, 1.2], other=[0.5, 0.6]).assign(width=32),
            results(scratch=[2.0, 2.2], other=[1.9, 2.1]).assign(width=64),
            results(forest=[3.0, 3.3]),
        ]
    )
    found = compare_paired(table)
    rows = found[["condition", "arm", "reference_mean"]].values.tolist()
    assert rows == [
        ["width=32", "other", pytest.approx(1.1)],
        ["width=32", "forest", pytest.approx(1.1)],
        ["width=64", "other", pytest.approx(2.1)],
        ["width=64", "forest", pytest.approx(2.1)],
    ]


def test_crashed_cells_are_no_results():
    table = results(scratch=[1.0, 1.2, np.nan], other=[0.5, np.nan, 0.7])
    table["error"] = ["", "", "out of memory", "", "no such file", ""]
    table.loc[2, ["target", "metric"]] = None
    table.loc[2, "labels"] = np.nan
    assert only(summarise(table), "scratch")["failed"] == 0
    assert only(summarise(table), "other")["failed"] == 1
    lost = table.assign(labels=np.nan, error="out of memory")
    with pytest.raises(InputError, match="all runs failed, the first with: out of mem"):
        check_results(lost)


def tasks(changes: list[float], metric: str = "mae") -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = []
    for number, change in enumerate(changes):
        scratch = rng.uniform(0.2, 0.4, 4)
        other = scratch * (1 + change + rng.normal(0, 0.001, 4))
        part = results(scratch=scratch, other=other)
        parts.append(part.assign(task=f"task {number}", metric=metric))
    return pd.concat(parts)


def test_wins_ties_and_losses_over_tasks():
    found = compare_paired(tasks([-0.2, -0.1, 0.1, 0.0, -0.3, -0.05]))
    row = only(over_tasks(found), "other")
    assert (row["comparisons"], row["wins"], row["ties"], row["losses"]) == (6, 4, 1, 1)
    assert row["ahead"] in (4, 5)
    assert row["no_worse"] == 5
    logs = np.log(found["mean"] / found["reference_mean"])
    assert row["change"] == pytest.approx(100 * (np.exp(logs.mean()) - 1))
    # The Wilcoxon test by a list of all sign patterns.
    ranks = stats.rankdata(np.abs(logs))
    sums = [ranks[list(s)].sum() for s in itertools.product([False, True], repeat=6)]
    mine = ranks[logs > 0].sum()
    assert row["p_wilcoxon"] == pytest.approx(2 * np.mean(np.array(sums) <= mine))
    assert row["p_smallest"] == 1 / 32


def test_wilcoxon_counts_a_task_once():
    few, many = tasks([-0.1, -0.2]), tasks([-0.3, -0.1]).assign(labels=1000)
    row = only(over_tasks(compare_paired(pd.concat([few, many]))), "other")
    assert (row["comparisons"], row["tasks"], row["p_wilcoxon"]) == (4, 2, 0.5)
    one = only(over_tasks(compare_paired(tasks([-0.1]))), "other")
    assert math.isnan(one["p_wilcoxon"])


def test_over_tasks_knows_the_direction_of_the_metric():
    row = only(over_tasks(compare_paired(tasks([0.2, 0.3], "auc"))), "other")
    assert (row["wins"], row["losses"], row["ahead"]) == (2, 0, 2)
    assert row["change"] < 0


def test_holm_over_tasks():
    found = compare_paired(tasks([-0.001, -0.002, 0.0005]))
    assert list(found["p_tasks"]) == pytest.approx(list(holm(found["p"].to_numpy())))
