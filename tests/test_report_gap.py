"""The report's share of the gap to the teacher."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from crysdistill.studies.arms import make_arm
from crysdistill.studies.sections.gap import NO_GAP, share_of_gap
from crysdistill.studies.statistics import check_results
from crysdistill.studies.tables import result_groups

ROLES = {"distilled": "student", "finetuned": "teacher", "ridge": "teacher"}
LUCK = np.array([0.0, 0.1, -0.1, 0.05])


def study(arms: Mapping[str, object], metric: str = "mae", **more) -> pd.DataFrame:
    """Return runs with four seeds; a seed shifts all arms alike."""
    rows = [
        {"arm": arm, "target": "gap", "metric": metric, "labels": 100, "seed": seed}
        | {"value": value, **more}
        for arm, values in arms.items()
        for seed, value in enumerate(values + LUCK)
    ]
    return pd.DataFrame(rows)


def section(*tables: pd.DataFrame):
    table = check_results(pd.concat(tables))
    return share_of_gap(result_groups(table, controls=["ridge"]), table, ROLES)


def test_share_with_its_interval_and_the_teacher_named():
    noise = np.array([0.01, -0.01, 0.02, -0.02])
    arms = {"scratch": 1.0, "distilled": 0.9 + noise, "finetuned": 0.6, "ridge": 0.1}
    found = section(study(arms))
    assert "The teacher is finetuned: the weights that teach the student" in found.note
    table = found.exhibits[0]
    assert table.data["closed"].tolist() == pytest.approx([25])
    assert table.data["low"][0] < 25 < table.data["high"][0]
    assert list(table.shown.loc[0])[:4] == [
        "gap, 100 labels", "distilled", "−39.5", "25.0",
    ]  # fmt: skip
    assert found.said == []
    assert [picture.name for picture in found.pictures] == ["gap-closed"]


def test_no_share_where_the_gap_may_be_zero():
    worse = study({"scratch": 1.0, "distilled": 0.9, "finetuned": 1.2})
    noise = np.array([0.3, -0.3, 0.2, -0.1])
    unsure = {"scratch": 1.0, "distilled": 0.9, "finetuned": 0.95 + noise}
    good = {"scratch": 1.0, "distilled": 0.9, "finetuned": 0.5}
    found = section(
        worse.assign(task="worse"),
        study(unsure).assign(task="unsure"),
        study(good).assign(task="good"),
    )
    table = found.exhibits[0]
    assert table.shown["Closed (%)"].tolist() == [NO_GAP, NO_GAP, "20.0"]
    assert table.shown["95 % CI"].tolist()[:2] == ["–", "–"]
    assert found.said == [
        "In 2 of 3 cases the teacher is not shown to be better than scratch (95 % "
        "interval): there is no gap to close."
    ]


def test_one_seed_has_no_share():
    arms = {"scratch": 1.0, "distilled": 0.9, "finetuned": 0.5}
    table = study(arms)
    found = section(table[table["seed"] == 0])
    assert found.exhibits[0].shown["Closed (%)"].tolist() == ["one seed"]
    assert found.said == [
        "One seed gives no interval, and so no share; run at least three."
    ]
    assert found.pictures == []


def test_overlapping_splits_widen_the_interval():
    noise = np.array([0.01, -0.01, 0.02, -0.02])
    arms = {"scratch": 1.0, "distilled": 0.9 + noise, "finetuned": 0.6}
    plain = section(study(arms)).exhibits[0].data
    wide = section(study(arms, test_train=0.25)).exhibits[0].data
    factor = np.sqrt((1 / 4 + 0.25) / (1 / 4))
    widths = [float(t["high"][0] - t["low"][0]) for t in (plain, wide)]
    assert widths[1] / widths[0] == pytest.approx(factor, rel=0.02)


def test_higher_may_be_better():
    arms = {"scratch": 0.5, "distilled": 0.6, "finetuned": 0.7}
    data = section(study(arms, "auc")).exhibits[0].data
    assert data["closed"].tolist() == pytest.approx([50])


def test_each_student_has_the_teacher_of_its_own_weights():
    first = study({"distilled": 0.9, "finetuned": 0.8}, weights="a")
    second = study({"distilled": 0.9, "finetuned": 0.6}, weights="b")
    data = section(study({"scratch": 1.0}), first, second).exhibits[0].data
    assert data["closed"].tolist() == pytest.approx([50, 25])
    assert data["teacher"].tolist() == ["finetuned weights=a", "finetuned weights=b"]


def test_of_the_same_weights_the_one_with_the_same_settings():
    low = study({"distilled": 0.9, "finetuned": 0.8}, **{"optimizer.lr": 0.1})
    high = study({"distilled": 0.9, "finetuned": 0.6}, **{"optimizer.lr": 0.2})
    data = section(study({"scratch": 1.0}), low, high).exhibits[0].data
    assert data["closed"].tolist() == pytest.approx([50, 25])


def test_nothing_without_all_three():
    assert section(study({"scratch": 1.0, "finetuned": 0.6})) is None
    assert section(study({"scratch": 1.0, "distilled": 0.6})) is None
    assert section(study({"mean": 1.0, "distilled": 0.6, "finetuned": 0.6})) is None


@pytest.mark.parametrize(
    ("arm", "role"),
    [
        ("distilled", "student"),
        ("finetuned", "teacher"),
        ("frozen-1", "teacher"),
        ("pretrained-ridge", "teacher"),
        ("shuffled-teacher", ""),
        ("random-teacher", ""),
        ("finetuned-ensemble", ""),
        ("stack", ""),
        ("scratch", ""),
        ("random-encoder-ridge", ""),
    ],
)
def test_roles(arm, role):
    assert make_arm(arm).role == role


def test_an_arm_with_weights_of_its_own_is_no_teacher():
    like = {"like": "finetuned", "weights": "taught-by-chgnet"}
    assert make_arm("mine", like).role == ""
    assert make_arm("mine", {"like": "finetuned", "encoder_lr": 0.1}).role == "teacher"


def test_a_student_of_another_teacher_is_not_of_the_weights():
    assert make_arm("mine", {"like": "distilled", "teacher": "other.h5"}).role == ""
    assert make_arm("mine", {"like": "distilled", "alpha": 0.3}).role == "student"
