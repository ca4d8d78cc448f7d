"""CrysXPP: the predictor, and the autoencoder (a CGCNN with two objectives)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.plain_encoders.crysxpp import PlainCrysXPP
from crysdistill.encoders import make_encoder
from crysdistill.encoders.cgcnn import CGCNN
from crysdistill.encoders.crysxpp import CrysXPP
from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    GraphSettings,
    distances,
    make_batch,
)
from crysdistill.objectives import (
    Connectivity,
    Embedded,
    NodeFeatures,
    make_objective,
)
from crysdistill.structures.elements import CGCNN_BLOCKS
from crysdistill.transfer.heads import PropertyHead
from tests.conftest import random_crystal
from tests.reference_outputs import agree
from tests.six_crystals import arrays, six_crystals

PUBLISHED_GRAPH = GraphSettings(cutoff=8.0, max_neighbors=12, mode="cgcnn")


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameter_counts_of_the_published_classes():
    encoder = CrysXPP()
    assert parameters(encoder, PropertyHead(64, **CrysXPP.HEAD)) == 80_925
    autoencoder = CGCNN(bias=False)
    assert parameters(autoencoder, Connectivity(64), NodeFeatures(64)) == 102_924


# ------------------------------------------------------------------------ known answers


class Published:
    """A folder of known answers, and the batch that its inputs make.

    The cell is a cube of 1 Å and all atoms are at its origin, so an edge's lattice
    translation is its vector. Two of the given Gaussians determine its length.
    """

    def __init__(self, shared_data, folder: str) -> None:
        path = shared_data / "reference_outputs" / folder
        self.weights = load_file(path / "weights.safetensors")
        self.inputs = arrays(path / "inputs.npz")
        self.outputs = arrays(path / "outputs.npz")
        self.width = self.weights["embedding.weight"].shape[0]
        neighbours = self.inputs["nbr_fea_idx"]
        n, m = neighbours.shape
        length = lengths(self.inputs["nbr_fea"]).flatten()
        atoms = self.inputs["num_atoms"]
        self.batch = CrystalBatch(
            atomic_numbers=self.inputs["atomic_numbers"],
            frac_coords=torch.zeros(n, 3),
            cell=torch.eye(3).expand(len(atoms), 3, 3),
            edge_index=torch.stack(
                (neighbours.flatten(), torch.arange(n).repeat_interleave(m))
            ),
            edge_shift=F.pad(length.unsqueeze(1), (0, 2)),
            batch=self.inputs["batch"],
            ptr=F.pad(atoms.cumsum(0), (1, 0)),
            neighbor_ptr=torch.arange(n + 1) * m,
            num_nodes=n,
        )

    def encoder(self) -> CGCNN:
        """Return our encoder with the published weights."""
        if "mask" in self.weights:
            encoder = CrysXPP(self.width)
        else:
            encoder = CGCNN(self.width, bias=False)
        own = encoder.state_dict()
        found = {"element_table": own["element_table"]}
        for name, tensor in self.weights.items():
            first, _, rest = name.partition(".")
            if first == "mask":
                found["embedding.mask"] = tensor
            elif first == "embedding":
                found[name] = tensor
            elif first == "convs":
                layer, part, kind = rest.split(".")
                for half, which in enumerate(("gate", "core")):
                    place = {
                        "fc_full": f"{which}.linear",
                        "bn1": f"{which}_norm",
                        "bn2": "atom_norm",
                    }[part]
                    both = part != "bn2" and tensor.ndim > 0
                    value = tensor.chunk(2)[half] if both else tensor
                    found[f"convolutions.{layer}.{place}.{kind}"] = value
        encoder.load_state_dict(found)
        return encoder.eval()

    def layers_agree(self, layers: tuple[Tensor, ...]) -> None:
        """Check the atoms after each block against the published ones."""
        names = ["atoms_embedded", *(f"atoms_after_block_{k}" for k in range(3))]
        for layer, name in zip(layers, names, strict=True):
            agree(layer, self.outputs[name])


def lengths(gaussians: Tensor) -> Tensor:
    """Return the d whose Gaussians exp(-((d - mu) / 0.2)^2) are given."""
    largest = gaussians[..., :-1].argmax(-1, keepdim=True)
    logarithms = gaussians.double().log()
    step = logarithms.gather(-1, largest + 1) - logarithms.gather(-1, largest)
    # (d - mu)^2 - (d - mu - 0.2)^2 = 0.4 (d - mu) - 0.04
    return (0.2 * largest + 0.1 + 0.1 * step).squeeze(-1).float()


@pytest.mark.parametrize("folder", ["CrysXPP_predictor", "CrysXPP_predictor_published"])
def test_the_predictor_answers_as_published(shared_data, folder):
    published = Published(shared_data, folder)
    torch.testing.assert_close(
        CrysXPP().expansion(distances(published.batch)).view(-1, 12, 41),
        published.inputs["nbr_fea"],
        atol=2e-5,
        rtol=0,
    )
    with torch.no_grad():
        found = published.encoder()(published.batch, layers=True)
    published.layers_agree(found.layers)
    agree(F.softplus(found.crystals), published.outputs["pooled_after_softplus"])
    agree(head(published.weights, found.crystals), published.outputs["output"])


def head(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    names = ["conv_to_fc", *sorted({k[:5] for k in weights if "fcs." in k}), "fc_out"]
    for name in names:
        x = F.linear(F.softplus(x), weights[f"{name}.weight"], weights[f"{name}.bias"])
    return x


def test_published_predictions_follow_from_crystals(shared_data):
    published = Published(shared_data, "CrysXPP_predictor_published")
    batch = make_batch(six_crystals(shared_data), PUBLISHED_GRAPH)
    with torch.no_grad():
        found = published.encoder()(batch).crystals
        output = head(published.weights, found)
    mean, std = published.outputs["normalizer_mean_std"]
    expected = published.outputs["output_denormalised"]
    assert (output * std + mean - expected).abs().max() < 1e-4  # eV/atom


@pytest.mark.parametrize(
    "folder", ["CrysXPP_autoencoder", "CrysXPP_autoencoder_published"]
)
def test_the_autoencoder_is_cgcnn_and_two_objectives(shared_data, folder):
    published = Published(shared_data, folder)
    weights, outputs = published.weights, published.outputs
    encoder = published.encoder()
    features = make_objective("node_features", encoder, published=True, normalize=False)
    features.decoder.load_state_dict(part(weights, "fc_atom_feature"))
    edges = make_objective("connectivity", encoder, published=True, normalize=False)
    edges.bilinear.load_state_dict(part(weights, "fc_adj"))
    edges.mix.load_state_dict(part(weights, "fc1"))
    with torch.no_grad():
        found = encoder(published.batch, layers=True)
        published.layers_agree(found.layers)
        logits = features.decoder(found.atoms)
    close(logits, outputs["atom_feature_logits"])

    labels, log_prob, losses = [], [], []
    ptr = published.batch.ptr.tolist()
    for crystal, (start, end) in enumerate(pairwise(ptr)):
        alone = one_crystal(published.batch, crystal)
        with torch.no_grad():
            one = encoder(alone)
            seen = (Embedded(alone, one),)
            losses.append([edges(seen, alone, 0), features(seen, alone, 0)])
            h = one.atoms
            n = end - start
            i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
            log_prob.append(edges.mix(edges.bilinear(h[i], h[j])).log_softmax(1))
        counts = torch.zeros(n * n, dtype=torch.int64)
        neighbour, centre = alone.edge_index
        counts.index_add_(0, centre * n + neighbour, torch.ones_like(centre))
        labels.append(counts.clamp(max=5))
    assert torch.equal(torch.cat(labels), published.inputs["adjacency_classes"])
    close(torch.cat(log_prob), outputs["edge_log_prob"])
    whole, local = torch.tensor(losses).T
    close(whole, outputs["loss_global_per_crystal"])
    close(local, outputs["loss_local_per_crystal"])
    total = (0.9 * whole + 0.1 * local).mean()
    close(total, outputs["loss_total_divided_by_6"])


def part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias")}


def close(found: Tensor, expected: Tensor) -> None:
    """Compare to 1e-4; the published weights do not fix the logits better."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


def one_crystal(batch: CrystalBatch, crystal: int) -> CrystalBatch:
    """Cut one crystal out of a batch made by hand."""
    start, end = batch.ptr[crystal : crystal + 2].tolist()
    first, last = batch.neighbor_ptr[[start, end]].tolist()
    return CrystalBatch(
        atomic_numbers=batch.atomic_numbers[start:end],
        frac_coords=batch.frac_coords[start:end],
        cell=batch.cell[crystal : crystal + 1],
        edge_index=batch.edge_index[:, first:last] - start,
        edge_shift=batch.edge_shift[first:last],
        batch=torch.zeros(end - start, dtype=torch.int64),
        ptr=torch.tensor([0, end - start]),
        neighbor_ptr=batch.neighbor_ptr[start : end + 1] - first,
        num_nodes=end - start,
    )


# ------------------------------------------------------------- a second implementation


def published_names(encoder: CrysXPP) -> dict[str, Tensor]:
    """Rename our weights as published, where one matrix holds gate and core."""
    weights = {"mask": encoder.embedding.mask}
    for kind in ("weight", "bias"):
        weights[f"embedding.{kind}"] = getattr(encoder.embedding, kind)
    for k, layer in enumerate(encoder.convolutions):
        for kind in ("weight", "bias"):
            parts = (getattr(part.linear, kind) for part in (layer.gate, layer.core))
            weights[f"convs.{k}.fc_full.{kind}"] = torch.cat(tuple(parts))
        for kind in ("weight", "bias", "running_mean", "running_var"):
            norms = (getattr(norm, kind) for norm in (layer.gate_norm, layer.core_norm))
            weights[f"convs.{k}.bn1.{kind}"] = torch.cat(tuple(norms))
            weights[f"convs.{k}.bn2.{kind}"] = getattr(layer.atom_norm, kind)
    return weights


@pytest.mark.parametrize("training", [True, False])
def test_equals_a_plain_implementation(training):
    torch.manual_seed(0)
    crystals = [random_crystal(seed, 4) for seed in range(3)]
    batch = make_batch(crystals, GraphSettings(mode="nearest"))
    encoder = CrysXPP(16).train(training)
    nn.init.normal_(encoder.embedding.mask, 1.0, 0.3)
    plain = PlainCrysXPP(published_names(encoder)).train(training)
    found = encoder(batch, layers=True)
    gaussians = encoder.expansion(distances(batch)).view(batch.num_nodes, 12, -1)
    passed = plain(
        encoder.element_table[batch.atomic_numbers],
        gaussians,
        batch.edge_index[0].view(-1, 12),
    )
    for mine, theirs in zip(found.layers, passed, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
    weights = torch.randn_like(passed[-1])
    (found.atoms * weights).sum().backward()
    (passed[-1] * weights).sum().backward()
    for mine, theirs in (
        (encoder.embedding.mask, plain.mask),
        (encoder.embedding.weight, plain.embedding.weight),
        (encoder.convolutions[2].atom_norm.weight, plain.convs[2].bn2.weight),
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-4, rtol=1e-4)


# --------------------------------------------------------------------------- guarantees


def test_it_starts_as_the_cgcnn_of_the_same_weights():
    torch.manual_seed(0)
    crysxpp, cgcnn = CrysXPP().eval(), CGCNN().eval()
    weights = crysxpp.state_dict()
    del weights["embedding.mask"]
    cgcnn.load_state_dict(weights)
    batch = make_batch([random_crystal(0), random_crystal(1)])
    assert torch.equal(crysxpp(batch).crystals, cgcnn(batch).crystals)


def test_a_feature_without_weight_is_not_seen():
    torch.manual_seed(0)
    encoder = CrysXPP(elements="cgcnn92").eval()
    # Chlorine and bromine differ only in period, electronegativity, ...
    one, other = random_crystal(0, 3, (17,)), random_crystal(0, 3, (35,))
    with torch.no_grad():
        embedded = encoder(make_batch([one, other])).crystals
        assert (embedded[0] - embedded[1]).abs().max() > 1e-3
        differ = encoder.element_table[17] != encoder.element_table[35]
        encoder.embedding.mask[differ] = 0.0
        embedded = encoder(make_batch([one, other])).crystals
    assert torch.equal(embedded[0], embedded[1])


def test_feature_weights_have_names():
    encoder = CrysXPP()
    with torch.no_grad():
        encoder.embedding.mask.copy_(torch.arange(92.0))
    found = encoder.feature_weights()
    assert {name: len(values) for name, values in found.items()} == CGCNN_BLOCKS
    assert found["group"].tolist() == list(range(19))
    assert found["electronegativity"].tolist() == list(range(26, 36))
    assert found["atomic_volume"].tolist() == list(range(82, 92))
    assert not any(values.requires_grad for values in found.values())
    assert CrysXPP(elements="onehot").feature_weights()["onehot"].shape == (101,)


def test_settings():
    graph = GraphSettings(cutoff=6.0)
    encoder = make_encoder("crysxpp", graph, width=8)
    assert encoder.settings["cutoff"] == 6.0
    assert CrysXPP.for_properties(encoder.settings) == encoder.settings
    assert encoder.blocks().embedding is encoder.embedding
    with pytest.raises(InputError, match="`width` is 0 but must be at least 1"):
        CrysXPP(width=0)
    with pytest.raises(InputError, match="encoder `crysxpp` has no setting `bias`"):
        make_encoder("crysxpp", bias=False)
