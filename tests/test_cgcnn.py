"""The CGCNN encoder against a plain implementation; its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pymatgen.core import Structure
from torch import nn

from crysdistill.encoders import CGCNN, make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, distances, make_batch, replace
from crysdistill.structures.elements import cgcnn92, element_table, onehot
from tests.conftest import from_structure, random_crystal, structures


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_published_encoders():
    # 92 x 64 weights, 64 biases, and 22,144 for each convolution.
    assert parameters(CGCNN()) == 92 * 64 + 64 + 3 * 22_144
    crysgnn = CGCNN(convolutions=5, bias=False, normalize=True)
    assert parameters(crysgnn) == 5_888 + 5 * 22_144


def plain(encoder: CGCNN, batch, kind: str) -> torch.Tensor:
    """Follow the equations edge by edge, with one concatenation for each."""
    x = encoder.embedding(encoder.element_table)[batch.atomic_numbers]
    centres = torch.arange(41) * 0.2
    u = torch.exp(-((distances(batch)[:, None] - centres) ** 2) / 0.2**2)
    for layer in encoder.convolutions:
        edges = list(zip(*batch.edge_index.tolist(), strict=True))
        if kind == "eq4":
            new = []
            for i in range(batch.num_nodes):
                total = sum(
                    torch.cat((x[j], u[e])) for e, (j, k) in enumerate(edges) if k == i
                )
                new.append(F.softplus(layer.neighbour(total) + layer.centre(x[i])))
            x = torch.stack(new)
            continue
        z = torch.stack(
            [torch.cat((x[i], x[j], u[e])) for e, (j, i) in enumerate(edges)]
        )
        gate, core = layer.gate(z), layer.core(z)
        if kind == "published":
            gate, core = layer.gate_norm(gate), layer.core_norm(core)
        message = torch.sigmoid(gate) * F.softplus(core)
        total = [
            message[[e for e, (_, k) in enumerate(edges) if k == i]].sum(0)
            for i in range(batch.num_nodes)
        ]
        if kind == "published":
            x = F.softplus(x + layer.atom_norm(torch.stack(total)))
        else:
            x = x + torch.stack(total)
    return x


@pytest.mark.parametrize("kind", ["published", "eq5", "eq4"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_a_plain_implementation(kind, training):
    torch.manual_seed(0)
    batch = make_batch([random_crystal(0, 4), random_crystal(1, 3)])
    encoder = CGCNN(convolutions=2, convolution=kind).train(training)
    ours, expected = encoder(batch).atoms, plain(encoder, batch, kind)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    gradients = [
        torch.autograd.grad((y * weights).sum(), list(encoder.parameters()))
        for y in (ours, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", structures())
def test_embedding_does_not_depend_on_the_description_of_the_crystal(name):
    torch.manual_seed(0)
    encoder = CGCNN().eval()
    structure = structures()[name]
    shuffled = Structure.from_sites(list(reversed(structure.sites)))
    moved = structure.copy()
    moved.translate_sites(list(range(len(moved))), [0.13, 0.29, 0.41])
    supercell = structure.copy()
    supercell.make_supercell([2, 1, 1])
    variants = [
        structure,
        shuffled,
        moved,
        supercell,
        structure.get_primitive_structure(),
    ]
    batch = make_batch([from_structure("x", s) for s in variants])
    with torch.no_grad():
        pooled = encoder(batch).crystals
    torch.testing.assert_close(
        pooled, pooled[:1].expand_as(pooled), atol=2e-5, rtol=1e-4
    )


def test_embedding_does_not_turn_with_the_crystal():
    encoder = CGCNN().eval()
    one = random_crystal(3)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = type(one)("t", one.atomic_numbers, one.frac_coords, one.cell @ rotation.T)
    batch = make_batch([one, turned])
    with torch.no_grad():
        pooled = encoder(batch).crystals
    torch.testing.assert_close(pooled[0], pooled[1], atol=1e-5, rtol=1e-4)


def test_normalized_pool_averages_unit_vectors():
    encoder = CGCNN(normalize=True)
    batch = make_batch([random_crystal(0, 2)])
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(encoder.pool(x, batch), torch.tensor([[0.3, 0.9]]))


def test_blocks_are_what_freezing_counts():
    encoder = CGCNN(convolutions=4)
    assert list(encoder.blocks()) == [encoder.embedding, *encoder.convolutions]


@pytest.mark.parametrize("kind", ["published", "eq5", "eq4"])
def test_work_grows_with_all_that_makes_work(kind):
    encoder = CGCNN(convolution=kind)
    few, many = encoder.work(8, 100, 1_200), encoder.work(8, 1_000, 12_000)
    assert 4 < many.flops / few.flops < 11
    assert 9 < many.bytes / few.bytes < 11
    deeper = CGCNN(convolution=kind, convolutions=6).work(8, 1_000, 12_000)
    assert 1.9 < deeper.flops / many.flops < 2.6
    wider = CGCNN(convolution=kind, width=128).work(8, 1_000, 12_000)
    assert 1.9 < wider.flops / many.flops < 4


def test_work_of_a_step_of_the_published_encoder():
    # 2,505 atoms: two products of 4 F x F, three times; 30,060 edges: 221 per gate.
    work = CGCNN().work(256, 2_505, 30_060)
    assert work.flops == pytest.approx(2 * 2.46e8 + 3 * 4.25e8 + 0.1e9, rel=0.02)


def test_settings_rebuild_the_encoder():
    encoder = CGCNN(width=16, convolutions=2, convolution="eq4", elements="onehot")
    again = make_encoder("cgcnn", **encoder.settings)
    again.load_state_dict(encoder.state_dict())
    batch = make_batch([random_crystal(0)], GraphSettings(mode="nearest"))
    assert torch.equal(encoder(batch).atoms, again(batch).atoms)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"convolution": "eq3"}, r"`convolution` is 'eq3' but must be one of"),
        ({"width": 0}, r"`width` is 0 but must be at least 1"),
        ({"spacing": 0.0}, r"`spacing` is 0\.0 but must be positive"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        CGCNN(**settings)


def test_unknown_encoder():
    with pytest.raises(InputError, match=r"unknown encoder 'cgcn'.*mean `cgcnn`\?"):
        make_encoder("cgcn")


def test_element_tables():
    table = cgcnn92()
    assert table.shape == (101, 92)
    assert not table[0].any()  # a masked atom
    iron = np.flatnonzero(table[26]).tolist()
    # group 8, period 4, electronegativity 1.83, s-d transition metal
    assert iron[:3] == [8, 19 + 3, 26 + 3]
    assert table[26, 78 + 2] == 1
    assert len(np.unique(table[1:], axis=0)) == 92  # eight elements share a vector
    assert np.array_equal(table[57], table[58])  # La, Ce
    assert onehot().sum() == 101
    with pytest.raises(ValueError, match="unknown element table 'magpie'"):
        element_table("magpie")


def test_element_table_equals_the_published_one(shared_data):
    import json

    path = shared_data / "cgcnn_published" / "atom_init.json"
    published = json.loads(path.read_text())
    assert len(published) == 100
    for number, vector in published.items():
        assert cgcnn92()[int(number)].tolist() == vector


def test_a_masked_atom_may_have_a_vector_that_learns():
    torch.manual_seed(0)
    plain = CGCNN(width=6, convolutions=1)
    told = CGCNN(width=6, convolutions=1, token=True)
    state = told.state_dict()
    assert set(state) - set(plain.state_dict()) == {"embedding.token"}
    told.load_state_dict({**plain.state_dict(), "embedding.token": torch.ones(6)})
    batch = make_batch([random_crystal(0, 4)])
    seen = plain(batch).atoms
    assert torch.equal(told(batch).atoms, seen)
    hidden = replace(batch, atomic_numbers=batch.atomic_numbers.clone())
    hidden.atomic_numbers[1] = 0
    found = told(hidden, layers=True)
    assert found.layers[0][1].tolist() == [1.0] * 6
    found.atoms.sum().backward()
    assert told.embedding.token.grad.abs().max() > 0
