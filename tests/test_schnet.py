"""SchNet against the published program, PyG's blocks, and equations by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.plain_encoders.schnet import NAMES, PlainSchNet
from crysdistill.encoders.schnet import Lengths, SchNet, _FilteredSum
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch
from crysdistill.graphs.batch import replace as with_tensors
from crysdistill.layers.basis import cosine_cutoff, shifted_softplus
from crysdistill.layers.group_norm import DifferentiableGroupNorm
from crysdistill.transfer.heads import PropertyHead
from tests.conftest import random_crystal
from tests.matdeeplearn import check_features, head, parameters
from tests.reference_outputs import agree, load_reference

FOLDERS = {"SchNet_MatDeepLearn": "max", "SchNet_MatDeepLearn_meanpool": "mean"}
RADIUS = GraphSettings(5.0, mode="radius")


def batch_of(count: int = 5, dtype: torch.dtype = torch.float32) -> CrystalBatch:
    batch = make_batch(
        [random_crystal(seed, 1 + seed) for seed in range(count)], RADIUS
    )
    return with_tensors(
        batch, frac_coords=batch.frac_coords.to(dtype), cell=batch.cell.to(dtype)
    )


@pytest.mark.parametrize(
    ("convolutions", "count"), [(4, 324_701), (15, 1_102_401), (20, 1_455_901)]
)
def test_weights_at_the_published_settings(convolutions, count):
    encoder = SchNet(**{**SchNet.PUBLISHED, "convolutions": convolutions})
    assert parameters(encoder, PropertyHead(100, **SchNet.HEAD)) == count


def ours(weights: dict[str, Tensor], pooling: str) -> SchNet:
    """Our encoder with published weights."""
    encoder = SchNet(
        **{
            **SchNet.PUBLISHED,
            "width": 16,
            "filters": 20,
            "convolutions": 3,
            "pooling": pooling,
        }
    )
    state = {"embedding.element_table": encoder.embedding.element_table}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        kind, _, place = module.partition(".")
        if kind == "conv_list":
            k, _, layer = place.partition(".")
            state[f"convolutions.{k}.{NAMES[layer]}.{part}"] = value
        elif kind == "bn_list":
            state[f"convolutions.{place}.norm.{part}"] = value
        elif kind == "pre_lin_list":
            state[f"embedding.linear.{part}"] = value
        else:
            assert kind in ("post_lin_list", "lin_out"), name
    encoder.load_state_dict(state)
    return encoder.eval()


@pytest.mark.parametrize("folder", FOLDERS)
def test_answers_of_the_published_program(shared_data, folder):
    # The program searches the neighbours of row 0, and sends messages to row 1.
    weights, inputs, outputs, batch = load_reference(shared_data, folder, receiver=1)
    encoder = ours(weights, FOLDERS[folder])
    check_features(load_reference(shared_data, folder, receiver=0), encoder.embedding)
    length = inputs["edge_weight"]
    lengths = Lengths(
        inputs["edge_attr"], cosine_cutoff(length, 8.0), torch.arange(len(length))
    )
    with torch.no_grad():
        x = encoder.embedding.linear(inputs["x"])
        found = encoder.encode(x, lengths, batch, layers=True)
        heard = [
            block.interact(layer, lengths, batch)
            for block, layer in zip(encoder.convolutions, found.layers, strict=False)
        ]
    agree(x, outputs["atoms_before_relu"])
    for k in range(3):
        agree(heard[k], outputs[f"interaction_{k}"])
        agree(found.layers[k + 1], outputs[f"atoms_after_block_{k}"])
    agree(found.crystals, outputs["pooled"])
    entering, output = head(weights, found.crystals)
    agree(entering, outputs["input_of_last_layer"])
    agree(output, outputs["output"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_equals_the_blocks_of_pyg(training, pooling):
    torch.manual_seed(0)
    batch = batch_of(dtype=torch.float64)
    encoder = SchNet(16, 12, 2, cutoff=5.0, pooling=pooling).double()
    encoder(batch)  # gives the batch norms running statistics
    plain = PlainSchNet(encoder).double().train(training)
    found = encoder.train(training)(batch)
    atoms, crystals = plain(batch)
    # Batch norms over few atoms amplify the rounding of lengths to 1e-10 Å.
    torch.testing.assert_close(found.atoms, atoms, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.crystals, crystals, rtol=0, atol=1e-7)
    (found.atoms.square().sum() + found.crystals.sin().sum()).backward()
    (atoms.square().sum() + crystals.sin().sum()).backward()
    pairs = [(encoder.embedding.linear, plain.embedding)]
    for mine, theirs in zip(encoder.convolutions, plain.blocks, strict=True):
        pairs += [
            (mine.get_submodule(own), theirs.get_submodule(name))
            for name, own in NAMES.items()
        ]
    for mine, theirs in pairs:
        torch.testing.assert_close(
            mine.weight.grad, theirs.weight.grad, rtol=1e-6, atol=1e-7
        )


def test_filtered_sum_by_hand():
    """y_i = sum_j x_j * W(d_ij), and its derivatives."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([[1, 2, 0, 2, 2], [0, 0, 1, 1, 1]])
    place = torch.tensor([0, 1, 0, 2, 1])
    x, w = (
        torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    y = _FilteredSum.apply(x, w, edges, place)
    torch.testing.assert_close(y[0], x[1] * w[0] + x[2] * w[1])
    torch.testing.assert_close(y[1], x[0] * w[0] + x[2] * (w[2] + w[1]))
    assert not y[2].any()
    assert torch.autograd.gradcheck(
        lambda x, w: _FilteredSum.apply(x, w, edges, place), (x, w)
    )


def test_many_edges_are_summed_block_by_block():
    generator = torch.Generator().manual_seed(0)
    width, atoms, count = 1 << 10, 7, 1_000  # blocks of 128 edges
    edges = torch.randint(atoms, (2, count), generator=generator)
    place = torch.randint(5, (count,), generator=generator)
    x, w, dy = (
        torch.randn(rows, width, generator=generator, dtype=torch.float64)
        for rows in (atoms, 5, atoms)
    )
    x.requires_grad_(), w.requires_grad_()
    whole = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * w[place])
    expected = torch.autograd.grad(whole, (x, w), dy)
    y = _FilteredSum.apply(x, w, edges, place)
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(torch.autograd.grad(y, (x, w), dy), expected)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("skip", [False, True])
def test_norm_and_skip(norm, skip):
    torch.manual_seed(0)
    batch = batch_of()
    encoder = SchNet(8, 8, 1, cutoff=5.0, norm=norm, skip=skip)
    block = encoder.convolutions[0]
    x, lengths = encoder.features(batch)
    x = F.relu(x)
    found = encoder(batch).atoms
    heard = block.interact(x, lengths, batch)
    normed = copy.deepcopy(block.norm)
    expected = x + normed(heard) if skip else normed(x + heard)
    torch.testing.assert_close(found, expected)
    assert isinstance(block.norm, DifferentiableGroupNorm) == (norm == "group")


def test_edges_at_the_cutoff_send_nothing():
    torch.manual_seed(0)
    encoder = SchNet(8, 8, 1, cutoff=3.0, norm="none").eval()
    block = encoder.convolutions[0]
    crystals = [random_crystal(seed, 4) for seed in range(3)]
    wide, narrow = (
        make_batch(crystals, GraphSettings(cutoff, mode="radius"))
        for cutoff in (6.0, 3.0)
    )
    assert wide.num_edges > 3 * narrow.num_edges
    torch.testing.assert_close(encoder(wide).atoms, encoder(narrow).atoms)
    alone = with_tensors(
        wide,
        edge_index=wide.edge_index[:, :0],
        edge_shift=wide.edge_shift[:0],
        neighbor_ptr=torch.zeros_like(wide.neighbor_ptr),
    )
    x = F.relu(encoder.embedding(alone))
    expected = x + block.last(shifted_softplus(block.after.bias))
    torch.testing.assert_close(encoder(alone).atoms, expected)


def test_derivatives_with_respect_to_positions():
    torch.manual_seed(0)
    batch = batch_of(3, torch.float64)
    encoder = SchNet(8, 8, 2, cutoff=5.0).double().eval()

    def energy(frac: Tensor) -> Tensor:
        return encoder(with_tensors(batch, frac_coords=frac)).crystals.sum()

    frac = batch.frac_coords.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(frac), frac)
    assert slope.abs().max() > 1e-3
    step = torch.zeros_like(slope)
    step[2, 1] = 1e-4
    with torch.no_grad():
        rise = energy(batch.frac_coords + step) - energy(batch.frac_coords - step)
    assert rise.item() / 2e-4 == pytest.approx(slope[2, 1].item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 0}, r"`width` is 0 but must be at least 1"),
        ({"filters": 0}, r"`filters` is 0 but must be at least 1"),
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
        SchNet(**settings)
