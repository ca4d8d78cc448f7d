"""The compiled gate against its PyTorch twin; what must not change the result."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

from crysdistill.encoders import CGCNN, cgcnn
from crysdistill.encoders.cgcnn import (
    PlainEdges,
    PublishedConvolution,
    find_edges,
    gated_sum,
)
from crysdistill.graphs.batch import GraphSettings, make_batch, replace
from crysdistill.kernels.gate import merged_edges
from crysdistill.kernels.gate.merged_edges import CompiledEdges
from crysdistill.kernels.gate.table import GaussianTable
from crysdistill.kernels.softplus import softplus
from crysdistill.layers.normalization import BatchNorm
from crysdistill.ranks import rank, sum_over_ranks
from crysdistill.structures.crystal import Crystal
from tests.conftest import random_crystal
from tests.forks import Command
from tests.together import joined_call, together


def some_batch(mode: str = "nearest", crystals: int = 12, first: int = 0):
    return make_batch(
        [random_crystal(first + i, 1 + i % 5) for i in range(crystals)],
        GraphSettings(mode=mode),
    )


def none_of(batch):
    empty = replace(
        batch,
        atomic_numbers=batch.atomic_numbers[:0],
        frac_coords=batch.frac_coords[:0],
        cell=batch.cell[:0],
        edge_index=batch.edge_index[:, :0],
        edge_shift=batch.edge_shift[:0],
        ptr=batch.ptr[:1],
        neighbor_ptr=batch.neighbor_ptr[:1],
        num_nodes=0,
    )
    empty.batch = batch.batch[:0]
    return empty


def cubic(elements: int, a: float) -> Crystal:
    cell = np.eye(3) * a
    return Crystal("cube", np.array([elements]), np.zeros((1, 3)), cell)


def plainly(encoder: CGCNN, batch, monkeypatch) -> torch.Tensor:
    """Run an encoder without compiled code."""
    with monkeypatch.context() as patch:
        patch.setattr(cgcnn, "merge_edges", lambda *_: None)
        return encoder(batch).atoms


def run(encoder: CGCNN, output: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of all trainable parameters."""
    along = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    wanted = [p for p in encoder.parameters() if p.requires_grad]
    return list(torch.autograd.grad((output * along).sum(), wanted, allow_unused=True))


def check_equal(encoder: CGCNN, batch, monkeypatch) -> None:
    """Compare values, gradients and running statistics with those of the twin.

    The twin in double precision gives the right values. The error of the twin in
    single precision gives the tolerance.
    """
    twin, exact = copy.deepcopy(encoder), copy.deepcopy(encoder).double()
    wide = replace(
        batch, frac_coords=batch.frac_coords.double(), cell=batch.cell.double()
    )
    outputs = encoder(batch).atoms, plainly(twin, batch, monkeypatch), exact(wide).atoms
    check_errors("output", *outputs)
    for buffers in zip(
        *(e.named_buffers() for e in (encoder, twin, exact)), strict=True
    ):
        name, _ = buffers[0]
        check_errors(name, *(buffer for _, buffer in buffers))
    if not outputs[0].requires_grad:
        return
    several = [
        run(e, output)
        for e, output in zip((encoder, twin, exact), outputs, strict=True)
    ]
    # Some gradients are zero up to rounding, as for a bias before a batch norm.
    scale = max(g.abs().max().item() for g in several[-1] if g is not None)
    names = [name for name, p in encoder.named_parameters() if p.requires_grad]
    both = {}
    for name, gradients in zip(names, zip(*several, strict=True), strict=True):
        if any(g is None for g in gradients):
            assert all(g is None for g in gradients), name
        else:
            both[name] = errors(*gradients, scale)
    usual = max(usual for _, usual in both.values())
    assert usual < 1e-3
    for name, (error, _) in both.items():
        assert error < 3 * usual + 2e-6, f"{name}: off by {error}, the twin by {usual}"


def errors(found, twin, exact, scale: float = 0.0) -> tuple[float, float]:
    scale = max(exact.abs().max().item(), scale) or 1.0
    one, other = ((x - exact).abs().max().item() / scale for x in (found, twin))
    return one, other


def check_errors(name, found, twin, exact) -> None:
    error, usual = errors(found, twin, exact)
    assert error < 3 * usual + 2e-6, f"{name}: off by {error}, its twin by {usual}"
    assert usual < 1e-3, f"{name}: the twin is off by {usual}"


@pytest.mark.parametrize("mode", ["nearest", "shells", "cgcnn"])
@pytest.mark.parametrize("kind", ["published", "eq5"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_its_twin(kind, training, mode, monkeypatch):
    torch.manual_seed(0)
    encoder = CGCNN(width=32, convolutions=2, convolution=kind).train(training)
    batch = some_batch(mode)
    assert isinstance(find_edges(batch, encoder.table), CompiledEdges)
    check_equal(encoder, batch, monkeypatch)


@pytest.mark.parametrize("width", [1, 16, 20, 64])
def test_any_width_will_do(width, monkeypatch):
    torch.manual_seed(0)
    encoder = CGCNN(width=width, convolutions=2)
    check_equal(encoder, some_batch(), monkeypatch)


def test_frozen_weights_and_norms(monkeypatch):
    torch.manual_seed(0)
    encoder = CGCNN(width=16, convolutions=3)
    encoder(some_batch())  # changes the running statistics
    encoder.convolutions[0].requires_grad_(False).eval()
    encoder.embedding.requires_grad_(False)
    encoder.convolutions[1].eval()  # fixed statistics, trainable weights
    encoder.convolutions[2].gate.linear.weight.requires_grad_(False)
    before = encoder.convolutions[1].gate_norm.running_mean.clone()
    check_equal(encoder, some_batch(), monkeypatch)
    assert torch.equal(encoder.convolutions[1].gate_norm.running_mean, before)
    encoder.requires_grad_(False)
    check_equal(encoder, some_batch(), monkeypatch)


def test_a_bias_before_a_norm_has_no_gradient_not_even_rounding():
    encoder = CGCNN(width=16, convolutions=1)
    encoder(some_batch()).atoms.square().sum().backward()
    for part in (encoder.convolutions[0].gate, encoder.convolutions[0].core):
        assert part.linear.bias.grad is not None  # several ranks need it
        assert not part.linear.bias.grad.any()


def test_settings_of_norms_are_heeded(monkeypatch):
    torch.manual_seed(0)
    encoder = CGCNN(width=16, convolutions=2)
    for layer in encoder.convolutions:
        for norm in (layer.gate_norm, layer.core_norm):
            norm.momentum, norm.eps = None, 0.3
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
    check_equal(encoder, some_batch(), monkeypatch)
    encoder(some_batch(first=40))
    check_equal(encoder, some_batch(), monkeypatch)


def test_a_mean_far_from_zero_costs_no_precision(monkeypatch):
    torch.manual_seed(0)
    encoder = CGCNN(width=16, convolutions=1)
    with torch.no_grad():
        encoder.convolutions[0].gate.linear.bias += 100.0
    check_equal(encoder, some_batch(), monkeypatch)


def test_edges_that_say_the_same_are_counted(monkeypatch):
    encoder = CGCNN(width=16, convolutions=2)
    batch = make_batch([cubic(29, 2.5), cubic(13, 3.0)], GraphSettings(mode="nearest"))
    edges = find_edges(batch, encoder.table)
    assert edges.count == 24
    # Six neighbours at a, and six of the twelve at a * sqrt(2).
    assert edges.merged.times[: edges.merged.first[-1]].tolist() == [6, 6] * 2
    check_equal(encoder, batch, monkeypatch)


def test_atoms_without_edges(monkeypatch):
    encoder = CGCNN(width=16, convolutions=2)
    batch = some_batch("shells")
    keep = batch.edge_index[1] % 3 > 0
    fewer = replace(
        batch, edge_index=batch.edge_index[:, keep], edge_shift=batch.edge_shift[keep]
    )
    assert isinstance(find_edges(fewer, encoder.table), CompiledEdges)
    check_equal(encoder, fewer, monkeypatch)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["published", "eq5", "eq4"])
def test_no_crystals_at_all(kind, training):
    empty = none_of(some_batch())
    encoder = CGCNN(width=16, convolutions=2, convolution=kind).train(training)
    before = copy.deepcopy(encoder.state_dict())
    output = encoder(empty).atoms
    assert output.shape == (0, 16)
    output.sum().backward()
    assert all(not p.grad.any() for p in encoder.parameters() if p.grad is not None)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("order", ["unsorted", "of another crystal"])
def test_graphs_that_are_not_made_for_it_go_the_plain_way(order):
    encoder = CGCNN(width=16, convolutions=1)
    batch = some_batch()
    edge_index, shift = batch.edge_index.clone(), batch.edge_shift
    if order == "unsorted":
        edge_index, shift = edge_index.flip(1), shift.flip(0)
    else:
        edge_index[0, 0] = batch.num_nodes - 1
    other = replace(batch, edge_index=edge_index, edge_shift=shift)
    assert isinstance(find_edges(other, encoder.table), PlainEdges)
    if order == "unsorted":
        torch.testing.assert_close(
            encoder.eval()(other).atoms, encoder(batch).atoms, atol=1e-5, rtol=1e-5
        )


def test_double_precision_and_gradients_to_atoms_go_the_plain_way():
    encoder = CGCNN(width=16, convolutions=2)
    batch = some_batch()
    moving = replace(batch, frac_coords=batch.frac_coords.clone().requires_grad_())
    assert isinstance(find_edges(moving, encoder.table), PlainEdges)
    encoder(moving).atoms.sum().backward()
    assert moving.frac_coords.grad.abs().max() > 0
    wide = replace(
        batch, frac_coords=batch.frac_coords.double(), cell=batch.cell.double()
    )
    output = copy.deepcopy(encoder).double()(wide).atoms
    assert output.dtype == torch.float64
    torch.testing.assert_close(
        output.float(), encoder(batch).atoms, atol=2e-5, rtol=2e-5
    )


def test_autocast_keeps_the_gate_in_single_precision():
    torch.manual_seed(0)
    encoder = CGCNN(width=16, convolutions=2)
    batch = some_batch()
    expected = encoder(batch).atoms
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(batch).atoms
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.05)
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_nan_is_not_hidden():
    encoder = CGCNN(width=16, convolutions=1, convolution="eq5")
    batch = some_batch()
    coords = batch.frac_coords.clone()
    coords[0] = torch.nan
    output = encoder(replace(batch, frac_coords=coords)).atoms
    assert torch.isnan(output[0]).all()
    assert torch.isfinite(output[batch.ptr[1] :]).all()  # other crystals
    with torch.no_grad():
        encoder.convolutions[0].core.linear.bias[3] = torch.nan
    output = encoder(batch).atoms
    assert torch.isnan(output[:, 3]).all()
    assert torch.isfinite(output[:, :3]).all()


def everything(batch) -> list[torch.Tensor]:
    """Return output, gradients and statistics of a gate for given products."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source).requires_grad_()

    norms = BatchNorm(32), BatchNorm(32)
    places = GaussianTable(8.0, 0.2)
    edges = find_edges(batch, places)
    products, table = draw(batch.num_nodes, 2, 64), draw(len(edges.rows), 64)
    bias = draw(64)
    output = gated_sum(products, bias, table, edges, norms)
    wanted = [products, bias, table, *norms[0].parameters(), *norms[1].parameters()]
    along = draw(batch.num_nodes, 32).detach()
    gradients = torch.autograd.grad((output * along).sum(), wanted)
    return [output.detach(), *gradients, *norms[0].buffers(), *norms[1].buffers()]


def test_bits_of_the_update_do_not_depend_on_the_number_of_threads():
    source = torch.Generator().manual_seed(0)
    x, total, along = torch.randn(3, 2500, 32, generator=source).unbind()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norm = PublishedConvolution(32, 4).atom_norm
            both = x.clone().requires_grad_(), total.clone().requires_grad_()
            output = softplus(both[0] + norm(both[1]))
            gradients = torch.autograd.grad(
                (output * along).sum(), [*both, *norm.parameters()]
            )
            found.append([output, *gradients, *norm.buffers()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_norm_in_order_equals_that_of_pytorch():
    source = torch.Generator().manual_seed(0)
    x, along = torch.randn(2, 2500, 32, generator=source)
    x += 3
    found = []
    for norm in (BatchNorm(32, in_order=True), torch.nn.BatchNorm1d(32).double()):
        norm.weight.data = torch.linspace(0.5, 2, 32).to(norm.weight.dtype)
        y = x.to(norm.weight.dtype).requires_grad_()
        output = norm(y)
        gradients = torch.autograd.grad((output * along).sum(), [y, *norm.parameters()])
        found.append([t.float() for t in (output, *gradients, *norm.buffers())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(merged_edges, "PART", 64)
    batch = some_batch(crystals=20)
    assert len(find_edges(batch, CGCNN().table).parts) > 4
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(everything(batch))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


def test_parts_add_up(monkeypatch):
    batch = some_batch(crystals=20)
    whole = everything(batch)
    monkeypatch.setattr(merged_edges, "PART", 64)
    for one, two in zip(whole, everything(batch), strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-4)


def test_several_threads_may_train_at_once(monkeypatch):
    monkeypatch.setattr(merged_edges, "PART", 64)
    batch, found = some_batch(crystals=20), []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [
            threading.Thread(target=lambda: found.append(everything(batch)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        torch.set_num_threads(before)
    assert len(found) == 4
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.slow
def test_a_fork_leaves_no_threads_behind(tmp_path):
    code = """
import os, sys, torch
from crysdistill.kernels import threads
from crysdistill.kernels.gate import merged_edges
from tests.test_gate import everything, some_batch

torch.set_num_threads(1)  # its own pool does not live through a fork
torch.get_num_threads = lambda: 2
merged_edges.PART = 64
batch = some_batch(crystals=20)
expected = everything(batch)
assert threads._pools
child = os.fork()
if not child:
    os._exit(0 if all(map(torch.equal, everything(batch), expected)) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    script = tmp_path / "forking.py"
    script.write_text(code)
    done = Command(script=script).wait()
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------- all ranks


def share_of_step(ranks: int) -> list[np.ndarray]:
    """One step over this rank's share of six crystals; the last of three has none."""
    shares = {1: [range(6)], 3: [range(4), range(4, 6), range(0)]}[ranks]
    crystals = [random_crystal(i, 1 + i % 4) for i in shares[rank()]]
    if crystals:
        batch = make_batch(crystals, GraphSettings(mode="nearest"))
    else:
        batch = none_of(make_batch([random_crystal(0)], GraphSettings(mode="nearest")))
    torch.manual_seed(0)
    encoder = CGCNN(width=16, convolutions=2)
    output = encoder(batch).atoms
    (output * batch.atomic_numbers.unsqueeze(1) / 50).sum().backward()
    gradients = [sum_over_ranks(p.grad).numpy() for p in encoder.parameters()]
    return gradients + [b.numpy() for b in encoder.buffers()]


@pytest.mark.slow
def test_statistics_are_those_of_all_ranks():
    (expected,) = together(1, joined_call, share_of_step, 1)
    for found in together(3, joined_call, share_of_step, 3):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4, rtol=1e-4)
