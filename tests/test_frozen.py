"""Readouts on frozen embeddings, and ensembles of predictors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    ConstantKernel,
    RationalQuadratic,
    WhiteKernel,
)

from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import make_batch
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.structures.elements import element_table
from crysdistill.transfer.features import CrystalFeatures
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.readouts import (
    GaussianProcess,
    Logistic,
    Scaling,
    _likelihood_and_slope,
    log_likelihood,
)
from crysdistill.transfer.seen import seen
from crysdistill.transfer.stack import Stack
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import (
    load_encoder,
    load_predictor,
    read_header,
    save_weights,
)
from tests.conftest import random_crystal
from tests.toy_stores import known_by_hash

GRAPH = GraphSettings(cutoff=8.0, max_neighbors=8)
GAP = Target("gap", "eV")
METAL = Target("metal", task="classification")


def encoder():
    torch.manual_seed(0)
    return make_encoder("cgcnn", GRAPH, width=8, convolutions=2).eval()


def batch_of(count=40, first=0):
    crystals = [
        random_crystal(seed, 1 + seed % 4) for seed in range(first, first + count)
    ]
    return make_batch(crystals, GRAPH)


def labelled(batch, *columns):
    from crysdistill.graphs.batch import replace

    return replace(batch, targets=torch.stack(columns, dim=1))


def outputs_of(targets, labels):
    return Outputs(
        targets,
        [
            Normalizer.fit(target, labels[:, t].numpy())
            for t, target in enumerate(targets)
        ],
    )


def fitted(targets=(GAP,), **more):
    batch = batch_of()
    labels = [batch.atomic_numbers[batch.ptr[:-1]].float().sqrt()]
    if len(targets) > 1:
        labels.append((labels[0] > labels[0].median()).float())
    batch = labelled(batch, *labels)
    outputs = outputs_of(targets, batch.targets)
    more = {"encoder": encoder(), **more}
    return fit(more["encoder"], [batch], outputs), batch


def fit(encoder, batches, outputs):
    known = FrozenPredictor.read(encoder, batches)
    return FrozenPredictor.fit(encoder, known, outputs, GRAPH)


# ---------------------------------------------------------------------- features


def test_features_by_hand():
    batch, known = batch_of(5), encoder()
    found = CrystalFeatures(known)(known(batch, layers=True), batch)
    layers = [x.detach().numpy() for x in known(batch, layers=True).layers]
    table = element_table("cgcnn92")
    for b in range(5):
        first, last = int(batch.ptr[b]), int(batch.ptr[b + 1])
        numbers = batch.atomic_numbers[first:last].numpy()
        parts = [np.bincount(numbers, minlength=101) / len(numbers)]
        for x in [*(x[first:last] for x in layers), table[numbers]]:
            parts += [x.mean(axis=0), x.std(axis=0)]
        np.testing.assert_allclose(
            found[b].detach(), np.concatenate(parts), atol=1e-5, rtol=1e-4
        )
    assert found.shape[1] == CrystalFeatures(known).width


def test_composition_alone_does_not_see_the_structure():
    features = CrystalFeatures(None)
    crystal = random_crystal(3, 3)
    one = features(None, make_batch([crystal], GRAPH))
    moved = random_crystal(3, 3)
    moved.frac_coords[:] = np.random.default_rng(1).random((3, 3))
    torch.testing.assert_close(one, features(None, make_batch([moved], GRAPH)))


def test_scaling():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    x[:, 1] = 7.0
    scaling = Scaling(3)
    scaling.fit(x)
    np.testing.assert_allclose(
        scaling(x)[:, 0], (x[:, 0] - x[:, 0].mean()) / x[:, 0].std(correction=0), 1e-5
    )
    assert (scaling(x)[:, 1] == 0).all()
    assert scaling(x[:1] + 1e6)[0].tolist() == [5.0, 0.0, 5.0]


# ---------------------------------------------------------------------- readouts


# scikit-learn's search ends at a bound, and so does ours.
@pytest.mark.filterwarnings(
    "ignore:The optimal value found:sklearn.exceptions.ConvergenceWarning"
)
def test_gaussian_process_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 4))
    y = np.sin(x[:, 0]) + 0.1 * random.normal(size=60)
    asked = random.normal(size=(20, 4))
    process = GaussianProcess.fit(torch.tensor(x), torch.tensor(y), seed=0)
    a, length, s, noise = process.scales.tolist()
    kernel = ConstantKernel(a) * RationalQuadratic(length, s) + WhiteKernel(noise)
    plain = GaussianProcessRegressor(kernel, optimizer=None).fit(x, y)
    square = torch.tensor(cdist(x, x, "sqeuclidean"))
    likelihood = log_likelihood(square, torch.tensor(y), process.scales)
    assert float(likelihood) == pytest.approx(plain.log_marginal_likelihood(), 1e-6)
    # At least as good as scikit-learn's optimum.
    bounds = ((1e-2, 1e3), (0.2, 200), (1e-2, 1e3))
    free = ConstantKernel(1, bounds[0]) * RationalQuadratic(2, 1, *bounds[1:])
    searched = GaussianProcessRegressor(free + WhiteKernel(0.1, (1e-5, 10))).fit(x, y)
    assert float(likelihood) > searched.log_marginal_likelihood() - 0.01
    # The search's own derivatives are those of autograd.
    logarithms = torch.tensor([0.3, 1.2, -0.4, -2.0], dtype=torch.float64)
    logarithms.requires_grad_()
    whole = log_likelihood(square, torch.tensor(y), logarithms.exp())
    whole.backward()
    value, slope = _likelihood_and_slope(square, torch.tensor(y), logarithms.detach())
    assert value == pytest.approx(whole.item(), rel=1e-10)
    torch.testing.assert_close(slope, logarithms.grad, rtol=1e-6, atol=1e-8)
    found = process(torch.tensor(asked))[:, 0]
    np.testing.assert_allclose(found, plain.predict(asked), atol=1e-4)
    # The same from the formula.
    k = a * (1 + cdist(x, x, "sqeuclidean") / (2 * s * length**2)) ** -s
    weights = np.linalg.solve(k + noise * np.eye(60), y)
    far = a * (1 + cdist(asked, x, "sqeuclidean") / (2 * s * length**2)) ** -s
    np.testing.assert_allclose(found, far @ weights, atol=1e-4)
    assert np.corrcoef(found, np.sin(asked[:, 0]))[0, 1] > 0.9


def test_gaussian_process_remembers_no_more_than_it_may(monkeypatch):
    from crysdistill.transfer import readouts

    monkeypatch.setattr(readouts, "MOST", 12)
    monkeypatch.setattr(readouts, "SEARCHED", 8)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    process = GaussianProcess.fit(x, x[:, 0], seed=0)
    assert process.known.shape == (12, 2)
    again = GaussianProcess.fit(x, x[:, 0], seed=0)
    assert torch.equal(process.weights, again.weights)
    other = GaussianProcess.fit(x, x[:, 0], seed=1)
    assert not torch.equal(process.known, other.known)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_finds_classes_that_a_line_divides(classes):
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.3).float() + (x[:, 0] > 0.9).float() * (classes == 3)
    readout = Logistic.fit(x, y, classes)
    assert readout(x).shape == (90, classes)
    assert (readout(x).argmax(dim=1) == y).float().mean() > 0.95


def test_logistic_needs_two_of_a_class():
    x = torch.randn(10, 2)
    with pytest.raises(InputError, match="class 1 has 1 training crystals but needs"):
        Logistic.fit(x, torch.tensor([1.0] + [0.0] * 9), 2)


# --------------------------------------------------------------------- predictors


def test_frozen_predictor_learns_what_the_elements_say():
    predictor, batch = fitted()
    found = predictor.outputs.predictions(predictor.answer(batch))[:, 0]
    assert np.corrcoef(found, batch.targets[:, 0])[0, 1] > 0.9


def test_labels_that_are_not_known_are_left_out():
    known, batch = fitted()
    labels = batch.targets[:, 0].clone()
    labels[:5] = float("nan")
    some = labelled(batch, labels)
    outputs = known.outputs
    one = fit(encoder(), [some], outputs)
    assert one.readouts[0].known.shape[0] == 35
    nothing = labelled(batch, torch.full((40,), float("nan")))
    with pytest.raises(InputError, match="`gap` has 0 training labels but a readout"):
        fit(encoder(), [nothing], outputs)


def test_how_batches_are_cut_does_not_matter():
    crystals = [random_crystal(seed, 1 + seed % 4) for seed in range(40)]
    whole, batch = fitted()
    parts = []
    for first in range(0, 40, 10):
        part = make_batch(crystals[first : first + 10], GRAPH)
        parts.append(labelled(part, batch.targets[first : first + 10, 0]))
    cut = fit(encoder(), parts, whole.outputs)
    torch.testing.assert_close(
        cut.answer(batch), whole.answer(batch), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("own", [True, False])
def test_saved_and_loaded(own, tmp_path):
    more = {} if own else {"encoder": None}
    predictor, batch = fitted((GAP, METAL), **more)
    path = save_weights(tmp_path / "w.safetensors", predictor)
    again, header = load_predictor(path), read_header(path)
    assert torch.equal(again.answer(batch), predictor.answer(batch))
    assert header.kind == "frozen"
    assert [one["name"] for one in header.readouts] == ["gaussian_process", "logistic"]
    assert seen(header, known_by_hash("x"))[0] == "unknown"  # it learned from labels
    if own:
        assert torch.equal(
            load_encoder(path)(batch).atoms, predictor.encoder(batch).atoms
        )
        return
    with pytest.raises(InputError, match="reads the composition alone and has no enc"):
        load_encoder(path)


def network(outputs):
    torch.manual_seed(1)
    return Predictor(encoder(), PropertyHead(8, outputs=outputs.size), outputs, GRAPH)


def test_a_stack_is_the_mean_of_its_members(tmp_path):
    frozen, batch = fitted()
    one = network(frozen.outputs).eval()
    stack = Stack([one, frozen], [3, 1])
    wanted = 0.75 * one(batch) + 0.25 * frozen(batch)
    torch.testing.assert_close(stack(batch), wanted)
    path = save_weights(tmp_path / "w.safetensors", stack)
    again = load_predictor(path)
    assert torch.equal(again.answer(batch), stack.answer(batch))
    header = read_header(path)
    assert [member.kind for member in header.members] == ["predictor", "frozen"]
    assert header.target == GAP
    with pytest.raises(InputError, match="holds 2 predictors that answer together"):
        load_encoder(path)


def test_what_does_not_go_together():
    frozen, batch = fitted()
    labels = torch.stack([batch.targets[:, 0] * 2], dim=1)
    other = network(outputs_of([GAP], labels))
    with pytest.raises(InputError, match="members of a stack have different scales"):
        Stack([frozen, other])
    with pytest.raises(InputError, match="a stack has no members"):
        Stack([])
    with pytest.raises(InputError, match=r"`shares` are \[1, -1\] but must be 2"):
        Stack([frozen, frozen], [1, -1])
    with pytest.raises(InputError, match="there are 0 readouts for 1 targets"):
        FrozenPredictor(None, [], frozen.outputs, GRAPH)


def test_damaged_readouts_are_named(tmp_path):
    predictor, _ = fitted()
    predictor.describe_readouts = lambda: [{"name": "forest", "settings": {}}]
    path = save_weights(tmp_path / "w.safetensors", predictor)
    with pytest.raises(InputError, match="`readouts` do not fit crysdistill"):
        load_predictor(path)
