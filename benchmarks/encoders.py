"""A training step of every encoder, against the plainest form of its published layout.

The plain forms (`benchmarks/plain_encoders/`) are ordinary PyTorch, with a row for
every edge and with the same weights. Tests compare their outputs with ours. The plain
SchNet is made of PyG's blocks. CrysXPP is CGCNN with a factor on the element vector;
`step` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.graph_building import structures
from benchmarks.plain_encoders.alignn import PlainALIGNN
from benchmarks.plain_encoders.attention_cgcnn import PlainAttentionCGCNN
from benchmarks.plain_encoders.deeper_gatgnn import PlainDeeperGATGNN
from benchmarks.plain_encoders.gatgnn import PlainGATGNN
from benchmarks.plain_encoders.megnet import PlainMEGNet
from benchmarks.plain_encoders.mpnn import PlainMPNN
from benchmarks.plain_encoders.schnet import PlainSchNet
from benchmarks.step import kept_for_backward
from benchmarks.timing import Row, take_turns
from crysdistill.encoders import ENCODERS, Encoder, make_encoder
from crysdistill.graphs.batch import CrystalBatch, distances, make_batch
from crysdistill.graphs.triplets import find_triplets
from crysdistill.structures.crystal import Crystal

CRYSTALS, MOST_ATOMS = 64, 40


class _ALIGNN(nn.Module):
    """The plain ALIGNN on a batch; like ours, it makes its line graph in the step."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.plain = PlainALIGNN(encoder.settings, encoder.element_table.shape[1])
        self.table = encoder.element_table

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return the atoms after the last block, (N, F)."""
        found = find_triplets(batch)
        pairs = torch.stack((found.first, found.second))
        atoms = self.table[batch.atomic_numbers]
        return self.plain(
            atoms, distances(batch), batch.edge_index, found.cosine, pairs
        )[-1]


PLAIN: dict[str, Callable[[Any], nn.Module]] = {
    "alignn": _ALIGNN,
    "attention_cgcnn": PlainAttentionCGCNN,
    "deeper_gatgnn": PlainDeeperGATGNN,
    "gatgnn": PlainGATGNN,
    "megnet": PlainMEGNet,
    "mpnn": PlainMPNN,
    "schnet": PlainSchNet,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "deeper_gatgnn": {"convolutions": 5},
    "alignn": {"symmetric": False},
}
"""Changes to our defaults, so that both forms read the same graph within seconds."""

REPEATS_PER_EDGE = ("attention_cgcnn", "deeper_gatgnn", "gatgnn", "megnet", "mpnn")


def step(model: nn.Module, batch: CrystalBatch) -> None:
    """Run forward and backward, with a loss on everything that a model returns."""
    model.zero_grad()
    found = model(batch)
    if isinstance(found, Tensor):
        found = (found,)
    elif not isinstance(found, tuple):
        found = (found.atoms, found.crystals)
    sum(x.square().mean() for x in found).backward()


def measure() -> Iterator[Row]:
    """Compare steps on the same batch of real crystals, one thread."""
    chosen = structures(CRYSTALS, MOST_ATOMS)
    crystals = [Crystal.from_pymatgen(s, str(i)) for i, s in enumerate(chosen)]
    for name, plain_form in PLAIN.items():
        graph = ENCODERS[name].GRAPH
        batch = make_batch(crystals, graph)
        torch.manual_seed(0)
        ours = make_encoder(name, graph, **SETTINGS.get(name, {})).train()
        plain = plain_form(ours).train()
        candidates = {"plain": plain, "ours": ours}
        seconds = take_turns(
            {key: partial(step, model, batch) for key, model in candidates.items()},
            repeats=5,
        )
        cost = {
            key: f"{1e3 * seconds[key]:,.0f} ms, keeps "
            f"{kept_for_backward(model, batch) / 2**20:,.0f} MiB"
            for key, model in candidates.items()
        }
        blocks = " (blocks of PyG)" if name == "schnet" else ""
        yield Row(
            f"training step of {name}{blocks}, {CRYSTALS} crystals, "
            f"{batch.num_edges:,} edges",
            cost["plain"],
            cost["ours"],
            seconds["plain"] / seconds["ours"],
            ">= 1.5x" if name in REPEATS_PER_EDGE else ">= 1x",
        )
