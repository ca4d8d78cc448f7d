"""Heads, predictors and freezing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, make_batch
from crysdistill.teachers.random import fit_batch_norms
from crysdistill.transfer.freezing import freeze
from crysdistill.transfer.heads import CLASSIFIER_DROPOUT, PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.targets import Normalizer, Target
from tests.conftest import random_crystal

GRAPH = GraphSettings(max_neighbors=6)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def some_batch(*seeds: int):
    batch = make_batch([random_crystal(s, atoms=3 + s % 3) for s in seeds], GRAPH)
    batch.rows = torch.tensor(seeds)
    return batch


@pytest.fixture
def batch():
    return some_batch(0, 1, 2)


def make_predictor(task="regression", seed=0, **encoder) -> Predictor:
    torch.manual_seed(seed)
    body = CGCNN(width=8, **encoder)
    if task == "classification":
        head = PropertyHead(8, hidden=5, outputs=2, dropout=CLASSIFIER_DROPOUT)
        return Predictor(body, head, outputs(Target("x", task=task), TWO), GRAPH)
    return Predictor(body, PropertyHead(8, hidden=5), outputs(Target("x")), GRAPH)


TWO = Normalizer(classes=2)
LOGARITHM = Target("bulk_modulus", "GPa", transform="log10")


def outputs(target: Target, normalizer: Normalizer = Normalizer()) -> Outputs:  # noqa: B008
    return Outputs([target], [normalizer])


# ------------------------------------------------------------------------- head


def test_parameter_counts_of_the_published_models():
    student = CGCNN(width=64, convolutions=3)
    assert parameters(student) + parameters(PropertyHead(64, 128)) == 80_833
    prl = CGCNN(width=64, convolutions=4)
    assert parameters(prl) + parameters(PropertyHead(64, 32)) == 96_641


@pytest.mark.parametrize("numbers", [1, 2])
def test_the_head_equals_a_plain_second_implementation(numbers):
    torch.manual_seed(0)
    head = PropertyHead(4, hidden=3, layers=2, outputs=numbers).eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    head.double()

    def softplus(v):
        return np.log1p(np.exp(v))

    def linear(layer, v):
        return v @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    y = softplus(linear(head.first, softplus(x.numpy())))
    y = softplus(linear(head.middle[0], y))
    y = linear(head.last, y)
    np.testing.assert_allclose(head(x).detach().numpy(), y, rtol=1e-10)


def test_a_head_drops_out_only_if_told_and_only_in_training():
    x = torch.randn(4, 8)
    for dropout, differs in ((0.0, False), (0.5, True)):
        head = PropertyHead(8, dropout=dropout)
        assert torch.equal(head(x), head(x)) != differs
        head.eval()
        assert torch.equal(head(x), head(x))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"hidden": 0}, "`hidden` is 0 but must be at least 1"),
        ({"layers": -1}, "`layers` is -1 but must be at least 0"),
        ({"outputs": 0}, "`outputs` is 0 but must be at least 1"),
        ({"dropout": 1.0}, r"`dropout` is 1.0 but must be in \[0, 1\)"),
        ({"activation": "sulu"}, "`activation` is 'sulu' .* did you mean `silu`"),
    ],
)
def test_wrong_head_settings_are_refused(arguments, text):
    with pytest.raises(InputError, match=text):
        PropertyHead(8, **arguments)


# -------------------------------------------------------------------- predictor


def test_predictions_come_back_in_the_unit(batch):
    model = make_predictor()
    model.outputs = outputs(LOGARITHM, Normalizer(2.0, 0.5))
    model.eval()
    raw = model(batch)
    assert raw.shape == (3, 1)
    expected = 10 ** (raw[:, 0] * 0.5 + 2.0)
    torch.testing.assert_close(model.predict(batch), expected)


def test_the_loss_is_that_of_the_normalised_transformed_target():
    scale = outputs(LOGARITHM, Normalizer(2.0, 0.5))
    output = torch.tensor([[0.0], [1.0], [7.0]], requires_grad=True)
    # Normalised logarithms are 0, 2 and unknown, so the errors are 0 and 1.
    losses, known = scale.losses(output, torch.tensor([[100.0], [1000.0], [np.nan]]))
    loss = losses.sum()
    assert known.tolist() == [2]
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    torch.testing.assert_close(output.grad, torch.tensor([[0.0], [-1.0], [0.0]]))


def test_the_loss_of_a_classifier_is_the_mean_over_known_labels():
    classes = outputs(Target("x", task="classification"), TWO)
    output = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]).log().requires_grad_()
    loss = classes.losses(output, torch.tensor([[1.0], [0.0], [np.nan]]))[0].sum()
    assert loss.item() == pytest.approx(-(np.log(0.8) + np.log(0.9)) / 2, rel=1e-5)
    loss.backward()
    assert not output.grad[2].any()


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient(task, batch):
    model = make_predictor(task)
    losses, _ = model.outputs.losses(model(batch), torch.full((3, 1), float("nan")))
    loss = losses.sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_classifier_predicts_the_probability_of_class_1(batch):
    model = make_predictor("classification").eval()
    probability = model.predict(batch)
    assert probability.shape == (3,)
    torch.testing.assert_close(probability, model(batch).softmax(dim=1)[:, 1])
    assert ((probability > 0) & (probability < 1)).all()


def test_predict_neither_needs_nor_changes_the_mode(batch):
    model = make_predictor("classification").train()
    before = copy.deepcopy(model.state_dict())
    first = model.predict(batch)
    assert model.training
    assert torch.equal(first, model.predict(batch))
    assert torch.equal(first, model.eval().predict(batch))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parts_that_do_not_fit_are_refused():
    body, target = CGCNN(width=8), Target("x", task="classification")
    with pytest.raises(InputError, match="the head has 1 outputs but x need 2"):
        Predictor(body, PropertyHead(8), outputs(target, TWO), GRAPH)
    with pytest.raises(InputError, match="`x` is a target of classification but its"):
        outputs(target)
    with pytest.raises(
        InputError, match="the head's `width` is 9 but the encoder's is 8"
    ):
        Predictor(body, PropertyHead(9), outputs(Target("x")), GRAPH)


# --------------------------------------------------------------------- freezing


def changed_by_a_step(model: Predictor, batch) -> set[str]:
    before = copy.deepcopy(model.state_dict())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, weight_decay=0.1)
    model.train()
    losses, _ = model.outputs.losses(model(batch), torch.tensor([[1.0], [2.0], [3.0]]))
    losses.sum().backward()
    optimizer.step()
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


def stage(number: int) -> str:
    return "encoder.embedding" if not number else f"encoder.convolutions.{number - 1}."


@pytest.mark.parametrize("policy", ["frozen", "adaptive"])
@pytest.mark.parametrize("count", [0, 1, 3, "all"])
def test_frozen_stages_keep_their_weights_and_the_policy_their_statistics(
    count, policy, batch
):
    model = make_predictor()
    model.freeze(count, policy)
    changed = changed_by_a_step(model, batch)
    frozen = 3 if count == "all" else count
    for number in range(4):
        inside = {name for name in changed if name.startswith(stage(number))}
        if number > frozen:
            assert any("linear.weight" in name for name in inside)
        elif policy == "adaptive" and number:
            assert inside
            assert all("running_" in n or "num_batches" in n for n in inside)
        else:
            assert not inside
    assert any(name.startswith("head.") for name in changed)


def test_nothing_is_frozen_by_default(batch):
    model = make_predictor()
    changed = changed_by_a_step(model, batch)
    assert all(any(n.startswith(stage(i)) for n in changed) for i in range(4))
    assert model.frozen_report() == {
        "convolutions": None,
        "batch_norm": None,
        "frozen_parameters": 0,
        "trainable_parameters": parameters(model),
        "fixed_batch_norms": 0,
    }


def test_frozen_stages_compute_what_they_computed_in_pretraining(batch):
    model = make_predictor()
    fit_batch_norms(model.encoder, [batch])
    before = model.encoder(batch).atoms.detach()
    model.freeze("all")
    model.train()  # like Lightning
    torch.testing.assert_close(model.encoder(batch).atoms, before)
    wrapped = nn.ModuleDict({"inner": copy.deepcopy(model)}).train()
    torch.testing.assert_close(wrapped["inner"].encoder(batch).atoms, before)
    model.freeze("all", "adaptive")
    assert not torch.allclose(model.encoder(batch).atoms, before, atol=1e-3)


def test_the_report_counts():
    model = make_predictor()
    model.freeze(2)
    convolution = parameters(model.encoder.convolutions[0])
    frozen = 92 * 8 + 8 + 2 * convolution
    assert model.frozen_report() == {
        "convolutions": 2,
        "batch_norm": "frozen",
        "frozen_parameters": frozen,
        "trainable_parameters": parameters(model) - frozen,
        "fixed_batch_norms": 6,
    }
    model.freeze("all", "adaptive")
    report = model.frozen_report()
    assert (report["convolutions"], report["fixed_batch_norms"]) == (3, 0)


def test_freezing_again_releases_what_was_frozen_before():
    model = make_predictor()
    model.encoder.embedding.bias.requires_grad_(False)  # frozen by other code
    model.freeze("all")
    model.freeze(0)
    model.freeze(None)
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"encoder.embedding.bias"}
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((4,), "`convolutions` is 4 but the encoder has 3; freeze 0 to 3 of them, or"),
        ((-1,), "`convolutions` is -1 but the encoder has 3"),
        (("most",), "`convolutions` is 'most' but must be a number, `all` or None"),
        ((1, "frosen"), "`batch_norm` is 'frosen' .* did you mean `frozen`"),
    ],
)
def test_what_cannot_be_frozen_is_refused_and_changes_nothing(arguments, text):
    model = make_predictor()
    model.freeze(1)
    before = model.frozen_report()
    with pytest.raises(InputError, match=text):
        model.freeze(*arguments)
    assert model.frozen_report() == before
    with pytest.raises(InputError, match=text):
        freeze(CGCNN(width=8), *arguments)
