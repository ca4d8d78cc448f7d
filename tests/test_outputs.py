"""Several targets in one head: losses, balance, predictions."""

from __future__ import annotations

import math

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.transfer.outputs import Balance, Outputs
from crysdistill.transfer.targets import Normalizer, Target

GAP = Target("gap", "eV")
MODULUS = Target("modulus", "GPa", transform="log10")
METAL = Target("metal", task="classification")
SYSTEM = Target("system", task="classification")
ALL = Outputs(
    [GAP, METAL, SYSTEM, MODULUS],
    [
        Normalizer(1.0, 2.0),
        Normalizer(classes=2),
        Normalizer(classes=3),
        Normalizer(2.0, 0.5),
    ],
)
NAN = float("nan")
LABELS = torch.tensor(
    [[3.0, 1.0, 2.0, 100.0], [NAN, 0.0, 0.0, 1000.0], [0.0, NAN, 1.0, NAN]]
)


@pytest.fixture
def output() -> torch.Tensor:
    return torch.randn(3, ALL.size, generator=torch.Generator().manual_seed(0))


def plain_losses(output) -> list[float]:
    """The same losses, crystal by crystal in plain Python."""
    rows, labels = output.tolist(), LABELS.tolist()

    def cross_entropy(scores, chosen):
        return math.log(sum(math.exp(s) for s in scores)) - scores[chosen]

    gap = [
        (row[0] - (y[0] - 1.0) / 2.0) ** 2 for row, y in zip(rows, labels, strict=True)
    ]
    metal = [cross_entropy(rows[i][1:3], int(labels[i][1])) for i in (0, 1)]
    system = [cross_entropy(rows[i][3:6], int(labels[i][2])) for i in range(3)]
    modulus = [(rows[i][6] - (math.log10(labels[i][3]) - 2) / 0.5) ** 2 for i in (0, 1)]
    return [
        (gap[0] + gap[2]) / 2,
        sum(metal) / 2,
        sum(system) / 3,
        sum(modulus) / 2,
    ]


def test_losses_are_means_over_the_labels_that_are_known(output):
    losses, counts = ALL.losses(output, LABELS)
    assert counts.tolist() == [2, 2, 3, 2]
    assert losses.tolist() == pytest.approx(plain_losses(output), rel=1e-5)


def test_an_unknown_label_has_no_gradient(output):
    output.requires_grad_()
    losses, _ = ALL.losses(output, LABELS)
    losses.sum().backward()
    assert torch.isfinite(output.grad).all()
    assert output.grad[1, 0] == 0
    assert (output.grad[2, 1:3] == 0).all()
    assert output.grad[2, 6] == 0
    assert output.grad[0].abs().min() > 0


def test_a_batch_without_labels_and_one_without_crystals(output):
    losses, counts = ALL.losses(output, torch.full((3, 4), NAN))
    assert losses.tolist() == [0, 0, 0, 0]
    assert counts.tolist() == [0, 0, 0, 0]
    losses, _ = ALL.losses(output[:0], LABELS[:0])
    assert losses.tolist() == [0, 0, 0, 0]


def test_predictions_come_in_the_units_of_the_targets(output):
    found = ALL.predictions(output)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found[:, 0], output[:, 0] * 2 + 1)
    torch.testing.assert_close(found[:, 1], torch.sigmoid(output[:, 2] - output[:, 1]))
    assert found[:, 2].tolist() == output[:, 3:6].argmax(dim=1).tolist()
    torch.testing.assert_close(found[:, 3], 10 ** (output[:, 6] * 0.5 + 2))


def test_columns_of_more_than_two_classes_hold_their_probabilities(output):
    columns = ALL.columns(output)
    names = ["gap", "metal", "system", "system_0", "system_1", "system_2", "modulus"]
    assert list(columns) == names
    total = columns["system_0"] + columns["system_1"] + columns["system_2"]
    torch.testing.assert_close(total, torch.ones(3))


def test_one_target_is_its_own_loss():
    balance = Balance([GAP])
    assert list(balance.parameters()) == []
    assert balance(torch.tensor([0.7]), torch.tensor([3])).item() == pytest.approx(0.7)


def test_fixed_weights_where_one_is_given():
    targets = [Target("a", weight=3.0), Target("b")]
    balance = Balance(targets)
    assert list(balance.parameters()) == []
    found = balance(torch.tensor([0.5, 2.0]), torch.tensor([1, 1]))
    assert found.item() == pytest.approx(3 * 0.5 + 2.0)


def test_learned_variances_as_in_the_paper():
    """Eq. 7 with sigma_1 = 1, sigma_2 = 2; Eq. 10 for the class."""
    balance = Balance([GAP, MODULUS, METAL])
    with torch.no_grad():
        balance.log_variances.copy_(torch.tensor([0.0, math.log(4), math.log(4)]))
    found = balance(torch.tensor([0.5, 2.0, 0.8]), torch.tensor([1, 1, 1]))
    expected = 0.5 / 2 + 2.0 / (2 * 4) + math.log(2) + 0.8 / 4 + math.log(2)
    assert found.item() == pytest.approx(expected)


def test_learned_variances_settle_at_the_losses():
    """The derivative d/ds (L exp(-s) / 2 + s / 2) is 0 at exp(s) = L."""
    balance = Balance([GAP, MODULUS])
    losses, counts = torch.tensor([0.01, 9.0]), torch.tensor([1, 1])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        balance(losses, counts).backward()
        optimizer.step()
    torch.testing.assert_close(balance.log_variances.exp(), losses, rtol=0.02, atol=0)


def test_a_target_that_nobody_labelled_in_a_batch_leaves_its_variance_alone():
    balance = Balance([GAP, MODULUS])
    balance(torch.tensor([0.5, 0.0]), torch.tensor([1, 0])).backward()
    assert balance.log_variances.grad[1] == 0
    assert balance.log_variances.grad[0] != 0


@pytest.mark.parametrize(
    ("targets", "scales", "text"),
    [
        ([], [], "there is no target; name one as `target.name=...`"),
        ([GAP, GAP], [Normalizer()] * 2, "`targets` names `gap` twice; leave one out"),
        ([METAL], [Normalizer()], "`metal` is a target of classification but its nor"),
        ([GAP], [Normalizer(classes=2)], "`gap` is a target of regression but its no"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, scales, text):
    with pytest.raises(InputError, match=text):
        Outputs(targets, scales)
