"""ALIGNN against the published program, a plain second form, and its promises."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pymatgen.core import Lattice, Structure
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
from crysdistill.graphs.triplets import add_reverse_edges, find_triplets
from crysdistill.layers.edge_gated import (
    NORMS,
    EdgeGatedConvolution,
    _Gates,
    silu_of_norm,
)
from tests.conftest import from_structure, random_crystal
from tests.reference_outputs import agree

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


# ------------------------------------------------------------------- what was published


def test_parameter_counts_of_the_published_classes():
    # 4,026,753 with the head, less the two norms whose results nobody reads.
    published = ALIGNN(**ALIGNN.PUBLISHED)
    assert parameters(published) + 256 + 1 == 4_026_753 - 4 * 256
    # ALIGNNAtomWise is counted with one number for an element, and here has 92.
    atomwise = ALIGNN(norm="layer")
    assert parameters(atomwise) + 64 + 1 == 143_297 + 91 * 64 - 4 * 64


class Published:
    """A folder of known answers, and the batch that its inputs make.

    The cell is a cube of 1 Å and all atoms are at its origin: so the lattice
    translations of edges are the published vectors, and distances, triplets and angles
    come from our own code.
    """

    def __init__(self, shared_data, folder: str) -> None:
        path = shared_data / "reference_outputs" / folder
        self.weights = load_file(path / "weights.safetensors")
        with np.load(path / "inputs.npz") as file:
            self.inputs = {name: file[name] for name in file.files}
        with np.load(path / "outputs.npz") as file:
            self.outputs = {name: torch.from_numpy(file[name]) for name in file.files}
        source, destination = self.inputs["edge_src"], self.inputs["edge_dst"]
        self.order = np.argsort(destination, kind="stable")
        atoms = self.inputs["num_atoms"]
        crystals, n_atoms = len(atoms), int(atoms.sum())
        self.batch = CrystalBatch(
            atomic_numbers=torch.from_numpy(self.inputs["atomic_numbers"]),
            frac_coords=torch.zeros(n_atoms, 3, dtype=torch.float64),
            cell=torch.eye(3, dtype=torch.float64).expand(crystals, 3, 3),
            edge_index=torch.from_numpy(
                np.stack((source[self.order], destination[self.order]))
            ),
            edge_shift=-torch.from_numpy(self.inputs["edge_vector_r"][self.order]),
            batch=torch.from_numpy(self.inputs["batch"]),
            ptr=torch.from_numpy(np.concatenate(([0], atoms.cumsum()))),
            neighbor_ptr=torch.from_numpy(
                np.concatenate(([0], np.bincount(destination).cumsum()))
            ),
            num_nodes=n_atoms,
        )

    def triplets(self) -> dict[tuple[int, int], int]:
        """Return the row of each published pair of edges, by our numbers of edges."""
        ours = np.argsort(self.order)
        pairs = zip(
            ours[self.inputs["lg_src"]].tolist(),
            ours[self.inputs["lg_dst"]].tolist(),
            strict=True,
        )
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
        )
        renamed = {ours(name): weights[name] for name in weights}
        unread = {
            f"convolutions.{convolutions - 1}.edges.edge_norm",
            f"gated_convolutions.{gated - 1}.edge_norm",
        }
        own = {
            name: weight
            for name, weight in renamed.items()
            if name.rpartition(".")[0] not in unread and "gaussians" not in name
        }
        own["element_table"] = encoder.element_table
        encoder.load_state_dict(own)
        return encoder.double().eval()


def number_in(name: str) -> int:
    return int(name.split(".")[1])


def ours(name: str) -> str:
    """Translate a published name. Theirs are crossed: `src_update` is of the receiver."""
    for theirs, mine in (
        ("alignn_layers", "convolutions"),
        ("gcn_layers", "gated_convolutions"),
        ("node_update", "atoms"),
        ("edge_update", "edges"),
        ("bn_nodes", "node_norm"),
        ("bn_edges", "edge_norm"),
        ("src_gate", "sender_gate"),
        ("dst_gate", "receiver_gate"),
        ("src_update", "own"),
        ("dst_update", "message"),
        ("atom_embedding.layer.", "embedding.atoms."),
        ("edge_embedding.", "embedding.edges."),
        ("angle_embedding.", "embedding.triplets."),
        (".0.centers", ".gaussians"),
        (".1.layer.", ".hidden."),
        (".2.layer.", ".dense."),
        (".hidden.0.", ".hidden.linear."),
        (".hidden.1.", ".hidden.norm."),
        (".dense.0.", ".dense.linear."),
        (".dense.1.", ".dense.norm."),
        ("atoms.0.", "atoms.linear."),
        ("atoms.1.", "atoms.norm."),
    ):
        name = name.replace(theirs, mine)
    return name


@pytest.fixture(scope="module", params=["ALIGNN", "ALIGNN_log_link", "ALIGNN_atomwise"])
def published(request, shared_data) -> Published:
    return Published(shared_data, request.param)


def test_triplets_are_those_of_the_published_line_graph(published):
    found, expected = find_triplets(published.batch), published.triplets()
    pairs = zip(found.first.tolist(), found.second.tolist(), strict=True)
    rows = [expected[pair] for pair in pairs]
    assert sorted(rows) == list(range(len(expected)))
    np.testing.assert_allclose(
        found.cosine, published.inputs["lg_cosine_h"][rows], atol=2e-6
    )


def test_answers_are_those_of_the_published_program(published):
    encoder, outputs = published.encoder(), published.outputs
    seen = {}
    for name, module in encoder.named_modules():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out})
        )
    with torch.no_grad():
        found = encoder(published.batch, layers=True)
    pooled = found.crystals
    weight, bias = (
        published.weights[f"fc.{name}"].double() for name in ("weight", "bias")
    )
    answer = F.linear(pooled, weight, bias.reshape(1)).squeeze(1)
    if bias.ndim == 0:  # the exponential link belongs to the head
        answer = answer.exp()
    agree(answer, outputs["output_float64"])
    agree(pooled.float(), outputs["pooled"])
    atoms, order = [outputs["atoms_embedded"]], published.order
    for k in range(len(encoder.convolutions)):
        atoms.append(outputs[f"alignn_{k}_0"])
        edges = outputs[f"alignn_{k}_1"][order]
        agree(seen[f"convolutions.{k}"][1].float(), edges)
        if f"alignn_{k}_node_update_1" in outputs:
            edges = outputs[f"alignn_{k}_node_update_1"][order]
            agree(seen[f"convolutions.{k}.atoms"][1].float(), edges)
    for k in range(len(encoder.gated_convolutions)):
        atoms.append(outputs[f"gcn_{k}_0"])
    for ours, theirs in zip(found.layers, atoms, strict=True):
        agree(ours.float(), theirs)
    last = len(encoder.gated_convolutions) - 2
    edges = (
        f"gcn_{last}_1" if last >= 0 else f"alignn_{len(encoder.convolutions) - 1}_1"
    )
    agree(found.edges.float(), outputs[edges][order])
    if len(encoder.convolutions) > 1 and "alignn_0_angles_first_2000" in outputs:
        rows = published.triplets()
        triplets = find_triplets(published.batch)
        pairs = zip(triplets.first.tolist(), triplets.second.tolist(), strict=True)
        where = torch.tensor([rows[pair] for pair in pairs]).argsort()[:2000]
        angles = seen["convolutions.0"][2][where]
        agree(angles.float(), outputs["alignn_0_angles_first_2000"])


def test_single_precision_answers_alike(published):
    encoder = published.encoder()
    with torch.no_grad():
        exact = encoder(published.batch).crystals
        batch = replace(
            published.batch,
            frac_coords=published.batch.frac_coords.float(),
            cell=published.batch.cell.float(),
        )
        agree(encoder.float()(batch).crystals, exact.float())


def test_the_symmetric_graph_holds_the_published_one(shared_data):
    """It has some edges more, of shells that are a whole within 0.01 Å.

    The published graph holds bonds between images of one atom twice.
    """
    published = Published(shared_data, "ALIGNN")
    names = published.inputs["ids"].tolist()
    crystals = {}
    path = shared_data / "mp36k" / "structures.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if any(f'"{name}"' in line[:40] for name in names):
                row = json.loads(line)
                structure = Structure(
                    Lattice(row["lattice"]), row["species"], row["frac"]
                )
                crystals[row["id"]] = from_structure(row["id"], structure)
    batch, _ = add_reverse_edges(make_batch([crystals[name] for name in names]))
    ours = edges_of(batch.edge_index, edge_vectors(batch))
    theirs = edges_of(published.batch.edge_index, published.batch.edge_shift)
    assert (len(ours), len(theirs), theirs.total()) == (670, 646, 738)
    assert set(theirs) <= set(ours)
    assert all(j == i for (j, i, *_), times in theirs.items() if times > 1)


def edges_of(edge_index: torch.Tensor, vectors: torch.Tensor) -> Counter:
    """Every edge as (neighbour, centre, vector in hundredths of an Å)."""
    # Coordinates on a symmetry plane are a zero of either sign.
    steps = (vectors.double() * 100 + 1e-3).round().long()
    return Counter(map(tuple, torch.cat((edge_index.T, steps), dim=1).tolist()))


# ------------------------------------------------------------- a second implementation


def plain_of(encoder: ALIGNN) -> PlainALIGNN:
    plain = PlainALIGNN(encoder.settings, encoder.element_table.shape[1])
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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_a_plain_implementation(norm, training):
    torch.manual_seed(0)
    encoder = ALIGNN(width=12, hidden=10, norm=norm).double().train(training)
    for name, buffer in encoder.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    plain, batch = plain_of(encoder).double(), doubled(some_batch())
    found = encoder(batch, layers=True)
    passed = plain_answer(encoder, plain, batch)
    for mine, theirs in zip(found.layers, passed, strict=True):
        torch.testing.assert_close(mine, theirs)
    weights = [torch.randn_like(layer) for layer in passed]
    for layers in (found.layers, passed):
        sum((x * w).sum() for x, w in zip(layers, weights, strict=True)).backward()
    theirs = dict(plain.named_parameters())
    for name, weight in encoder.named_parameters():
        torch.testing.assert_close(
            weight.grad, theirs[name].grad, atol=1e-7, rtol=1e-6, msg=name
        )
    theirs = dict(plain.named_buffers())
    for name, buffer in encoder.named_buffers():  # counted once, though seen twice
        if name != "element_table" and "centres" not in name:
            torch.testing.assert_close(buffer, theirs[name], msg=name)


def test_gates_have_the_gradients_of_differences():
    torch.manual_seed(0)
    a, b, v = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    c = torch.randn(7, 3, dtype=torch.float64)
    sender, receiver = torch.tensor([[0, 1, 1, 3, 2, 0, 3], [0, 0, 1, 1, 1, 3, 3]])

    def gates(a, b, c, v):
        return _Gates.apply(a, b, c + 0, v, sender, receiver)

    arguments = [x.requires_grad_() for x in (a, b, c, v)]
    assert torch.autograd.gradcheck(gates, arguments)
    # Node 2 hears nobody.
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


# --------------------------------------------------------------------------- promises


def kept_rows(encoder: ALIGNN, batch: CrystalBatch, rows: int) -> int:
    """Count the numbers of each row of `rows` that a forward pass keeps."""
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
    if norm == "layer":  # and mean and deviation of each row that is normalised
        expected += 0
    assert kept_rows(encoder, batch, triplets) == expected


def test_added_directions_change_nothing_where_none_is_missing():
    batch = some_batch(GraphSettings(cutoff=5.0, mode="radius"))
    shuffled = torch.cat(
        [
            start + torch.randperm(end - start)
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


def test_it_reads_angles():
    """Two crystals with equal distances: a chain of atoms, straight and bent."""
    chains = []
    for angle in (np.pi, 2.0):
        half = np.sin(angle / 2) * 1.5
        cell = np.diag([2 * half, 20.0, 20.0])
        rise = np.cos(angle / 2) * 1.5 / 20
        frac = np.array([[0.0, 0.5, 0.5], [0.5, 0.5 + rise, 0.5]])
        chains.append(
            type(random_crystal(0))("chain", np.full(2, 6, np.uint8), frac, cell)
        )
    graph = GraphSettings(cutoff=2.0, mode="radius")
    batch = make_batch(chains, graph)
    assert batch.num_edges == 8
    torch.testing.assert_close(distances(batch), torch.full((8,), 1.5))
    with torch.no_grad():
        straight, bent = ALIGNN(width=8, cutoff=2.0).eval()(batch).crystals
    assert (straight - bent).abs().max() > 1e-3


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
        # Without gradients, equal angles share a row: 1e-10 is what may differ.
        difference = energy(start + step) - energy(start - step)
    assert (slope * step).sum().item() == pytest.approx(difference / 2, rel=1e-3)


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
        (
            {"norm": "batsch"},
            r"`norm` is 'batsch' but must be one of batch, layer; did you mean `batch`\?",
        ),
        ({"cutoff": 0.0}, r"`cutoff` is 0\.0 but must be positive"),
        ({"elements": "cgcn92"}, "unknown element table 'cgcn92'"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        ALIGNN(**settings)
