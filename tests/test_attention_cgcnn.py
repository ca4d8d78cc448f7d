"""CGCNN with attention: worked examples, a plain form, and its weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_encoders.attention_cgcnn import PlainAttentionCGCNN
from crysdistill.encoders.attention_cgcnn import (
    AttentionCGCNN,
    AttentionConvolution,
    Lengths,
)
from crysdistill.encoders.cgcnn import GatedConvolution
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch
from crysdistill.transfer.heads import PropertyHead
from tests.conftest import random_crystal


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_a_published_convolution_has_half_the_weights_of_cgcnn():
    encoder = AttentionCGCNN(**AttentionCGCNN.PUBLISHED)
    ours, cgcnn = encoder.convolutions[0], GatedConvolution(64, 41)
    assert 2 * parameters(ours) == parameters(cgcnn) == 2 * (169 * 64 + 64)
    head = PropertyHead(encoder.crystal_width, **AttentionCGCNN.HEAD)
    # Two of the 92 columns of the element table are zero for all elements.
    assert parameters(encoder, head) == (90 * 64 + 64) + 4 * 10_880 + 8_320 + 129


def star(features: list[list[float]]) -> CrystalBatch:
    """Only atom 0 receives messages, one from each other atom."""
    others = len(features) - 1
    counts = [others] + [0] * others
    return CrystalBatch(
        x=torch.tensor(features),
        edge_index=torch.tensor([list(range(1, others + 1)), [0] * others]),
        batch=torch.zeros(others + 1, dtype=torch.int64),
        ptr=torch.tensor([0, others + 1]),
        neighbor_ptr=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]),
        num_nodes=others + 1,
    )


def convolution(heads: int = 1, scores: str = "published") -> AttentionConvolution:
    layer = AttentionConvolution(2, 3, heads, scores, "none")
    nn.init.zeros_(layer.core.weight)
    nn.init.zeros_(layer.core.bias)
    return layer


SAME_LENGTH = Lengths(torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([0, 0]))


def test_shares_sum_to_one():
    """If every message is 1, atom 0 receives 1."""
    layer = convolution()
    nn.init.constant_(layer.core.bias, math.log(math.e - 1))  # softplus of this is 1
    batch = star([[0.3, 2.0], [5.0, 1.0], [-1.0, 7.0]])
    found = layer(batch.x, SAME_LENGTH, batch)
    expected = batch.x + torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_published_shares_of_a_worked_example():
    # <u, u> = 1.25, so the scores are 1.25 * 0.8 * ln 3 = ln 3, and 0.
    batch = star([[1.0, 0.0], [0.8 * math.log(3), 9.0], [0.0, -4.0]])
    layer = convolution()
    scores = layer.scores(batch.x, SAME_LENGTH, batch)
    torch.testing.assert_close(scores, torch.tensor([[math.log(3)], [0.0]]))
    with torch.no_grad():
        layer.core.weight[0, 3] = 1.0  # channel 0 reads v_j[1]
    found = layer(batch.x, SAME_LENGTH, batch)
    heard = 0.75 * F.softplus(torch.tensor(9.0)) + 0.25 * F.softplus(torch.tensor(-4.0))
    torch.testing.assert_close(found[0, 0], 1.0 + heard)
    torch.testing.assert_close(found[0, 1].item(), math.log(2))


def test_published_scores_grow_with_the_length_of_u():
    batch = star([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    lengths = Lengths(torch.tensor([[1.0, 0, 0], [0, 2.0, 0]]), torch.tensor([1, 0]))
    scores = convolution().scores(batch.x, lengths, batch)
    torch.testing.assert_close(scores, torch.tensor([[4.0], [1.0]]))


def test_published_scores_do_not_overflow():
    """Where exp overflows, the neighbour with the highest score gets it all."""
    batch = star([[30.0, 0.0], [30.0, 1.0], [29.0, 2.0]])
    layer = convolution()
    assert torch.exp(layer.scores(batch.x, SAME_LENGTH, batch)).isinf().all()
    with torch.no_grad():
        layer.core.weight[0, 3] = 1.0
    found = layer(batch.x, SAME_LENGTH, batch)
    torch.testing.assert_close(found[0, 0], 30.0 + F.softplus(torch.tensor(1.0)))


def test_scaled_scores_of_a_worked_example():
    batch = star([[2.0, 3.0], [5.0, 7.0], [1.0, -1.0]])
    layer = convolution(heads=2, scores="scaled")
    with torch.no_grad():
        layer.radial.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [4.0, 2.0, 1.0]]))
    scores = layer.scores(batch.x, SAME_LENGTH, batch)
    torch.testing.assert_close(scores, torch.tensor([[10.0, 21 + 5], [2.0, -3 + 5]]))
    one = convolution(heads=1, scores="scaled")
    nn.init.zeros_(one.radial.weight)
    scores = one.scores(batch.x, SAME_LENGTH, batch)
    torch.testing.assert_close(scores, torch.tensor([[31.0], [-1.0]]) / math.sqrt(2))


def test_the_published_exponent_hardly_knows_the_distance():
    encoder = AttentionCGCNN()
    squares = encoder.expansion(torch.linspace(0.5, 7.5, 1000)).square().sum(dim=1)
    centre = math.sqrt(math.pi / 2)
    assert (squares / centre - 1).abs().max() < 0.015


def gradients(y: tuple[Tensor, Tensor], weights: list[Tensor]) -> list[Tensor]:
    loss = sum(
        (part * torch.linspace(-1, 1, part.shape[1])).square().sum() for part in y
    )
    return list(torch.autograd.grad(loss, weights))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": "group"}, AttentionCGCNN.PUBLISHED, {"norm": "none", "heads": 2}],
)
def test_equals_the_plain_form(settings, training):
    torch.manual_seed(0)
    crystals = [random_crystal(seed, 1 + seed) for seed in range(4)]
    batch = make_batch(crystals, GraphSettings(5.0, 8))
    batch.frac_coords, batch.cell = batch.frac_coords.double(), batch.cell.double()
    encoder = AttentionCGCNN(width=12, convolutions=3, cutoff=5.0, **settings).double()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
            elif "radial" in name:  # make attention depend on distance
                weight.mul_(5)
    plain = PlainAttentionCGCNN(encoder)
    encoder.train(training), plain.train(training)
    found = encoder(batch)
    one, other = (found.atoms, found.crystals), plain(batch)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    radial = [layer.radial for layer in encoder.convolutions if layer.radial]
    mine = gradients(
        one,
        [
            *encoder.embedding.linear.parameters(),
            *(layer.core.weight for layer in encoder.convolutions),
            *(layer.weight for layer in radial),
        ],
    )
    theirs = gradients(
        other,
        [
            *plain.embedding.parameters(),
            *(core.weight for core in plain.core),
            *(layer.weight for layer in plain.radial),
        ],
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 0}, r"`width` is 0 but must be at least 1"),
        ({"heads": 0}, r"`heads` is 0 but must be at least 1"),
        (
            {"width": 64, "heads": 5},
            r"`width` is 64 but must be a multiple of `heads`, 5",
        ),
        ({"scores": "sclaed"}, r"`scores` is 'sclaed'.*did you mean `scaled`\?"),
        ({"norm": "layer"}, r"`norm` is 'layer' but must be one of none, batch, group"),
        ({"spacing": -0.1}, r"`spacing` is -0\.1 but must be positive"),
        ({"elements": "magpie"}, r"`elements` is 'magpie' but must be one of cgcnn92"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        AttentionCGCNN(**settings)
