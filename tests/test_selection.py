"""The weighted mean of candidates in `fit`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crysdistill.training.selection import choose_shares
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.targets import Normalizer, Target

GAP = Target("gap", "eV")
OUTPUTS = Outputs([GAP], [Normalizer(mean=0.0, std=1.0)])


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_opposite_errors_cancel():
    labels = column(0.0, 1.0, 2.0, 3.0)
    answers = {"high": labels + 1, "low": labels - 1, "far": labels + 9}
    assert choose_shares(answers, labels, OUTPUTS) == {"high": 0.5, "low": 0.5}


def test_an_exact_predictor_stays_alone():
    labels = column(0.0, 1.0, 2.0)
    answers = {"off": labels + 1, "exact": labels.clone()}
    assert choose_shares(answers, labels, OUTPUTS) == {"exact": 1.0}


def test_one_may_count_more_than_once():
    labels = torch.zeros(4, 1)
    shares = choose_shares({"near": labels + 1, "far": labels - 3}, labels, OUTPUTS)
    assert shares == {"near": 0.75, "far": 0.25}


def test_unknown_labels_do_not_count():
    labels = column(0.0, float("nan"), 2.0)
    answers = {"good": column(0.0, 99.0, 2.0), "bad": column(1.0, 0.0, 3.0)}
    assert choose_shares(answers, labels, OUTPUTS) == {"good": 1.0}


def test_a_predictor_without_a_number_is_left_out():
    labels = column(0.0, 1.0)
    answers = {"broken": column(float("nan"), 1.0), "off": labels + 1}
    assert choose_shares(answers, labels, OUTPUTS) == {"off": 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_plain_search(seed):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=40)
    made = {name: truth + rng.normal(size=40) * (1 + k) for k, name in enumerate("abc")}
    found = choose_shares(
        {name: torch.tensor(x)[:, None].float() for name, x in made.items()},
        torch.tensor(truth)[:, None].float(),
        OUTPUTS,
        steps=6,
    )
    added, tried = [], []
    for _ in range(6):
        name = min(made, key=lambda n: error(truth, [*added, made[n]]))
        added.append(made[name])
        tried.append((error(truth, added), len(added)))
    _, count = min(tried)
    expected = np.mean(added[:count], axis=0)
    mean = sum(share * made[name] for name, share in found.items())
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    assert sum(found.values()) == pytest.approx(1)
    alone = min(error(truth, [x]) for x in made.values())
    assert error(truth, [mean]) <= alone + 1e-6


def error(truth, parts):
    return np.abs(np.mean(parts, axis=0) - truth).mean()
