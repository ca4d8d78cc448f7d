"""ALIGNN against the published program and a plain form; what it guarantees."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from benchmarks.plain_encoders.alignn import PlainALIGNN
from crysdistill.encoders.alignn import ALIGNN
from crysdistill.encoders.encoder import Embeddings
from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    GraphSettings,
    distances,
    edge_vectors,
    make_batch,
    replace,
)
from crysdistill.graphs.triplets import Triplets, add_reverse_edges, find_triplets
from crysdistill.layers.edge_gated import (
    NORMS,
    EdgeGatedConvolution,
    _Gates,
    silu_of_norm,
)
from crysdistill.structures.crystal import Crystal
from tests.conftest import random_crystal
from tests.reference_outputs import agree
from tests.six_crystals import arrays, six_crystals

GRAPH = GraphSettings(max_neighbors=6)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def some_batch(graph: GraphSettings = GRAPH) -> CrystalBatch:
    sizes = ((0, 4), (1, 1), (2, 3))
    return make_batch([random_crystal(seed, atoms) for seed, atoms in sizes], graph)


def doubled(batch: CrystalBatch) -> CrystalBatch:
    return replace(
        batch, frac_coords=batch.frac_coords.double(), cell=batch.cell.double()
    )


# -------------------------------------------------------------------- published numbers


def test_parameter_counts_of_the_published_classes():
    # 4,026,753 with the head, less the two norms whose results are unused.
    published = ALIGNN(**ALIGNN.PUBLISHED)
    assert parameters(published) + 256 + 1 == 4_026_753 - 4 * 256
    # The published count has one number for an element; ours has 92.
    atomwise = ALIGNN(norm="layer")
    assert parameters(atomwise) + 64 + 1 == 143_297 + 91 * 64 - 4 * 64


class Published:
    """A folder of known answers, and the batch that its inputs make.

    The cell is a cube of 1 Å and all atoms are at its origin. So the lattice
    translations of edges are the published vectors, and our own code computes
    distances, triplets and angles.
    """

    def __init__(self, shared_data, folder: str) -> None:
        path = shared_data / "reference_outputs" / folder
        self.weights = load_file(path / "weights.safetensors")
        self.inputs = arrays(path / "inputs.npz")
        self.outputs = arrays(path / "outputs.npz")
        edges = torch.stack((self.inputs["edge_src"], self.inputs["edge_dst"]))
        self.order = torch.argsort(edges[1], stable=True)
        atoms = self.inputs["num_atoms"]
        n_atoms = int(atoms.sum())
        self.batch = CrystalBatch(
            atomic_numbers=self.inputs["atomic_numbers"],
            frac_coords=torch.zeros(n_atoms, 3, dtype=torch.float64),
            cell=torch.eye(3, dtype=torch.float64).expand(len(atoms), 3, 3),
            edge_index=edges[:, self.order],
            edge_shift=-self.inputs["edge_vector_r"][self.order],
            batch=self.inputs["batch"],
            ptr=F.pad(atoms.cumsum(0), (1, 0)),
            neighbor_ptr=F.pad(torch.bincount(edges[1]).cumsum(0), (1, 0)),
            num_nodes=n_atoms,
        )

    def triplets(self, batch: CrystalBatch) -> Triplets:
        """Return our triplets without those of an edge with itself."""
        found = find_triplets(batch)
        kept = found.first != found.second
        counts = torch.bincount(found.second[kept], minlength=batch.num_edges)
        ptr = F.pad(counts.cumsum(0), (1, 0))
        return Triplets(found.first[kept], found.second[kept], found.cosine[kept], ptr)

    def pairs(self) -> dict[tuple[int, int], int]:
        """Map each published pair of edges, in our numbering, to its row."""
        ours = torch.argsort(self.order)
        ends = (ours[self.inputs[f"lg_{end}"].long()] for end in ("src", "dst"))
        pairs = zip(*(end.tolist() for end in ends), strict=True)
        return {pair: row for row, pair in enumerate(pairs)}

    def encoder(self) -> ALIGNN:
        """Return our encoder with the published weights, in double precision."""
        weights = self.weights
        convolutions = 1 + max(number_in(w) for w in weights if "alignn_layers" in w)
        gated = 1 + max(number_in(w) for w in weights if "gcn_layers" in w)
        hidden, angles = weights["angle_embedding.1.layer.0.weight"].shape
        encoder = ALIGNN(
            width=weights["fc.weight"].shape[1],
            convolutions=convolutions,
            gated_convolutions=gated,
            hidden=hidden,
            distance_functions=weights["edge_embedding.1.layer.0.weight"].shape[1],
            angle_functions=angles,
            norm="batch" if any("running_mean" in w for w in weights) else "layer",
            gate_offset=1e-6,
        )
        renamed = {our_name(name): weights[name] for name in weights}
        unread = {
            f"convolutions.{convolutions - 1}.edges.edge_norm",
            f"gated_convolutions.{gated - 1}.edge_norm",
        }
        own = {
            name: weight
            for name, weight in renamed.items()
            if name.rpartition(".")[0] not in {*unread, "fc"} and "centres" not in name
        }
        own["element_table"] = encoder.element_table
        encoder.load_state_dict(own)
        return encoder.double().eval()


def number_in(name: str) -> int:
    return int(name.split(".")[1])


PARTS = {
    "alignn_layers": "convolutions",
    "gcn_layers": "gated_convolutions",
    "node_update": "atoms",
    "edge_update": "edges",
    "bn_nodes": "node_norm",
    "bn_edges": "edge_norm",
    # The published "source" update belongs to the receiving atom.
    "src_update": "own",
    "dst_update": "message",
    "src_gate": "sender_gate",
    "dst_gate": "receiver_gate",
    "atom_embedding.layer.0": "embedding.atoms.linear",
    "atom_embedding.layer.1": "embedding.atoms.norm",
    "edge_embedding": "embedding.edges",
    "angle_embedding": "embedding.triplets",
    "0.centers": "centres",
    "1.layer.0": "hidden.linear",
    "1.layer.1": "hidden.norm",
    "2.layer.0": "dense.linear",
    "2.layer.1": "dense.norm",
}


def our_name(name: str) -> str:
    for theirs, mine in PARTS.items():
        name = name.replace(theirs, mine)
    return name


@pytest.fixture(scope="module", params=["ALIGNN", "ALIGNN_log_link", "ALIGNN_atomwise"])
def published(request, shared_data) -> Published:
    return Published(shared_data, request.param)


def test_triplets_are_those_of_the_published_line_graph(published):
    found, expected = published.triplets(published.batch), published.pairs()
    pairs = zip(found.first.tolist(), found.second.tolist(), strict=True)
    rows = [expected[pair] for pair in pairs]
    assert sorted(rows) == list(range(len(expected)))
    np.testing.assert_allclose(
        found.cosine, published.inputs["lg_cosine_h"][rows], atol=2e-6
    )


def test_answers_are_those_of_the_published_program(published):
    encoder, outputs = published.encoder(), published.outputs
    with torch.no_grad():
        triplets = published.triplets(published.batch)
        pooled = encoder.encode(published.batch, triplets).crystals
    weight, bias = published.weights["fc.weight"], published.weights["fc.bias"]
    answer = F.linear(pooled, weight.double(), bias.double().reshape(1)).squeeze(1)
    if bias.ndim == 0:  # the exponential link belongs to the head
        answer = answer.exp()
    agree(answer, outputs["output_float64"])
    agree(pooled.float(), outputs["pooled"])


def test_what_is_on_the_way_is_as_published(published):
    encoder, outputs = published.encoder(), published.outputs
    seen = {}
    for name, module in encoder.named_modules():
        module.register_forward_hook(
            lambda _module, _given, out, name=name: seen.update({name: out})
        )
    triplets = published.triplets(published.batch)
    with torch.no_grad():
        found = encoder.encode(published.batch, triplets, layers=True)
    layers, gated = len(encoder.convolutions), len(encoder.gated_convolutions)

    def edges(name):
        return outputs[name][published.order]

    atoms = ["atoms_embedded", *(f"alignn_{k}_0" for k in range(layers))]
    atoms += [f"gcn_{k}_0" for k in range(gated)]
    for mine, name in zip(found.layers, atoms, strict=True):
        agree(mine.float(), outputs[name])
    for k in range(layers):
        agree(seen[f"convolutions.{k}"][1].float(), edges(f"alignn_{k}_1"))
        if f"alignn_{k}_node_update_1" in outputs:
            half = seen[f"convolutions.{k}.atoms"]
            agree(half[1].float(), edges(f"alignn_{k}_node_update_1"))
    # The last convolution reads these edges.
    last = f"gcn_{gated - 2}_1" if gated > 1 else f"alignn_{layers - 1}_1"
    agree(found.edges.float(), edges(last))
    if layers > 1 and "alignn_0_angles_first_2000" in outputs:
        rows = published.pairs()
        pairs = zip(triplets.first.tolist(), triplets.second.tolist(), strict=True)
        where = torch.tensor([rows[pair] for pair in pairs]).argsort()[:2000]
        angles = seen["convolutions.0"][2][where]
        agree(angles.float(), outputs["alignn_0_angles_first_2000"])


def test_single_precision_answers_alike(published):
    batch = replace(
        published.batch,
        frac_coords=published.batch.frac_coords.float(),
        cell=published.batch.cell.float(),
    )
    with torch.no_grad():
        encoder = published.encoder().float()
        found = encoder.encode(batch, published.triplets(batch)).crystals
    agree(found, published.outputs["pooled"])


def test_the_symmetric_graph_holds_the_published_one(shared_data):
    """It has a few more edges, since shells are complete to within 0.01 Å.

    The published graph holds bonds between images of one atom twice.
    """
    published = Published(shared_data, "ALIGNN")
    batch, _ = add_reverse_edges(make_batch(six_crystals(shared_data)))
    ours = edges_of(batch.edge_index, edge_vectors(batch))
    theirs = edges_of(published.batch.edge_index, published.batch.edge_shift)
    assert (len(ours), len(theirs), theirs.total()) == (670, 646, 738)
    assert set(theirs) <= set(ours)
    assert all(j == i for (j, i, *_), times in theirs.items() if times > 1)


def edges_of(edge_index: torch.Tensor, vectors: torch.Tensor) -> Counter:
    """Every edge as (neighbour, centre, vector in hundredths of an Å)."""
    # A coordinate on a symmetry plane is 0.0 or -0.0.
    steps = (vectors.double() * 100 + 1e-3).round().long()
    return Counter(map(tuple, torch.cat((edge_index.T, steps), dim=1).tolist()))


def test_memory_grows_with_the_triplets():
    """16 bytes for each triplet, channel and convolution: 2 kB for 64 and 2."""
    encoder, batch = ALIGNN(), some_batch()
    triplets = len(find_triplets(batch).first)
    assert encoder.memory(batch) == 2048 * triplets


# ------------------------------------------------------------- a second implementation


def plain_of(encoder: ALIGNN) -> PlainALIGNN:
    plain = PlainALIGNN(encoder.settings, encoder.element_table.shape[1]).double()
    weights = encoder.state_dict()
    del weights["element_table"]
    plain.load_state_dict(weights)
    return plain.train(encoder.training)


def plain_answer(encoder: ALIGNN, plain: PlainALIGNN, batch: CrystalBatch) -> list:
    triplets = find_triplets(batch)
    return plain(
        encoder.element_table[batch.atomic_numbers],
        distances(batch),
        batch.edge_index,
        triplets.cosine,
        torch.stack((triplets.first, triplets.second)),
    )


@pytest.mark.parametrize("offset", [1e-6, 1.0])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_a_plain_implementation(offset, norm, training):
    torch.manual_seed(0)
    encoder = ALIGNN(width=12, hidden=10, norm=norm, gate_offset=offset)
    encoder.double().train(training)
    for name, buffer in encoder.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    plain, batch = plain_of(encoder), doubled(some_batch())
    found = encoder(batch, layers=True)
    passed = plain_answer(encoder, plain, batch)
    for mine, theirs in zip(found.layers, passed, strict=True):
        torch.testing.assert_close(mine, theirs)
    weights = [torch.randn_like(layer) for layer in passed]
    for layers in (found.layers, passed):
        sum((x * w).sum() for x, w in zip(layers, weights, strict=True)).backward()
    theirs = dict(plain.named_parameters())
    for name, weight in encoder.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad, atol=1e-7, rtol=1e-7)
    theirs = dict(plain.named_buffers())
    for name, buffer in encoder.named_buffers():  # counted once, though seen twice
        if name != "element_table" and "centres" not in name:
            torch.testing.assert_close(buffer, theirs[name])


@pytest.mark.parametrize("offset", [1e-6, 1.0])
def test_gates_have_the_gradients_of_differences(offset):
    torch.manual_seed(0)
    a, b, v = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    c = torch.randn(7, 3, dtype=torch.float64)
    sender, receiver = torch.tensor([[0, 1, 1, 3, 2, 0, 3], [0, 0, 1, 1, 1, 3, 3]])

    def gates(a, b, c, v):
        return _Gates.apply(a, b, c + 0, v, sender, receiver, offset)

    arguments = [x.requires_grad_() for x in (a, b, c, v)]
    assert torch.autograd.gradcheck(gates, arguments)
    # Node 2 receives no messages.
    assert not gates(*arguments)[1][2].any()


@pytest.mark.parametrize("norm", NORMS)
def test_silu_of_norm_has_the_gradients_of_differences(norm):
    layer = NORMS[norm](3).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = [w.detach().requires_grad_() for w in layer.parameters()]

    def of(x, *weights):
        for own, given in zip(layer.parameters(), weights, strict=True):
            own.data = given.detach()
        return silu_of_norm(layer, x)

    assert torch.autograd.gradcheck(lambda x: of(x, *weights), (x,))
    layer.weight.requires_grad_(False)
    silu_of_norm(layer, x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


# --------------------------------------------------------------------------- guarantees


def kept_rows(encoder: ALIGNN, batch: CrystalBatch, rows: int) -> int:
    """Count the numbers that a forward pass keeps for each row of `rows`."""
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point() and len(tensor) == rows:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = encoder(batch)
    assert isinstance(found, Embeddings)
    return sum(tensor.numel() for tensor in kept.values()) // rows


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("convolutions", [1, 2, 3])
def test_memory_of_a_triplet(norm, convolutions):
    batch = some_batch()
    triplets = len(find_triplets(batch).first)
    encoder = ALIGNN(width=12, convolutions=convolutions, norm=norm)
    expected = 12 * (2 * convolutions - 1)
    assert kept_rows(encoder, batch, triplets) == expected


def test_added_directions_change_nothing_where_none_is_missing():
    batch = some_batch(GraphSettings(cutoff=5.0, mode="radius"))
    shuffled = torch.cat(
        [
            start + torch.randperm(int(end - start))
            for start, end in zip(
                batch.neighbor_ptr, batch.neighbor_ptr[1:], strict=False
            )
        ]
    )
    batch = replace(
        batch,
        edge_index=batch.edge_index[:, shuffled],
        edge_shift=batch.edge_shift[shuffled],
    )
    torch.manual_seed(0)
    encoder = ALIGNN(width=8).eval()
    symmetric = ALIGNN(width=8, symmetric=True).eval()
    symmetric.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        one, other = encoder(batch), symmetric(batch)
    torch.testing.assert_close(one.atoms, other.atoms, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.edges, other.edges, atol=1e-5, rtol=1e-5)


def test_added_directions_are_heard():
    batch = some_batch()
    torch.manual_seed(0)
    encoder = ALIGNN(width=8).eval()
    symmetric = ALIGNN(width=8, symmetric=True).eval()
    symmetric.load_state_dict(encoder.state_dict())
    whole, place = add_reverse_edges(batch)
    with torch.no_grad():
        found, expected = symmetric(batch), encoder(whole)
        assert (found.crystals - encoder(batch).crystals).abs().max() > 1e-3
    assert torch.equal(found.crystals, expected.crystals)
    assert torch.equal(found.edges, expected.edges[place])


def chain(angle: float) -> Crystal:
    """A chain of carbon atoms, 1.5 Å apart, with this angle between bonds."""
    step, rise = 1.5 * np.sin(angle / 2), 1.5 * np.cos(angle / 2)
    return Crystal(
        material_id="chain",
        atomic_numbers=np.full(2, 6, np.uint8),
        frac_coords=np.array([[0, 0.5, 0.5], [0.5, 0.5 + rise / 20, 0.5]]),
        cell=np.diag([2 * step, 20.0, 20.0]),
    )


@pytest.mark.parametrize("offset", [1e-6, 1.0])
def test_it_reads_angles_unless_gates_cancel(offset):
    """Two crystals of one element with equal distances."""
    batch = make_batch(
        [chain(np.pi), chain(2.0)], GraphSettings(cutoff=2.0, mode="radius")
    )
    torch.testing.assert_close(distances(batch), torch.full((8,), 1.5))
    torch.manual_seed(0)
    encoder = ALIGNN(width=8, cutoff=2.0, gate_offset=offset)
    with torch.no_grad():
        for _ in range(30):  # until the norms have seen the scale
            encoder(some_batch())
        straight, bent = encoder.eval()(batch).crystals
    difference = (straight - bent).abs().max()
    if offset == 1.0:
        assert difference > 3e-4
    else:
        assert difference < 1e-5


def test_forces_are_the_differences_of_energies():
    batch = doubled(some_batch())
    torch.manual_seed(0)
    encoder = ALIGNN(width=8, norm="layer").double()

    def energy(frac_coords):
        return encoder(replace(batch, frac_coords=frac_coords)).crystals[:, 0].sum()

    start = batch.frac_coords.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(start), start)
    step = torch.randn_like(slope) * 1e-5
    with torch.no_grad():
        # Without gradients, angles that are equal to 1e-10 share a row.
        difference = (energy(start + step) - energy(start - step)).item() / 2
    assert (slope * step).sum().item() == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_mixed_precision(norm):
    torch.manual_seed(0)
    encoder, batch = ALIGNN(width=16, norm=norm), some_batch()
    exact = encoder(batch).crystals
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(batch).crystals
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()
    found.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_gaussians_end_where_the_graph_ends():
    assert ALIGNN.for_graph(GraphSettings(cutoff=5.0), {}) == {"cutoff": 5.0}
    assert ALIGNN.for_graph(GraphSettings(cutoff=5.0), {"cutoff": 8.0})["cutoff"] == 8.0


def test_the_last_convolution_makes_no_edges():
    layer = EdgeGatedConvolution(4, "batch", last=True)
    e = torch.randn(3, 4)
    _, after = layer(
        torch.randn(2, 4), e, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    )
    assert after is e


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 0}, "`width` is 0 but must be at least 1"),
        ({"convolutions": 0}, "`convolutions` is 0 but must be at least 1"),
        ({"gated_convolutions": 0}, "`gated_convolutions` is 0 but must be at least 1"),
        ({"hidden": -1}, "`hidden` is -1 but must be at least 1"),
        ({"angle_functions": 1}, "`angle_functions` is 1 but must be at least 2"),
        ({"distance_functions": 1}, "`distance_functions` is 1 but must be at least 2"),
        ({"norm": "batsch"}, r"`norm` is 'batsch' but must be one of .* `batch`\?"),
        ({"cutoff": 0.0}, r"`cutoff` is 0\.0 but must be positive"),
        ({"elements": "cgcn92"}, r"`elements` is 'cgcn92' but must be .* `cgcnn92`\?"),
        ({"gate_offset": 0.0}, r"`gate_offset` is 0\.0 but must be positive"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        ALIGNN(**settings)
