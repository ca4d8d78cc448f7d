"""A training step of CGCNN, against the published layout in plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.graph_building import structures
from benchmarks.published import PublishedCGCNN, published_gaussians
from benchmarks.timing import Row, take_turns
from crysdistill.encoders import CGCNN
from crysdistill.encoders.cgcnn import find_edges
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, distances, make_batch
from crysdistill.kernels.gate.merged_edges import CompiledEdges
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import cgcnn92
from crysdistill.transfer.heads import PropertyHead

BATCHES = (256, 64)


class Ours(nn.Module):
    """Encoder and head of the student CGCNN."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = CGCNN()
        self.head = PropertyHead(64, 128)

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Predict (B, 1)."""
        return self.head(self.encoder(batch).crystals)


def copy_weights(published: PublishedCGCNN, ours: Ours) -> None:
    """Copy the weights of the published layout to ours."""
    ours.encoder.embedding.load_state_dict(published.embedding.state_dict())
    for theirs, mine in zip(
        published.convolutions, ours.encoder.convolutions, strict=True
    ):
        for k, part in enumerate(("gate", "core")):
            half = slice(64 * k, 64 * (k + 1))
            linear = getattr(mine, part).linear
            linear.weight.data.copy_(theirs.linear.weight[half])
            linear.bias.data.copy_(theirs.linear.bias[half])
    ours.head.first.load_state_dict(published.conv_to_fc.state_dict())
    ours.head.last.load_state_dict(published.fc_out.state_dict())


def gradients(published: PublishedCGCNN, ours: Ours) -> tuple[Tensor, Tensor]:
    """Return all gradients of both, in the same order."""
    theirs, mine = [], []
    for a, b in zip(published.convolutions, ours.encoder.convolutions, strict=True):
        theirs += [a.linear.weight.grad, a.linear.bias.grad]
        gate, core = b.gate.linear, b.core.linear
        mine += [torch.cat((gate.weight.grad, core.weight.grad))]
        mine += [torch.cat((gate.bias.grad, core.bias.grad))]
    for a, b in (
        (published.embedding, ours.encoder.embedding),
        (published.conv_to_fc, ours.head.first),
        (published.fc_out, ours.head.last),
    ):
        theirs += [a.weight.grad, a.bias.grad]
        mine += [b.weight.grad, b.bias.grad]
    return torch.cat([g.flatten() for g in theirs]), torch.cat(
        [g.flatten() for g in mine]
    )


def kept_for_backward(model: nn.Module, *inputs: object) -> int:
    """Return the bytes of all tensors that a forward pass keeps, except weights."""
    kept: dict[int, int] = {}
    tensors: list[Tensor] = []  # kept alive, so that no two share an address

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*inputs)
    for own in (*model.parameters(), *model.buffers()):
        kept.pop(own.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def edges_in_memory(batch: CrystalBatch, ours: Ours) -> int:
    """Return the bytes of the edges in the form that our compiled code reads."""
    edges = find_edges(batch, ours.encoder.table)
    if not isinstance(edges, CompiledEdges):
        raise SystemExit("the compiled gate is not used")
    return sum(array.nbytes for array in edges.merged)


def make_steps(
    size: int, max_atoms: int = 18
) -> tuple[CrystalBatch, dict[str, Callable[[], Tensor]], dict[str, int], Ours]:
    """Return a batch, a step of each layout, the bytes each keeps, and our model.

    A step is forward, loss and backward. First, the results of both are compared.

    Args:
        size: crystals in the batch.
        max_atoms: the most atoms in a crystal.
    """
    chosen = structures(size, max_atoms)
    crystals = [Crystal.from_pymatgen(s, str(i)) for i, s in enumerate(chosen)]
    batch = make_batch(crystals, GraphSettings(mode="nearest"))
    n = batch.num_nodes
    # The published program has the Gaussians in memory before the step begins.
    d = distances(batch).double().numpy().reshape(n, 12)
    u = torch.from_numpy(published_gaussians(d)).float()
    neighbor = batch.edge_index[0].view(n, 12)
    elements = torch.from_numpy(cgcnn92())[batch.atomic_numbers]
    rows = [torch.arange(a, b) for a, b in zip(batch.ptr, batch.ptr[1:], strict=False)]
    torch.manual_seed(0)
    published, ours = PublishedCGCNN(), Ours()
    copy_weights(published, ours)
    target = torch.randn(size, 1)

    def step(model: nn.Module, *inputs: object) -> Tensor:
        model.zero_grad()
        output = model(*inputs)
        (output - target).square().mean().backward()
        return output.detach()

    steps = {
        "published": lambda: step(published, elements, u, neighbor, rows),
        "ours": lambda: step(ours, batch),
    }
    check_agreement(published, ours, steps)
    kept = {
        "published": kept_for_backward(published, elements, u, neighbor, rows),
        "ours": kept_for_backward(ours, batch) + edges_in_memory(batch, ours),
    }
    return batch, steps, kept, ours


def check_agreement(
    published: PublishedCGCNN, ours: Ours, steps: dict[str, Callable[[], Tensor]]
) -> None:
    """Stop unless both layouts give the same results with the same weights."""
    difference = (steps["published"]() - steps["ours"]()).abs().max().item()
    theirs, mine = gradients(published, ours)
    gradient = ((theirs - mine).norm() / theirs.norm()).item()
    print(
        f"outputs differ by {difference:.1e}, gradients by {gradient:.1e} of their norm"
    )
    if max(difference, gradient) > 1e-5:
        raise SystemExit("the two layouts do not agree to 1e-5")


def measure() -> Iterator[Row]:
    """Compare steps of the same weights on the same batches, one thread."""
    for size in BATCHES:
        batch, steps, kept, _ = make_steps(size)
        what = f"{size} crystals, {batch.num_nodes:,} atoms, {batch.num_edges:,} edges"
        seconds = take_turns(steps)
        yield Row(
            f"training step, {what}, d = 64, 3 convolutions",
            f"{size / seconds['published']:.0f} crystals/s",
            f"{size / seconds['ours']:.0f} crystals/s",
            seconds["published"] / seconds["ours"],
            ">= 5.5x" if size == max(BATCHES) else "",
        )
        yield Row(
            f"kept for backward, {size} crystals",
            f"{kept['published'] / 2**20:.0f} MiB",
            f"{kept['ours'] / 2**20:.1f} MiB",
            kept["published"] / kept["ours"],
            ">= 10x",
        )
    if (os.cpu_count() or 1) < 2:
        return
    size = max(BATCHES)
    _, steps, _, _ = make_steps(size)

    def on_two() -> Tensor:
        torch.set_num_threads(2)
        try:
            return steps["ours"]()
        finally:
            torch.set_num_threads(1)

    seconds = take_turns({"one": steps["ours"], "two": on_two})
    yield Row(
        f"the same on two threads, {size} crystals",
        "",
        f"{size / seconds['two']:.0f} crystals/s",
        seconds["one"] / seconds["two"],
        "over one thread",
    )
