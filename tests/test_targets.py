"""Targets, their transforms and their scale."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.transfer.targets import TRANSFORMS, Normalizer, Target

MODULUS = Target("bulk_modulus", "GPa", transform="log10")
IS_METAL = Target("is_metal", task="classification")


def test_log10_known_answers_and_way_back():
    values = torch.tensor([1.0, 10.0, 443.0])
    learned = MODULUS.forward(values)
    torch.testing.assert_close(
        learned, torch.tensor([0.0, 1.0, np.log10(443.0)]).float()
    )
    torch.testing.assert_close(MODULUS.inverse(learned), values)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_has_a_way_back_and_keeps_unknown_labels_unknown(name):
    target = Target("x", transform=name)
    values = torch.tensor([[0.5], [float("nan")], [250.0]], dtype=torch.float64)
    back = target.inverse(target.forward(values))
    torch.testing.assert_close(back, values, equal_nan=True)


def test_a_target_survives_json():
    again = Target(**json.loads(json.dumps(MODULUS.to_dict())))
    assert again == MODULUS


def test_log10_names_the_material_whose_label_it_refuses():
    labels = np.array([12.0, np.nan, -3.0, 0.0])
    ids = ["mp-3", "mp-2", "mp-1", "mp-0"]
    text = (
        r"^mp-1: bulk_modulus is -3.0 but `log10` needs positive values "
        r"\(and 1 more such labels\)$"
    )
    with pytest.raises(InputError, match=text):
        MODULUS.check(labels, ids)
    with pytest.raises(InputError, match=r"^label 2: bulk_modulus is -3\.0"):
        MODULUS.check(labels)
    MODULUS.check(labels[:2], ids[:2])


def test_infinite_labels_and_labels_between_classes_are_refused():
    with pytest.raises(InputError, match="a: gap is inf but a label must be finite"):
        Target("gap", "eV").check(np.array([np.inf]), ["a"])
    with pytest.raises(InputError, match="b: bulk_modulus is inf but a label must be"):
        MODULUS.check(np.array([1.0, np.inf]), ["a", "b"])
    with pytest.raises(
        InputError,
        match=r"b: is_metal is 0.5 but a class must be a whole number from 0 to 999",
    ):
        IS_METAL.check(np.array([1.0, 0.5]), ["a", "b"])
    IS_METAL.check(np.array([1.0, 0.0, np.nan]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"task": "regresion"}, "`task` is 'regresion' .* did you mean `regression`"),
        ({"transform": "log"}, "`transform` is 'log' but must be one of none, log10"),
        (
            {"task": "classification", "transform": "log10"},
            "`transform` is 'log10' but `x` is a class; use `none`",
        ),
    ],
)
def test_wrong_targets_are_refused(arguments, text):
    with pytest.raises(InputError, match=text):
        Target("x", **arguments)


def test_the_normalizer_is_fitted_after_the_transform_and_without_unknown_labels():
    labels = np.array([1.0, 100.0, np.nan, 10.0])
    normalizer = Normalizer.fit(MODULUS, labels)
    # The logarithms are 0, 2 and 1.
    assert normalizer.mean == pytest.approx(1.0)
    assert normalizer.std == pytest.approx(1.0)
    values = torch.tensor([3.0, -1.0])
    torch.testing.assert_close(
        normalizer.denormalize(normalizer.normalize(values)), values
    )


def test_normalised_training_labels_have_mean_zero_and_deviation_one():
    labels = np.random.default_rng(0).normal(-5.0, 0.01, 50)
    normalizer = Normalizer.fit(Target("x"), labels)
    scaled = normalizer.normalize(torch.from_numpy(labels))
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-9)
    assert float(scaled.std()) == pytest.approx(1)


def test_classes_are_counted_and_not_normalised():
    two = Normalizer.fit(IS_METAL, np.array([0.0, 1.0, 1.0, np.nan]))
    assert two == Normalizer(0.0, 1.0, classes=2)
    assert Normalizer.fit(IS_METAL, np.array([3.0, 1.0, 0.0, 2.0])).classes == 4
    with pytest.raises(InputError, match="has class 3 but no training crystal of cl"):
        Normalizer.fit(IS_METAL, np.array([3.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([np.nan, np.nan], "`x` has no label among the training crystals"),
        ([2.0, np.nan], "`x` has 1 label among the training crystals"),
        # 0.1 three times has a standard deviation of 1e-17 in floating point.
        ([0.1, 0.1, 0.1], "`x` is 0.1 for all 3 training crystals; give at least two"),
    ],
)
def test_labels_without_a_scale_are_refused(labels, text):
    with pytest.raises(InputError, match=text):
        Normalizer.fit(Target("x"), np.array(labels))


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.0, 0.0, "`std` is 0.0 but must be positive"),
        (0.0, float("nan"), "`std` is nan but must be positive"),
        (float("inf"), 1.0, "`mean` is inf but must be finite"),
    ],
)
def test_impossible_scales_are_refused(mean, std, text):
    with pytest.raises(InputError, match=text):
        Normalizer(mean, std)
