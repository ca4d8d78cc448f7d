"""MPNN against the published program, PyG's layers, and equations by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.plain_encoders.mpnn import PlainMPNN
from crysdistill.encoders.mpnn import MPNN, Lengths, _MatrixSum, group_atoms
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch
from crysdistill.graphs.batch import replace as with_tensors
from crysdistill.layers.group_norm import DifferentiableGroupNorm
from crysdistill.transfer.heads import PropertyHead
from tests.conftest import random_crystal
from tests.matdeeplearn import check_features, head, parameters
from tests.reference_outputs import agree, load_reference

FOLDER = "MPNN_MatDeepLearn"
NAMES = {
    "conv_list.nn.0": "message.first",
    "conv_list.nn.2": "message.second",
    "conv_list.lin": "message.root",
    "conv_list": "message.root",  # its bias
    "bn_list": "norm",
    "gru_list": "update",
}


def batch_of(count: int = 5, dtype: torch.dtype = torch.float32) -> CrystalBatch:
    graph = GraphSettings(5.0, mode="radius")  # 5 to 22 neighbours
    batch = make_batch([random_crystal(seed, 1 + seed) for seed in range(count)], graph)
    return with_tensors(
        batch, frac_coords=batch.frac_coords.to(dtype), cell=batch.cell.to(dtype)
    )


def test_weights_at_the_published_settings():
    encoder = MPNN(**MPNN.PUBLISHED)
    assert parameters(encoder, PropertyHead(100, **MPNN.HEAD)) == 4_385_901
    assert parameters(encoder.convolutions[0]) == 1_086_000


def ours(weights: dict[str, Tensor]) -> MPNN:
    """Our encoder with published weights."""
    small = {"width": 16, "hidden": 20, "convolutions": 3}
    encoder = MPNN(**{**MPNN.PUBLISHED, **small})
    state = {"embedding.element_table": encoder.embedding.element_table}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        parts = module.split(".")
        if parts[0] == "pre_lin_list":
            state[f"embedding.linear.{part}"] = value
        elif parts[0] not in ("post_lin_list", "lin_out"):
            own = NAMES[".".join((parts[0], *parts[2:]))]
            state[f"convolutions.{parts[1]}.{own}.{part.removesuffix('_l0')}"] = value
    encoder.load_state_dict(state)
    return encoder.eval()


def test_answers_of_the_published_program(shared_data):
    # The program searches the neighbours of row 0, and sends messages to row 1.
    weights, inputs, outputs, batch = load_reference(shared_data, FOLDER, receiver=1)
    encoder = ours(weights)
    check_features(load_reference(shared_data, FOLDER, receiver=0), encoder.embedding)
    u, place = inputs["edge_attr"], torch.arange(batch.num_edges)
    with torch.no_grad():
        x = encoder.embedding.linear(inputs["x"])
        found = encoder.encode(x, Lengths(u, place), batch, layers=True)
        groups = group_atoms(batch, place, 10)
        messages = [
            block.message(layer, u, groups, batch)
            for block, layer in zip(encoder.convolutions, found.layers, strict=False)
        ]
        normed = [
            block.norm(message)
            for block, message in zip(encoder.convolutions, messages, strict=True)
        ]
    agree(x, outputs["atoms_before_relu"])
    for k in range(3):
        agree(messages[k], outputs[f"conv_{k}"])
        agree(normed[k], outputs[f"conv_{k}_after_batchnorm"])
        agree(found.layers[k + 1], outputs[f"atoms_after_block_{k}"])
    agree(found.crystals, outputs["pooled"])
    entering, output = head(weights, found.crystals)
    agree(entering, outputs["input_of_last_layer"])
    agree(output, outputs["output"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_equals_the_layers_of_pyg(training, skip):
    torch.manual_seed(0)
    batch = batch_of(dtype=torch.float64)
    encoder = MPNN(8, 6, 2, cutoff=5.0, skip=skip).double()
    encoder(batch)  # gives the batch norms running statistics
    plain = PlainMPNN(encoder).double().train(training)
    found = encoder.train(training)(batch)
    atoms, crystals = plain(batch)
    # Batch norms over few atoms amplify the rounding of lengths to 1e-10 Å.
    torch.testing.assert_close(found.atoms, atoms, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.crystals, crystals, rtol=0, atol=1e-7)
    (found.atoms.square().sum() + found.crystals.sin().sum()).backward()
    (atoms.square().sum() + crystals.sin().sum()).backward()
    pairs = [(encoder.embedding.linear.weight, plain.embedding.weight)]
    for mine, message, norm, unit in zip(
        encoder.convolutions, plain.messages, plain.norms, plain.units, strict=True
    ):
        pairs += [
            (mine.message.first.weight, message.nn[0].weight),
            (mine.message.second.weight, message.nn[2].weight),
            (mine.message.second.bias, message.nn[2].bias),
            (mine.message.root.weight, message.lin.weight),
            (mine.norm.weight, norm.weight),
            (mine.update.weight_ih, unit.weight_ih_l0),
            (mine.update.weight_hh, unit.weight_hh_l0),
        ]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_sum_over_matrices_by_hand():
    """m_i = sum_j x_j sum_k h_k W_k, and its derivatives, for atoms in groups."""
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(4)
    place = torch.randint(6, (batch.num_edges,), generator=generator)
    x, h, w = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((batch.num_nodes, 2), (6, 3), (2, 3, 2))
    )
    j, i = batch.edge_index
    matrices = torch.einsum("dk,fko->dfo", h, w)
    messages = torch.einsum("ef,efo->eo", x[j], matrices[place])
    expected = torch.zeros_like(x).index_add(0, i, messages)
    weight = w.flatten(0, 1)
    for size in (1, 3, 100):
        groups = group_atoms(batch, place, size)
        assert sum(len(group.atoms) for group in groups) == batch.num_nodes
        found = _MatrixSum.apply(x, h, weight, groups)
        torch.testing.assert_close(found, expected)
    groups = group_atoms(batch, place, 3)
    for value in (x, h, weight):
        value.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *values: _MatrixSum.apply(*values, groups), (x, h, weight)
    )


def test_atoms_without_neighbours_hear_themselves_alone():
    torch.manual_seed(0)
    encoder = MPNN(8, 6, 1, cutoff=5.0, norm="none").eval()
    batch = batch_of()
    alone = with_tensors(
        batch,
        edge_index=batch.edge_index[:, :0],
        edge_shift=batch.edge_shift[:0],
        neighbor_ptr=torch.zeros_like(batch.neighbor_ptr),
    )
    assert group_atoms(alone, batch.edge_index[0, :0], 4) == []
    block = encoder.convolutions[0]
    x = F.relu(encoder.embedding(alone))
    expected = block.update(F.relu(block.message.root(x)), x)
    torch.testing.assert_close(encoder(alone).atoms, expected)


def test_no_tensor_has_a_matrix_for_each_edge(monkeypatch):
    """Only one group of atoms has matrices at a time."""
    torch.manual_seed(0)
    batch, width, hidden = batch_of(12), 16, 16
    encoder = MPNN(width, hidden, 2, cutoff=5.0)
    monkeypatch.setattr("crysdistill.encoders.mpnn._CACHED", 4 * width * hidden)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(batch)
    assert batch.num_nodes > 60
    assert max(kept) <= max(50 * batch.num_edges, width * width * hidden)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_norm(norm):
    torch.manual_seed(0)
    batch = batch_of()
    encoder = MPNN(8, 6, 1, cutoff=5.0, norm=norm, skip=True)
    block = encoder.convolutions[0]
    assert isinstance(block.norm, DifferentiableGroupNorm) == (norm == "group")
    x, lengths = encoder.features(batch)
    x = F.relu(x)
    found = encoder(batch).atoms
    groups = group_atoms(batch, lengths.place, 10)
    message = block.message(x, lengths.u, groups, batch)
    message = F.relu(copy.deepcopy(block.norm)(message))
    torch.testing.assert_close(found, x + block.update(message, x))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 0}, r"`width` is 0 but must be at least 1"),
        ({"hidden": 0}, r"`hidden` is 0 but must be at least 1"),
        ({"convolutions": 0}, r"`convolutions` is 0 but must be at least 1"),
        ({"gaussians": 1}, r"`gaussians` is 1 but must be at least 2"),
        ({"gaussian_width": 0.0}, r"`gaussian_width` is 0\.0 but must be positive"),
        ({"cutoff": -1.0}, r"`cutoff` is -1\.0 but must be positive"),
        ({"degrees": -1}, r"`degrees` is -1 but must be at least 0"),
        ({"elements": "one-hot"}, r"`elements` is 'one-hot' .*mean `onehot`\?"),
        ({"norm": "bach"}, r"`norm` is 'bach' but must be one of .*mean `batch`\?"),
        ({"pooling": "avg"}, r"`pooling` is 'avg' but must be one of mean, max, sum, "),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        MPNN(**settings)
