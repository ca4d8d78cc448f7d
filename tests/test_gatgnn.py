"""GATGNN against the published program and a plain form; its invariances."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_encoders.gatgnn import PlainGATGNN
from crysdistill.encoders.gatgnn import GATGNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    GraphSettings,
    composition,
    gather_crystals,
    make_batch,
    sum_over_atoms,
)
from crysdistill.layers.attention import find_ends
from crysdistill.transfer.heads import PropertyHead
from tests.conftest import random_crystal
from tests.reference_outputs import Reference, agree, load_reference

# Tensors that the published program never uses at its published settings.
IDLE = {
    "cluster_att.layer_1.weight": (64, 64),
    "cluster_att.layer_1.bias": (64,),
    "cluster_att.atten_layer.weight": (1, 64),
    "cluster_att.atten_layer.bias": (1,),
    "cluster_att.learn_unpool.weight": (3, 131),
    "cluster_att.learn_unpool.bias": (3,),
    "embed_comp.weight": (64, 103),
    "embed_comp.bias": (64,),
}


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("convolutions", "used", "created"), [(3, 122_874, 134_154), (5, 189_834, 201_116)]
)
def test_weights_at_the_published_settings(convolutions, used, created):
    encoder = GATGNN(**{**GATGNN.PUBLISHED, "convolutions": convolutions})
    head = PropertyHead(encoder.crystal_width, **GATGNN.HEAD)
    assert parameters(encoder, head) == used
    idle = sum(torch.Size(shape).numel() for shape in IDLE.values())
    assert used + idle + convolutions == created  # one PReLU for each convolution


def test_weights_of_a_classifier_on_short_edges():
    encoder = GATGNN(cutoff=4.0, spacing=0.5)
    head = PropertyHead(encoder.crystal_width, outputs=2, **GATGNN.HEAD)
    idle = sum(torch.Size(shape).numel() for shape in IDLE.values())
    assert parameters(encoder, head) + idle + 3 == 132_171


def ours(weights: dict[str, Tensor], **settings) -> GATGNN:
    """Our encoder with published weights."""
    renamed = {
        "embed_n": "embedding.atoms",
        "embed_e": "embedding.edges",
        "comp_atten.node_layer1": "pooling.attention.first",
        "comp_atten.atten_layer": "pooling.attention.rest.0",
    }
    if settings.get("join_composition"):
        renamed["embed_comp"] = "pooling.composition"
    for k in range(settings["convolutions"]):
        renamed[f"node_att.{k}"] = f"convolutions.{k}.attention"
        renamed[f"node_att.{k}.bn1"] = f"convolutions.{k}.attention.norm"
        renamed[f"batch_norm.{k}"] = f"convolutions.{k}.norm"
    encoder = GATGNN(width=16, **settings)
    state = {"embedding.element_table": encoder.embedding.element_table}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        if module not in renamed:
            assert module.split(".")[0] in IDLE_MODULES or part == "prelu", name
        elif part == "W":
            state[f"{renamed[module]}.weight"] = value.T
        elif part == "att":
            state[f"{renamed[module]}.score"] = value[0]
        else:
            state[f"{renamed[module]}.{part}"] = value
    encoder.load_state_dict(state)
    return encoder.eval()


IDLE_MODULES = ("cluster_att", "embed_comp", "linear1", "linear2", "out", "node_att")


def head(weights: dict[str, Tensor], pooled: Tensor) -> Tensor:
    """The published layers after the pooling."""
    for name in ("linear1", "linear2"):
        pooled = F.softplus(
            F.linear(pooled, weights[f"{name}.weight"], weights[f"{name}.bias"])
        )
    return F.linear(pooled, weights["out.weight"], weights["out.bias"]).squeeze(1)


SETTINGS = {
    "GATGNN": {"convolutions": 3, "heads": 4},
    "GATGNN_megnet_edges_classifier": {
        "convolutions": 2,
        "heads": 4,
        "cutoff": 4.0,
        "spacing": 0.5,
    },
    "GATGNN_cluster_fixed": {
        "convolutions": 2,
        "heads": 2,
        "join_composition": True,
    },
}


def read(shared_data, folder: str) -> tuple[Reference, GATGNN]:
    reference = load_reference(shared_data, folder, receiver=0)
    encoder = ours(reference.weights, **SETTINGS[folder])
    # Our features equal the inputs of the published program.
    table = encoder.embedding.element_table[reference.batch.atomic_numbers]
    assert torch.equal(table, reference.inputs["x"])
    shares = composition(reference.batch, 104)[:, 1:]
    torch.testing.assert_close(shares, reference.inputs["global_feature"])
    return reference, encoder


@pytest.mark.parametrize("folder", SETTINGS)
def test_atoms_equal_those_of_the_published_program(shared_data, folder):
    (_, inputs, outputs, batch), encoder = read(shared_data, folder)
    with torch.no_grad():
        x = encoder.embedding.embed_atoms(batch)
        edges = encoder.embedding.edges(inputs["edge_attr"])
        u = find_ends(inputs["edge_attr"], torch.arange(len(edges)), batch)
        found = encoder.encode(x, u, batch, layers=True)
        attended = encoder.convolutions[0].attention(
            x, encoder.embedding.embed_edges(u), batch
        )
    agree(x, outputs["atoms_embedded"])
    agree(edges, outputs["edges_embedded_before_leaky_relu"])
    agree(attended, outputs["agat_0_raw"])
    assert len(found.layers) == 1 + SETTINGS[folder]["convolutions"]
    for k, layer in enumerate(found.layers[1:]):
        agree(layer, outputs[f"atoms_after_block_{k}"])


@pytest.mark.parametrize("folder", ["GATGNN", "GATGNN_megnet_edges_classifier"])
def test_crystals_equal_those_of_the_published_program(shared_data, folder):
    (weights, inputs, outputs, batch), encoder = read(shared_data, folder)
    places = torch.arange(batch.num_edges)
    with torch.no_grad():
        x, u = encoder.embedding.embed_atoms(batch), inputs["edge_attr"]
        found = encoder.encode(x, find_ends(u, places, batch), batch)
        attention = encoder.pooling.attention(
            found.atoms, inputs["global_feature"], batch
        )
    agree(attention, outputs["composition_attention"])
    agree(found.crystals, outputs["pooled"])
    agree(head(weights, found.crystals), outputs["output"])


def test_the_composition_is_joined_as_in_the_published_program(shared_data):
    """Checked after the published cluster attention, which we do not have."""
    (weights, inputs, outputs, batch), encoder = read(
        shared_data, "GATGNN_cluster_fixed"
    )
    x = outputs["atoms_after_block_1"] * outputs["cluster_attention"]
    # The cluster attention also sums to one.
    total = sum_over_atoms(outputs["cluster_attention"], batch)
    torch.testing.assert_close(total, torch.ones_like(total))
    with torch.no_grad():
        mean = sum_over_atoms(x, batch)
        agree(mean, outputs["pooled"][:, :16])
        pooled = encoder.pooling.join(mean, inputs["global_feature"])
    agree(pooled, outputs["pooled"])
    agree(head(weights, pooled), outputs["output"])


def test_our_own_edge_features_are_the_published_ones(shared_data):
    (_, inputs, _, _), encoder = read(shared_data, "GATGNN")
    u = encoder.expansion(inputs["distance"].float())
    torch.testing.assert_close(u, inputs["edge_attr"], atol=1e-5, rtol=0)


def gradients(y: tuple[Tensor, Tensor], module: nn.Module) -> dict[str, Tensor]:
    loss = sum(
        (part * torch.linspace(-1, 1, part.shape[1])).square().sum() for part in y
    )
    names = [name for name, _ in module.named_parameters()]
    found = torch.autograd.grad(loss, [p for _, p in module.named_parameters()])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["shells", "radius"])
def test_equals_the_plain_form(mode, training, join):
    torch.manual_seed(0)
    crystals = [random_crystal(seed, 1 + seed) for seed in range(4)]
    batch = make_batch(crystals, GraphSettings(5.0, 8, mode))
    batch.frac_coords, batch.cell = batch.frac_coords.double(), batch.cell.double()
    encoder = GATGNN(width=12, cutoff=5.0, join_composition=join).double()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.dim() == 1:  # to notice swapped norms
                weight.add_(0.2 * torch.randn_like(weight))
            elif "score" in name:  # make attention uneven
                weight.mul_(5)
    plain = PlainGATGNN(encoder)
    encoder.train(training), plain.train(training)
    found = encoder(batch)
    one, other = (found.atoms, found.crystals), plain(batch)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    mine, theirs = gradients(one, encoder), gradients(other, plain)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-7, rtol=1e-7)


def test_attention_of_a_whole_crystal_sees_its_composition():
    torch.manual_seed(0)
    encoder = GATGNN(width=8).eval()
    batch = make_batch([random_crystal(1, 5), random_crystal(2, 3)])
    x = torch.randn(batch.num_nodes, 8)
    shares = torch.rand(2, 103)
    with torch.no_grad():
        one = encoder.pooling.attention(x, shares, batch)
        shares[1] += 1
        other = encoder.pooling.attention(x, shares, batch)
    total = gather_crystals(sum_over_atoms(one, batch), batch)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert torch.equal(one[:5], other[:5])
    assert (one[5:] - other[5:]).abs().max() > 1e-4


def test_atoms_without_edges_have_the_bias():
    torch.manual_seed(0)
    batch = make_batch([random_crystal(1, 3)])
    kept = batch.edge_index[1] != 1
    lonely = copy.copy(batch)
    lonely.edge_index = batch.edge_index[:, kept]
    lonely.edge_shift = batch.edge_shift[kept]
    counts = torch.bincount(lonely.edge_index[1], minlength=3)
    lonely.neighbor_ptr = torch.cat((counts[:0], torch.tensor([0]), counts.cumsum(0)))
    encoder = GATGNN(width=8).eval()
    layer = encoder.convolutions[0].attention
    with torch.no_grad():
        x, u = encoder.features(lonely)
        found = layer(x, encoder.embedding.embed_edges(u), lonely)
    assert torch.equal(found[1], layer.bias)
    assert (found[0] - layer.bias).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 0}, r"`width` is 0 but must be at least 1"),
        ({"convolutions": 0}, r"`convolutions` is 0 but must be at least 1"),
        ({"heads": 0}, r"`heads` is 0 but must be at least 1"),
        ({"cutoff": -1.0}, r"`cutoff` is -1\.0 but must be positive"),
        ({"spacing": 0.0}, r"`spacing` is 0\.0 but must be positive"),
        ({"elements": "onehto"}, r"`elements` is 'onehto'.*did you mean `onehot`\?"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        GATGNN(**settings)
