"""DeeperGATGNN against the published program and a plain form; its settings."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_encoders.deeper_gatgnn import PlainDeeperGATGNN
from crysdistill.encoders.deeper_gatgnn import DeeperGATGNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, composition, make_batch
from crysdistill.layers.attention import find_ends
from crysdistill.structures.crystal import Crystal
from crysdistill.transfer.heads import PropertyHead
from tests.conftest import random_crystal
from tests.reference_outputs import agree, load_reference

# Tensors of each of the three group norms that the published program never uses.
IDLE = {"lin.weight": (10, 64), "norm.weight": (640,), "norm.bias": (640,)}


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("convolutions", "created"), [(20, 737_186), (25, 913_546), (30, 1_089_906)]
)
def test_weights_at_the_published_settings(convolutions, created):
    encoder = DeeperGATGNN(**DeeperGATGNN.PUBLISHED, convolutions=convolutions)
    head = PropertyHead(encoder.crystal_width, **DeeperGATGNN.HEAD)
    idle = 3 * sum(torch.Size(shape).numel() for shape in IDLE.values())
    assert idle == 5_760
    assert parameters(encoder, head) + idle == created


@pytest.mark.parametrize(("convolutions", "created"), [(25, 863_370), (30, 1_030_770)])
def test_weights_of_the_gatgnn_of_matdeeplearn(convolutions, created):
    """Its global attention has three unused batch norms."""
    encoder = DeeperGATGNN(
        **DeeperGATGNN.PUBLISHED, convolutions=convolutions, norm="batch", skip=False
    )
    assert parameters(encoder) + 65 + 3 * 2 * 64 == created


FOLDERS = {
    "DeeperGATGNN": {"convolutions": 3},
    "DeeperGATGNN_set2set": {"convolutions": 2, "pooling": "published_set2set"},
}


def ours(weights: dict[str, Tensor], **settings) -> DeeperGATGNN:
    """Our encoder with published weights."""
    renamed = {
        "pre_lin_list_N.0": "embedding.atoms.linear",
        "pre_lin_list_E.0": "embedding.edges",
        "global_att_LAYER.global_mlp.0": "pooling.attention.first",
        "global_att_LAYER.global_mlp.1": "pooling.attention.rest.0",
        "global_att_LAYER.global_mlp.2": "pooling.attention.rest.1",
        "set2set.lstm": "pooling.set2set.lstm",
    }
    for k in range(settings["convolutions"]):
        renamed[f"conv_list.{k}"] = f"convolutions.{k}.attention"
        renamed[f"conv_list.{k}.bn1"] = f"convolutions.{k}.attention.norm"
        renamed[f"bn_list.{k}.lin"] = f"convolutions.{k}.norm.assign"
        renamed[f"bn_list.{k}.norm"] = f"convolutions.{k}.norm.norm"
    encoder = DeeperGATGNN(width=16, **{**DeeperGATGNN.PUBLISHED, **settings})
    table = "embedding.atoms.element_table"
    state = {table: encoder.state_dict()[table]}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        if module not in renamed:
            idle = ("global_att_LAYER.bn_list", "lin_out", "post_lin_list")
            assert name.startswith(idle), name
        elif part == "W":
            state[f"{renamed[module]}.weight"] = value.T
        elif part == "att":
            state[f"{renamed[module]}.score"] = value[0]
        else:
            state[f"{renamed[module]}.{part.removesuffix('_l0')}"] = value
    encoder.load_state_dict(state)
    return encoder.eval()


@pytest.mark.parametrize("folder", FOLDERS)
def test_equals_the_published_program(shared_data, folder):
    weights, inputs, outputs, batch = load_reference(shared_data, folder, receiver=0)
    encoder = ours(weights, **FOLDERS[folder])
    shares = composition(batch, 108)
    torch.testing.assert_close(shares[batch.batch], inputs["glob_feat"])
    with torch.no_grad():
        x = encoder.embedding.atoms.linear(inputs["x"])
        edges = encoder.embedding.edges(inputs["edge_attr"])
        u = find_ends(inputs["edge_attr"], torch.arange(len(edges)), batch)
        found = encoder.encode(x, u, batch, layers=True)
        attention = encoder.pooling.attention(found.atoms, shares, batch)
        first = encoder.convolutions[0]
        heard = first.attention(
            found.layers[0], encoder.embedding.embed_edges(u), batch
        )
        normalised = first.norm(heard)
    agree(x, outputs["atoms_embedded_before_leaky_relu"])
    agree(edges, outputs["edges_embedded_before_leaky_relu"])
    agree(heard, outputs["agat_0_raw"])
    agree(normalised, outputs["agat_0_after_norm"])
    assert len(found.layers) == 1 + FOLDERS[folder]["convolutions"]
    for k, layer in enumerate(found.layers[1:]):
        agree(layer, outputs[f"atoms_after_block_{k}"])
    agree(attention, outputs["global_attention"])
    agree(found.crystals, outputs["pooled"])
    pooled = found.crystals
    for k in range(2 if "set2set" in folder else 0):
        name = f"post_lin_list.{k}"
        pooled = F.softplus(
            F.linear(pooled, weights[f"{name}.weight"], weights[f"{name}.bias"])
        )
    result = F.linear(pooled, weights["lin_out.weight"], weights["lin_out.bias"])
    agree(result.squeeze(1), outputs["output"])


def test_our_own_features_are_the_published_ones(shared_data):
    """Computed on the published graph, without edges from atoms to themselves."""
    weights, inputs, outputs, batch = load_reference(
        shared_data, "DeeperGATGNN", receiver=0
    )
    longest = inputs["edge_weight"].max().item()
    encoder = ours(
        weights,
        convolutions=3,
        cutoff=longest,
        gaussian_width=longest * 0.2 * math.sqrt(2),
    )
    u = encoder.expansion(inputs["edge_weight"])
    torch.testing.assert_close(u, inputs["edge_attr"], atol=2e-6, rtol=0)
    others = copy.copy(batch)
    others.edge_index = batch.edge_index[:, batch.edge_index[0] != batch.edge_index[1]]
    others.neighbor_ptr = batch.neighbor_ptr - torch.arange(batch.num_nodes + 1)
    assert int(others.neighbor_ptr[-1]) == others.num_edges
    with torch.no_grad():
        x = encoder.embedding.atoms(others)
    agree(x, outputs["atoms_embedded_before_leaky_relu"])


def gradients(y: tuple[Tensor, Tensor], weights: list[Tensor]) -> list[Tensor]:
    loss = sum(
        (part * torch.linspace(-1, 1, part.shape[1])).square().sum() for part in y
    )
    return list(torch.autograd.grad(loss, weights))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "batch", "skip": False, "degrees": 14},
        {"norm": "none", "pooling": "set2set"},
        {"skip": False, "pooling": "published_set2set"},
    ],
)
def test_equals_the_plain_form(settings, training):
    torch.manual_seed(0)
    crystals = [random_crystal(seed, 1 + seed) for seed in range(4)]
    batch = make_batch(crystals, GraphSettings(5.0, 8))
    batch.frac_coords, batch.cell = batch.frac_coords.double(), batch.cell.double()
    encoder = DeeperGATGNN(
        width=12, convolutions=3, cutoff=5.0, gaussians=20, **settings
    ).double()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.dim() == 1:  # to notice swapped norms
                weight.add_(0.2 * torch.randn_like(weight))
            elif "score" in name:  # make attention uneven
                weight.mul_(5)
    plain = PlainDeeperGATGNN(encoder)
    encoder.train(training), plain.train(training)
    found = encoder(batch)
    one, other = (found.atoms, found.crystals), plain(batch)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    first, last = encoder.convolutions[0].attention, encoder.pooling.attention
    mine = gradients(
        one,
        [
            encoder.embedding.atoms.linear.weight,
            encoder.embedding.edges.weight,
            *first.parameters(),
            *last.parameters(),
        ],
    )
    theirs = gradients(
        other,
        [
            plain.atoms.weight,
            plain.edges.weight,
            *plain.attention[0].parameters(),
            *plain.weigh.parameters(),
        ],
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    ("pooling", "same"),
    [("attention", True), ("set2set", True), ("published_set2set", False)],
)
def test_only_the_published_set2set_depends_on_the_cell(pooling, same):
    torch.manual_seed(0)
    encoder = DeeperGATGNN(width=16, convolutions=2, pooling=pooling).eval()
    one = random_crystal(3, 4)
    halves = one.frac_coords / np.array([2, 1, 1])
    twice = Crystal(
        material_id="twice",
        atomic_numbers=np.tile(one.atomic_numbers, 2),
        frac_coords=np.concatenate((halves, halves + np.array([0.5, 0, 0]))),
        cell=one.cell * np.array([[2], [1], [1]]),
    )
    with torch.no_grad():
        one, two = encoder(make_batch([one, twice])).crystals
    assert torch.allclose(one, two, atol=1e-5, rtol=1e-4) == same


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_fifty_layers_learn(norm):
    torch.manual_seed(0)
    batch = make_batch(
        [random_crystal(seed, 4) for seed in range(4)], GraphSettings(5.0, 8)
    )
    encoder = DeeperGATGNN(width=16, convolutions=50, cutoff=5.0, norm=norm)
    layers = encoder(batch, layers=True).layers
    layers[-1].mean().backward()
    for name, weight in encoder.named_parameters():
        if not name.startswith("pooling"):
            assert torch.isfinite(weight.grad).all(), name
    first = encoder.convolutions[0].attention.weight.grad
    assert first.abs().max() > 1e-6
    growth = layers[-1].abs().mean() / layers[1].abs().mean()
    # As published, each layer adds a share of its input.
    assert growth > 1e4 if norm == "group" else growth < 1e2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"convolutions": 0}, r"`convolutions` is 0 but must be at least 1"),
        ({"heads": 0}, r"`heads` is 0 but must be at least 1"),
        ({"gaussians": 1}, r"`gaussians` is 1 but must be at least 2"),
        ({"cutoff": 0.0}, r"`cutoff` is 0\.0 but must be positive"),
        ({"norm": "grop"}, r"`norm` is 'grop'.*did you mean `group`\?"),
        ({"pooling": "mean"}, r"`pooling` is 'mean' but must be one of attention, "),
        ({"degrees": -1}, r"`degrees` is -1 but must be at least 0"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        DeeperGATGNN(**settings)
