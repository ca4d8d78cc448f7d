"""Heads, predictors, freezing, teachers and distillation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, make_batch
from crysdistill.transfer import (
    Distillation,
    Normalizer,
    Predictor,
    PropertyHead,
    Target,
    Teacher,
    atom_loss,
    cache_embeddings,
    fit_batch_norms,
    freeze,
    load_or_cache,
    random_teacher,
)
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
    head = PropertyHead(8, hidden=5, task=task)
    target = Target("x", task=task)
    return Predictor(body, head, target, Normalizer(), GRAPH)


# ------------------------------------------------------------------------- head


def test_parameter_counts_of_the_published_models():
    student = CGCNN(width=64, convolutions=3)
    assert parameters(student) + parameters(PropertyHead(64, 128)) == 80_833
    prl = CGCNN(width=64, convolutions=4)
    assert parameters(prl) + parameters(PropertyHead(64, 32)) == 96_641


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_the_head_equals_a_plain_second_implementation(task):
    torch.manual_seed(0)
    head = PropertyHead(4, hidden=3, layers=2, task=task).eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    head.double()

    def softplus(v):
        return np.log1p(np.exp(v))

    def linear(layer, v):
        return v @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    y = softplus(linear(head.first, softplus(x.numpy())))
    y = softplus(linear(head.middle[0], y))
    y = linear(head.last, y)
    if task == "classification":
        y = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(head(x).detach().numpy(), y, rtol=1e-10)


def test_only_a_classifier_drops_out_and_only_in_training():
    x = torch.randn(4, 8)
    for task, differs in (("regression", False), ("classification", True)):
        head = PropertyHead(8, task=task)
        assert torch.equal(head(x), head(x)) != differs
        head.eval()
        assert torch.equal(head(x), head(x))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"hidden": 0}, "`hidden` is 0 but must be at least 1"),
        ({"layers": 0}, "`layers` is 0 but must be at least 1"),
        ({"outputs": 0}, "`outputs` is 0 but must be at least 1"),
        ({"outputs": 1, "task": "classification"}, "`outputs` is 1 .* at least 2"),
        ({"dropout": 1.0}, r"`dropout` is 1.0 but must be in \[0, 1\)"),
        ({"task": "rank"}, "`task` is 'rank' but must be one of regression"),
    ],
)
def test_wrong_head_settings_are_refused(arguments, text):
    with pytest.raises(InputError, match=text):
        PropertyHead(8, **arguments)


# -------------------------------------------------------------------- predictor


def test_predictions_come_back_in_the_unit(batch):
    model = make_predictor()
    model.target = Target("bulk_modulus", "GPa", transform="log10")
    model.normalizer = Normalizer(2.0, 0.5)
    model.eval()
    raw = model(batch)
    assert raw.shape == (3, 1)
    expected = 10 ** (raw[:, 0] * 0.5 + 2.0)
    torch.testing.assert_close(model.predict(batch), expected)


def test_the_loss_is_that_of_the_normalised_transformed_target():
    model = make_predictor()
    model.target = Target("bulk_modulus", "GPa", transform="log10")
    model.normalizer = Normalizer(2.0, 0.5)
    output = torch.tensor([[0.0], [1.0], [7.0]], requires_grad=True)
    # Normalised logarithms 0 and 2, the third unknown: errors 0 and 1.
    loss = model.loss(output, torch.tensor([[100.0], [1000.0], [float("nan")]]))
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    torch.testing.assert_close(output.grad, torch.tensor([[0.0], [-1.0], [0.0]]))


def test_the_loss_of_a_classifier_is_the_mean_over_known_labels():
    model = make_predictor("classification")
    output = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]).log().requires_grad_()
    loss = model.loss(output, torch.tensor([[1.0], [0.0], [float("nan")]]))
    assert loss.item() == pytest.approx(-(np.log(0.8) + np.log(0.9)) / 2, rel=1e-5)
    loss.backward()
    assert not output.grad[2].any()


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient(task, batch):
    model = make_predictor(task)
    loss = model.loss(model(batch), torch.full((3, 1), float("nan")))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_classifier_predicts_the_probability_of_class_1(batch):
    model = make_predictor("classification").eval()
    probability = model.predict(batch)
    assert probability.shape == (3,)
    torch.testing.assert_close(probability, model(batch).exp()[:, 1])
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
    body = CGCNN(width=8)
    target = Target("x", task="classification")
    with pytest.raises(InputError, match="the head is made for regression but `x`"):
        Predictor(body, PropertyHead(8), target, Normalizer(), GRAPH)
    with pytest.raises(
        InputError, match="the head's `width` is 9 but the encoder's is 8"
    ):
        Predictor(body, PropertyHead(9), Target("x"), Normalizer(), GRAPH)


# --------------------------------------------------------------------- freezing


def changed_by_a_step(model: Predictor, batch) -> set[str]:
    before = copy.deepcopy(model.state_dict())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, weight_decay=0.1)
    model.train()
    model.loss(model(batch), torch.tensor([[1.0], [2.0], [3.0]])).backward()
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
    before = model.encoder(batch).detach()
    model.freeze("all")
    model.train()  # as Lightning does
    torch.testing.assert_close(model.encoder(batch), before)
    wrapped = nn.ModuleDict({"inner": copy.deepcopy(model)}).train()
    torch.testing.assert_close(wrapped["inner"].encoder(batch), before)
    model.freeze("all", "adaptive")
    assert not torch.allclose(model.encoder(batch), before, atol=1e-3)


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
    model.encoder.embedding.bias.requires_grad_(False)  # by someone else
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


# ----------------------------------------------------------------- distillation


def test_the_loss_of_unit_vectors_is_two_minus_two_cosines(batch):
    torch.manual_seed(0)
    n, width = batch.num_nodes, 8
    student, teacher = torch.randn(n, width), torch.randn(n, width)
    cosine = F.cosine_similarity(student, teacher, dim=1)
    per_atom = 2 * (1 - cosine) / width
    per_crystal = torch.stack([per_atom[batch.batch == b].mean() for b in range(3)])
    torch.testing.assert_close(atom_loss(student, teacher, batch), per_crystal.mean())


def test_the_loss_sees_directions_only_and_weighs_crystals_alike(batch):
    torch.manual_seed(0)
    atoms = torch.randn(batch.num_nodes, 8)
    scale = torch.rand(batch.num_nodes, 1) + 0.1
    loss = atom_loss(atoms * scale, atoms, batch)
    assert float(loss) == pytest.approx(0, abs=1e-12)
    # Opposite in one of three crystals: 4 / F there, whatever its number of atoms.
    for b in range(3):
        sign = torch.where(batch.batch == b, -1.0, 1.0).unsqueeze(1)
        loss = atom_loss(atoms * sign, atoms, batch)
        assert float(loss) == pytest.approx(4 / 8 / 3, rel=1e-5)


def test_alpha_weighs_the_embedding_loss():
    two, ten = torch.tensor(2.0), torch.tensor(10.0)
    for alpha, total in ((0.0, 2.0), (0.25, 4.0), (1.0, 10.0)):
        assert float(Distillation(8, 8, alpha).total(two, ten)) == total


def test_the_projector_is_there_only_where_it_is_needed(batch):
    assert parameters(Distillation(8, 8)) == 0
    assert parameters(Distillation(8, 8, projector=True)) == 8 * 8 + 8
    distillation = Distillation(8, 12)
    assert parameters(distillation) == 8 * 12 + 12
    student = torch.randn(batch.num_nodes, 8)
    teacher = torch.randn(batch.num_nodes, 12)
    loss = distillation(student, teacher, batch)
    expected = atom_loss(distillation.projector(student), teacher, batch)
    torch.testing.assert_close(loss, expected)


def test_wrong_distillations_are_refused(batch):
    with pytest.raises(InputError, match=r"`alpha` is 1.5 but must be in \[0, 1\]"):
        Distillation(8, 8, alpha=1.5)
    with pytest.raises(InputError, match=r"loss 'atom'; .* did you mean `atoms`"):
        Distillation(8, 8, loss="atom")
    n = batch.num_nodes
    text = rf"embeddings are \({n - 1}, 8\) but this batch needs \({n}, 8\)"
    with pytest.raises(InputError, match=text):
        Distillation(8, 8)(torch.randn(n, 8), torch.randn(n - 1, 8), batch)


def test_a_teacher_stays_as_it_is(batch):
    torch.manual_seed(0)
    encoder = CGCNN(width=8)
    teacher = Teacher(encoder, GRAPH)
    before = teacher.fingerprint()
    answer = teacher(batch)
    assert not answer.requires_grad
    teacher.train()
    teacher.encoder.train()  # somebody who does not know
    assert torch.equal(teacher(batch), answer)
    assert not teacher.encoder.training
    assert teacher.fingerprint() == before
    # Crystals are answered for one by one: the rest of the batch has no say.
    alone = make_batch([random_crystal(0, atoms=3)], GRAPH)
    torch.testing.assert_close(teacher(alone), answer[:3])
    # The encoder it was made from goes its own way.
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())


def test_a_teacher_is_no_part_of_the_module_that_holds_it(batch):
    student = make_predictor()
    names = set(student.state_dict())
    student.teacher = random_teacher(student.encoder.settings, seed=1)
    assert set(student.state_dict()) == names
    atoms, _ = student.embed(batch)
    Distillation(8, 8)(atoms, student.teacher(batch), batch).backward()
    assert student.encoder.embedding.weight.grad.any()
    assert all(p.grad is None for p in student.teacher.encoder.parameters())


def test_random_teachers_depend_on_their_seed_alone(batch):
    settings = CGCNN(width=8).settings
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = random_teacher(settings, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert one.fingerprint() == random_teacher(settings, seed=1).fingerprint()
    assert one.fingerprint() != random_teacher(settings, seed=2).fingerprint()
    with_graph = random_teacher(settings, seed=1, graph=GRAPH)
    assert one.fingerprint() != with_graph.fingerprint()


def test_batch_norms_of_a_random_teacher_are_fitted_to_the_crystals(batch):
    settings = CGCNN(width=8).settings
    other = some_batch(5, 6)
    teacher = random_teacher(settings, seed=1, batches=[batch, other])
    torch.manual_seed(1)
    plain = CGCNN(**settings)
    norm = plain.convolutions[0].atom_norm
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    plain(batch)
    plain(other)
    fitted = teacher.encoder.convolutions[0].atom_norm
    mean = (seen[0].mean(0) + seen[1].mean(0)) / 2
    torch.testing.assert_close(fitted.running_mean, mean)
    assert fitted.momentum == norm.momentum


# ------------------------------------------------------------------------ cache


def test_the_cache_gives_what_the_teacher_would_say():
    teacher = random_teacher(CGCNN(width=8).settings, seed=0)
    cache = cache_embeddings(teacher, [some_batch(4, 2), some_batch(7)])
    assert (len(cache), cache.width) == (3, 8)
    asked = some_batch(7, 4, 2, 4)
    torch.testing.assert_close(cache.gather(asked.rows), teacher(asked))


@pytest.mark.parametrize("row", [3, 8, -1])
def test_a_crystal_outside_the_cache_is_named(row):
    teacher = random_teacher(CGCNN(width=8).settings, seed=0)
    cache = cache_embeddings(teacher, [some_batch(4, 2)])
    with pytest.raises(
        InputError, match=f"row {row} of the store has no cached teacher"
    ):
        cache.gather(torch.tensor([4, row]))


def test_the_cache_file_serves_only_what_it_was_made_for(tmp_path):
    path = tmp_path / "teacher.safetensors"
    settings = CGCNN(width=8).settings
    teacher = random_teacher(settings, seed=0)
    rows = torch.tensor([4, 2])
    asked = []

    def batches():
        asked.append(1)
        yield some_batch(4, 2)

    def load(who, which, source):
        return load_or_cache(path, who, which, batches(), source)

    first = load(teacher, rows, "a")
    again = load(teacher, rows, "a")
    assert len(asked) == 1
    assert torch.equal(first.embeddings, again.embeddings)
    torch.testing.assert_close(again.gather(rows), teacher(some_batch(4, 2)))
    load(teacher, rows, "b")
    load(random_teacher(settings, seed=1), rows, "b")
    load(teacher, rows.flip(0), "b")
    assert len(asked) == 4
    path.write_bytes(path.read_bytes()[:-5])
    load(teacher, rows.flip(0), "b")
    assert len(asked) == 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_cache_without_crystals_is_refused():
    teacher = random_teacher(CGCNN(width=8).settings, seed=0)
    with pytest.raises(InputError, match="no crystals to compute teacher embeddings"):
        cache_embeddings(teacher, [])
