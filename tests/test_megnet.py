"""MEGNet against published weights and programs, a plain form, and by hand."""

from __future__ import annotations

import copy
import gzip
import json

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain_encoders.megnet import PlainMEGNet
from crysdistill.encoders.encoder import Embeddings
from crysdistill.encoders.megnet import Inputs, MEGNet
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch
from crysdistill.graphs.batch import replace as with_tensors
from crysdistill.layers.basis import shifted_softplus
from crysdistill.layers.group_norm import DifferentiableGroupNorm
from crysdistill.structures.elements import atomic_numbers_by_symbol
from tests.conftest import from_structure, random_crystal
from tests.matdeeplearn import check_features, head, parameters
from tests.reference_outputs import agree, load_reference

MEAN, SPREAD = -1.65459073, 1.07266128  # eV/atom, of the published weights
RADIUS = GraphSettings(5.0, mode="radius")


def batch_of(count: int = 5, dtype: torch.dtype = torch.float32) -> CrystalBatch:
    batch = make_batch(
        [random_crystal(seed, 1 + seed) for seed in range(count)], RADIUS
    )
    return with_tensors(
        batch, frac_coords=batch.frac_coords.to(dtype), cell=batch.cell.to(dtype)
    )


# ------------------------------------------------------------------------ matgl


def test_weights_of_matgl():
    encoder = MEGNet(**MEGNet.PUBLISHED)
    assert encoder.crystal_width == 160
    # The published head has hidden layers of 32 and 16.
    last = nn.Sequential(nn.Linear(160, 32), nn.Linear(32, 16), nn.Linear(16, 1))
    assert parameters(encoder, last) == 189_521
    idle = encoder.embedding.state.linears[0].weight  # of a state of zeros
    assert idle.numel() == 128


def matgl(weights: dict[str, Tensor], symbols: list[str]) -> MEGNet:
    """Our encoder with the published weights.

    Args:
        weights: by published name.
        symbols: of the elements, in the order of the published embedding.
    """
    encoder = MEGNet(**MEGNet.PUBLISHED)
    numbers = [atomic_numbers_by_symbol()[symbol] for symbol in symbols]
    table = "embedding.elements.element_table"
    state = {table: encoder.state_dict()[table]}
    kinds = {"node": "atoms", "edge": "edges", "state": "state"}
    for name, value in weights.items():
        parts = name.removeprefix("model.").split(".")
        if parts[0] in ("output_proj", "bond_expansion"):
            continue
        if parts[0] == "embedding":
            order = torch.tensor(np.argsort(numbers))
            state["embedding.elements.linear.weight"] = value[order].T
            continue
        kind = kinds[next(part for part in parts if "_" in part).split("_")[0]]
        if parts[1] == "lstm":
            state[f"pooling.{kind}.lstm.{parts[2].removesuffix('_l0')}"] = value
            continue
        where = f"linears.{int(parts[-2]) // 2}.{parts[-1]}"
        if parts[0] != "blocks":
            state[f"embedding.{kind}.{where}"] = value
        elif parts[2] != "conv":
            state[f"convolutions.{parts[1]}.dense.{kind}.{where}"] = value
        else:
            if kind == "state" and where == "linears.0.weight":
                u, edges, atoms = value.chunk(3, dim=1)  # [u | e | v] there
                value = torch.cat((edges, atoms, u), dim=1)
            state[f"convolutions.{parts[1]}.{kind}.{where}"] = value
    encoder.load_state_dict(state)
    return encoder.eval()


def energies(weights: dict[str, Tensor], crystals: Tensor) -> Tensor:
    """Return the published head's output (B,) for crystals (B, 160)."""
    for k in (0, 2, 4):
        name = f"model.output_proj.layers.{k}"
        crystals = F.linear(
            crystals, weights[f"{name}.weight"], weights[f"{name}.bias"]
        )
        crystals = crystals if k == 4 else shifted_softplus(crystals)
    return crystals.squeeze(1)


@pytest.fixture(scope="module")
def published(shared_data):
    folder = shared_data / "reference_outputs" / "MEGNet_matgl_published"
    if not folder.is_dir():
        pytest.skip(f"known answers absent: {folder}")
    weights = load_file(folder / "weights.safetensors")
    with np.load(folder / "inputs.npz") as file:
        inputs = dict(file)
    with np.load(folder / "outputs.npz") as file:
        outputs = {name: torch.from_numpy(file[name]) for name in file.files}
    return weights, inputs, outputs, matgl(weights, inputs["element_types"].tolist())


def test_answers_of_matgl(published):
    weights, inputs, outputs, encoder = published
    # The program averages edges at their destination.
    order = np.argsort(inputs["edge_dst"], kind="stable")
    source, destination = (
        torch.from_numpy(inputs[name][order]).long()
        for name in ("edge_src", "edge_dst")
    )
    counts = torch.bincount(destination)
    atoms = torch.from_numpy(inputs["num_atoms"])
    zero = torch.zeros(1, dtype=torch.int64)
    batch = CrystalBatch(
        atomic_numbers=torch.from_numpy(inputs["atomic_numbers"]),
        edge_index=torch.stack((source, destination)),
        batch=torch.from_numpy(inputs["batch"]),
        ptr=torch.cat((zero, atoms.cumsum(0))),
        neighbor_ptr=torch.cat((zero, counts.cumsum(0))),
        num_nodes=int(atoms.sum()),
    )
    length = torch.from_numpy(inputs["distance"][order])
    with torch.no_grad():
        given = Inputs(
            encoder.embedding.elements(batch),
            encoder.expansion(length),
            torch.from_numpy(inputs["state"]),
        )
        x, e, u = encoder.embedding(given)
        found = encoder.encode(given, batch, layers=True)
        one = encoder.convolutions[0](x, e, u, batch)
    # The first thirty edges belong to the first two crystals.
    first = torch.from_numpy(np.argsort(order, kind="stable"))[:30]
    agree(x, outputs["node_encoder"])
    agree(u, outputs["state_encoder"])
    agree(e[first], outputs["edge_encoder_first_two_crystals"])
    agree(one[1][first], outputs["block_0_edges_first_two_crystals"])
    agree(one[2], outputs["block_0_state"])
    for k in range(3):
        agree(found.layers[k + 1], outputs[f"block_{k}_atoms"])
    agree(found.edges[first], outputs["block_2_edges_first_two_crystals"])
    agree(found.state, outputs["block_2_state"])
    agree(found.crystals[:, :64], outputs["node_s2s"])
    agree(found.crystals[:, 64:128], outputs["edge_s2s"])
    agree(found.crystals, outputs["readout"])
    agree(energies(weights, found.crystals), outputs["output_standardised"])


def test_matgl_predicts_formation_energies_from_our_own_graph(published, shared_data):
    weights, inputs, outputs, encoder = published
    wanted = inputs["ids"].tolist()
    with gzip.open(shared_data / "mp36k" / "structures.jsonl.gz", "rt") as lines:
        rows = {row["id"]: row for row in map(json.loads, lines) if row["id"] in wanted}
    crystals = [
        from_structure(
            name,
            Structure(Lattice(row["lattice"]), row["species"], row["frac"]),
        )
        for name, row in ((name, rows[name]) for name in wanted)
    ]
    batch = make_batch(crystals, GraphSettings(4.0, mode="radius"))
    assert batch.num_edges == len(inputs["distance"])
    with torch.no_grad():
        found = energies(weights, encoder(batch).crystals) * SPREAD + MEAN
    agree(found, outputs["output_ev_per_atom"])
    label = outputs["label_formation_energy_per_atom"]
    assert (found - label).abs().mean() == pytest.approx(0.062, abs=1e-3)
    # Averaging at the source gives other values.
    other = outputs["output_ev_per_atom_matgl_4_1_2_source_side"]
    assert (found - other).abs().mean() > 0.1


# ---------------------------------------------------------------------- MatDeepLearn


@pytest.mark.parametrize(
    ("convolutions", "count"), [(4, 816_801), (25, 4_857_201), (30, 5_819_201)]
)
def test_weights_of_matdeeplearn(convolutions, count):
    encoder = MEGNet(**{**MEGNet.MATDEEPLEARN, "convolutions": convolutions})
    layers = (nn.Linear(300, 100), nn.Linear(100, 100), nn.Linear(100, 100))
    assert parameters(encoder, *layers, nn.Linear(100, 1)) == count
    idle = encoder.embedding.state.linears[0].weight  # of a state of zeros
    assert idle.numel() == 300


def matdeeplearn(weights: dict[str, Tensor]) -> MEGNet:
    """Our encoder with the weights of the program MatDeepLearn."""
    small = {"width": 20, "hidden": 20, "atom_width": 16, "convolutions": 3}
    encoder = MEGNet(**{**MEGNet.MATDEEPLEARN, **small})
    table = "embedding.elements.element_table"
    state = {table: encoder.state_dict()[table]}
    kinds = {"e": "edges", "x": "atoms", "u": "state"}
    kinds |= {"edge": "edges", "node": "atoms", "global": "state"}
    for name, value in weights.items():
        parts = name.split(".")
        part, kind = parts[-1], kinds.get(parts[0].split("_")[0])
        if parts[0] == "pre_lin_list":
            state[f"embedding.elements.linear.{part}"] = value
        elif parts[0] == "conv_list":
            kind = kinds[parts[2].split("_")[0]]
            what = "norms" if parts[3] == "bn_list" else "linears"
            if kind == "edges" and parts[3:] == ["edge_mlp", "0", "weight"]:
                centre, neighbour, *rest = value.chunk(4, dim=1)
                value = torch.cat((neighbour, centre, *rest), dim=1)
            state[f"convolutions.{parts[1]}.{kind}.{what}.{parts[4]}.{part}"] = value
        elif kind is not None:
            block = "embedding" if parts[1] == "0" else f"convolutions.{parts[1]}.dense"
            state[f"{block}.{kind}.linears.{int(parts[2]) // 2}.{part}"] = value
        else:
            assert parts[0] in ("post_lin_list", "lin_out"), name
    encoder.load_state_dict(state)
    return encoder.eval()


def test_answers_of_matdeeplearn(shared_data):
    # The program averages edges at their source, row 0.
    reference = load_reference(shared_data, "MEGNet_MatDeepLearn", receiver=0)
    weights, inputs, outputs, batch = reference
    encoder = matdeeplearn(weights)
    check_features(reference, encoder.embedding.elements)

    def encode(state: Tensor) -> Embeddings:
        x = encoder.embedding.elements.linear(inputs["x"])
        return encoder.encode(Inputs(x, inputs["edge_attr"], state), batch, layers=True)

    with torch.no_grad():
        x = encoder.embedding.elements.linear(inputs["x"])
        given = Inputs(x, inputs["edge_attr"], inputs["u"])
        embedded = encoder.embedding(given)
        one = encoder.convolutions[0](*embedded, batch)
        found = encode(inputs["u"])
        other = encode(inputs["u_random"])
    agree(x, outputs["atoms_before_relu"])
    for value, kind in zip(embedded, ("x", "e", "u"), strict=True):
        agree(value, outputs[f"{kind}_embed_0"])
    for k, value in enumerate(embedded):
        agree(one[k] - value, outputs[f"block_0_{k}"])
    for k in range(3):
        agree(found.layers[k + 1], outputs[f"atoms_after_block_{k}"])
    agree(found.crystals, outputs["pooled"])
    entering, output = head(weights, found.crystals)
    agree(entering, outputs["input_of_last_layer"])
    agree(output, outputs["output"])
    agree(head(weights, other.crystals)[1], outputs["output_u_random"])
    assert (outputs["output_u_random"] - outputs["output"]).abs().max() > 1e-3


# --------------------------------------------------------------------- on our own graph

SMALL = {"width": 6, "hidden": 10, "atom_width": 5, "cutoff": 5.0, "gaussians": 20}
FORMS = {
    "ours": {},
    "matgl": MEGNet.PUBLISHED,
    "matdeeplearn": {**MEGNet.MATDEEPLEARN, "degrees": 0},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("convolutions", [1, 3])
def test_equals_the_plain_form(form, training, convolutions):
    torch.manual_seed(0)
    batch = batch_of(8, torch.float64)
    settings = {**FORMS[form], **SMALL, "convolutions": convolutions}
    encoder = MEGNet(**settings).double()
    encoder(batch)  # gives batch norms running statistics
    plain = PlainMEGNet(encoder).double().train(training)
    found = encoder.train(training)(batch)
    atoms, crystals = plain(batch)
    # Batch norms over few states amplify the rounding of lengths to 1e-10 Å.
    torch.testing.assert_close(found.atoms, atoms, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.crystals, crystals, rtol=0, atol=1e-6)
    assert found.edges.shape == (batch.num_edges, 6)
    assert found.state.shape == (batch.num_graphs, 6)
    assert torch.equal(found.state, found.crystals[:, -6:])
    (found.atoms.square().sum() + found.crystals.sin().sum()).backward()
    (atoms.square().sum() + crystals.sin().sum()).backward()
    pairs = [(encoder.embedding.elements.linear, plain.embedding)]
    for kind, layers in plain.encoders.items():
        pairs += zip(
            getattr(encoder.embedding, kind).linears, layers.linears, strict=True
        )
    for mine, theirs in zip(encoder.convolutions, plain.blocks, strict=True):
        for name, layer in theirs.named_modules():
            if isinstance(layer, nn.Linear):
                pairs.append((mine.get_submodule(name), layer))
    for mine, theirs in pairs:
        scale = theirs.weight.grad.abs().max().item()
        torch.testing.assert_close(
            mine.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-6 * (1 + scale)
        )


def test_edges_of_a_kind_share_their_work():
    torch.manual_seed(0)
    batch = make_batch([random_crystal(0, 4)] * 3, RADIUS)
    encoder = MEGNet(**SMALL)
    inputs = encoder.features(batch)
    assert len(inputs.edges) <= batch.num_edges / 3
    rows = []
    for block in encoder.convolutions:
        finish = block.edges.finish

        def counted(x: Tensor, finish=finish) -> Tensor:
            rows.append(len(x))
            return finish(x)

        block.edges.finish = counted
    encoder(batch)
    assert rows == [len(inputs.edges), batch.num_edges, batch.num_edges]


def test_atoms_and_crystals_without_edges():
    encoder = MEGNet(**SMALL)
    batch = batch_of()
    alone = with_tensors(
        batch,
        edge_index=batch.edge_index[:, :0],
        edge_shift=batch.edge_shift[:0],
        neighbor_ptr=torch.zeros_like(batch.neighbor_ptr),
    )
    found = encoder(alone)
    assert torch.isfinite(found.crystals).all()
    # Without edges, set2set reads zeros, but its query is not zero.
    assert not found.crystals[:, 18:24].any()
    assert found.crystals[:, 12:18].any()


def test_norm_and_skip_in_the_update_networks():
    torch.manual_seed(0)
    encoder = MEGNet(**SMALL, layers=3, norm="group", skip=True, activation="relu")
    phi = encoder.convolutions[1].atoms
    assert all(isinstance(norm, DifferentiableGroupNorm) for norm in phi.norms)
    x = torch.randn(9, 18)
    a, b, c = copy.deepcopy(phi.norms)
    first = a(F.relu(phi.linears[0](x)))
    second = first + b(F.relu(phi.linears[1](first)))
    third = c(F.relu(phi.linears[2](second)))  # 10 wide before, 6 after
    torch.testing.assert_close(phi(x), third)


def test_derivatives_with_respect_to_positions():
    torch.manual_seed(0)
    batch = batch_of(3, torch.float64)
    encoder = MEGNet(**SMALL).double()

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


def test_elements_without_an_embedding_look_like_masked_atoms():
    batch = batch_of(3)
    radium, masked = (
        with_tensors(batch, atomic_numbers=torch.full_like(batch.atomic_numbers, z))
        for z in (88, 0)
    )
    for absent, same in (("mp2018", True), ("none", False)):
        encoder = MEGNet(**SMALL, absent=absent)
        assert torch.allclose(encoder(radium).atoms, encoder(masked).atoms) == same


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 0}, r"`width` is 0 but must be at least 1"),
        ({"hidden": 0}, r"`hidden` is 0 but must be at least 1"),
        ({"convolutions": 0}, r"`convolutions` is 0 but must be at least 1"),
        ({"layers": 0}, r"`layers` is 0 but must be at least 1"),
        ({"atom_width": 0}, r"`atom_width` is 0 but must be at least 1"),
        ({"steps": 0}, r"`steps` is 0 but must be at least 1"),
        ({"state_inputs": -1}, r"`state_inputs` is -1 but must be at least 0"),
        ({"degrees": -1}, r"`degrees` is -1 but must be at least 0"),
        ({"gaussians": 1}, r"`gaussians` is 1 but must be at least 2"),
        ({"gaussian_width": 0.0}, r"`gaussian_width` is 0\.0 but must be positive"),
        ({"cutoff": -1.0}, r"`cutoff` is -1\.0 but must be positive"),
        ({"beyond": -1.0}, r"`beyond` is -1\.0 but must not be negative"),
        ({"elements": "one-hot"}, r"`elements` is 'one-hot' .*mean `onehot`\?"),
        ({"absent": "mp2019"}, r"`absent` is 'mp2019' .*mean `mp2018`\?"),
        ({"embedding": "look"}, r"`embedding` is 'look' .*mean `lookup`\?"),
        ({"activation": "rel"}, r"`activation` is 'rel' .*mean `relu`\?"),
        ({"norm": "bach"}, r"`norm` is 'bach' but must be one of .*mean `batch`\?"),
        ({"edge_mean": "atom"}, r"`edge_mean` is 'atom' .*mean `atoms`\?"),
        ({"pooling": "max"}, r"`pooling` is 'max' but must be one of set2set, mean"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        MEGNet(**settings)
