"""Published checkpoints: read without executing code, with equal predictions."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pymatgen.core import Structure

from crysdistill.cli import main
from crysdistill.errors import InputError
from crysdistill.graphs.batch import distances, make_batch
from crysdistill.store.store import Store
from crysdistill.transfer.published import (
    PUBLISHED_GRAPH,
    import_cgcnn,
    published_provenance,
)
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_predictor, read_header, save_weights
from tests.conftest import from_structure, random_crystal
from tests.toy_stores import write_lines

MODELS = (
    "band-gap",
    "bulk-moduli",
    "efermi",
    "final-energy-per-atom",
    "formation-energy-per-atom",
    "poisson-ratio",
    "semi-metal-classification",
    "shear-moduli",
)


# --------------------------------------------------------------------- real checkpoints


@pytest.fixture(scope="module")
def reference(shared_data):
    """The 120 structures and the predictions of the published code."""
    folder = shared_data / "cgcnn_published"
    text = (folder / "reference_predictions.csv").read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    crystals = []
    with (
        zipfile.ZipFile(folder / "structures.zip") as archive,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # pymatgen on rounded coordinates
        for row in rows:
            cif = archive.read(f"{row['structure']}.cif").decode()
            structure = Structure.from_str(cif, fmt="cif")
            crystals.append(from_structure(row["structure"], structure))
    return folder, rows, make_batch(crystals, PUBLISHED_GRAPH)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_equal_those_of_the_published_code(name, reference):
    folder, rows, batch = reference
    predictor = import_cgcnn(folder / f"{name}.pth.tar")
    expected = np.array([float(row[name]) for row in rows])
    assert len(expected) == 120
    difference = np.abs(predictor.predict(batch).numpy() - expected)
    assert difference.max() < 1e-4
    assert published_provenance(folder / name, predictor).licence == "MIT"
    assert sum(p.numel() for p in predictor.parameters()) == 96_641 + 33 * (
        predictor.target.task == "classification"
    )


def test_published_targets_have_names_and_units(shared_data):
    folder = shared_data / "cgcnn_published"
    targets = [import_cgcnn(folder / f"{name}.pth.tar").target for name in MODELS]
    assert {(t.name, t.unit) for t in targets} == {
        ("band_gap", "eV"),
        ("bulk_modulus_log10", "log10(GPa)"),
        ("efermi", "eV"),
        ("final_energy_per_atom", "eV/atom"),
        ("formation_energy_per_atom", "eV/atom"),
        ("poisson_ratio", ""),
        ("is_metal", ""),
        ("shear_modulus_log10", "log10(GPa)"),
    }
    assert [t.name for t in targets if t.task == "classification"] == ["is_metal"]


# ---------------------------------------------------------- a checkpoint from the tests


def published_state(width=8, convolutions=2, hidden=5, layers=2, outputs=1, seed=0):
    """Random weights with the names and shapes of the published code."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    state = {"embedding.weight": draw(width, 92), "embedding.bias": draw(width)}
    for i in range(convolutions):
        state[f"convs.{i}.fc_full.weight"] = draw(2 * width, 2 * width + 41)
        state[f"convs.{i}.fc_full.bias"] = draw(2 * width)
        for norm, size in (("bn1", 2 * width), ("bn2", width)):
            state[f"convs.{i}.{norm}.weight"] = draw(size)
            state[f"convs.{i}.{norm}.bias"] = draw(size)
            state[f"convs.{i}.{norm}.running_mean"] = draw(size)
            state[f"convs.{i}.{norm}.running_var"] = draw(size).square() + 0.5
    state["conv_to_fc.weight"], state["conv_to_fc.bias"] = (
        draw(hidden, width),
        draw(hidden),
    )
    for i in range(layers - 1):
        state[f"fcs.{i}.weight"], state[f"fcs.{i}.bias"] = (
            draw(hidden, hidden),
            draw(hidden),
        )
    state["fc_out.weight"], state["fc_out.bias"] = draw(outputs, hidden), draw(outputs)
    return state


def published_checkpoint(task="regression", **sizes):
    state = published_state(outputs=2 if task == "classification" else 1, **sizes)
    args = {"atom_fea_len": 8, "n_conv": 2, "h_fea_len": 5, "n_h": 2, "task": task}
    args["data_options"] = ["some/folder"]
    normalizer = {"mean": torch.tensor(-1.5), "std": torch.tensor(0.7)}
    return {"state_dict": state, "args": args, "normalizer": normalizer, "epoch": 3}


def test_the_command_says_how_to_build_for_it(tmp_path, capsys):
    """A store built with the suggested command has the graph of the weights."""
    torch.save(published_checkpoint(), tmp_path / "p.pth.tar")
    weights = tmp_path / "w.safetensors"
    assert main(["import-cgcnn", f"{tmp_path}/p.pth.tar", "-o", str(weights)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    told = re.search(r"build the dataset with `(--graph cgcnn [^`]*)`", said)
    assert told, said
    source = write_lines(tmp_path / "s.jsonl", [random_crystal(0, atoms=3)])
    line = ["build", str(source), "-o", f"{tmp_path}/s.h5", *told[1].split()]
    assert main([*line, "--no-progress", "--no-symmetry"]) == 0
    assert Store.open(tmp_path / "s.h5").graph == read_header(weights).graph


def plain_cgcnn(state, batch, table, layers=2):
    """The published model in its own layout: 12 neighbours per atom, concatenated."""
    n = batch.num_nodes
    neighbours = batch.edge_index[0].view(n, 12)
    centres = torch.arange(41) * 0.2
    u = torch.exp(-((distances(batch).view(n, 12, 1) - centres) ** 2) / 0.2**2)
    x = F.linear(
        table[batch.atomic_numbers], state["embedding.weight"], state["embedding.bias"]
    )

    def norm(values, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(values, *(state[f"{name}.{key}"] for key in keys))

    for i in range(layers):
        own = x.unsqueeze(1).expand(n, 12, -1)
        z = torch.cat((own, x[neighbours], u), dim=2).reshape(n * 12, -1)
        z = F.linear(
            z, state[f"convs.{i}.fc_full.weight"], state[f"convs.{i}.fc_full.bias"]
        )
        gate, core = norm(z, f"convs.{i}.bn1").view(n, 12, -1).chunk(2, dim=2)
        total = (torch.sigmoid(gate) * F.softplus(core)).sum(1)
        x = F.softplus(x + norm(total, f"convs.{i}.bn2"))
    y = torch.stack([x[batch.batch == b].mean(0) for b in range(batch.num_graphs)])
    for name in ("conv_to_fc", "fcs.0", "fc_out"):
        y = F.linear(F.softplus(y), state[f"{name}.weight"], state[f"{name}.bias"])
    return y


@pytest.fixture
def path(tmp_path):
    return tmp_path / "my-gap.pth.tar"


@pytest.fixture(scope="module")
def batch():
    # Atoms with fewer than 12 neighbours within 8 Å are padded.
    sparse = random_crystal(0)
    sparse = dataclasses.replace(sparse, cell=sparse.cell * 3)
    batch = make_batch([sparse, random_crystal(1), random_crystal(2)], PUBLISHED_GRAPH)
    assert batch.padding.any()
    return batch


def test_a_users_checkpoint_equals_a_plain_second_implementation(path, batch):
    checkpoint = published_checkpoint()
    torch.save(checkpoint, path)
    predictor = import_cgcnn(path)
    assert predictor.target == Target("my-gap")
    output = plain_cgcnn(
        checkpoint["state_dict"], batch, predictor.encoder.element_table
    )
    expected = output[:, 0] * 0.7 - 1.5
    torch.testing.assert_close(predictor.predict(batch), expected, rtol=1e-5, atol=1e-5)


def test_a_classifier_gives_the_probability_of_class_1(path, batch):
    checkpoint = published_checkpoint("classification")
    checkpoint["best_mae_error"] = np.float64(0.95)
    torch.save(checkpoint, path)
    predictor = import_cgcnn(path)
    output = plain_cgcnn(
        checkpoint["state_dict"], batch, predictor.encoder.element_table
    )
    expected = output.softmax(1)[:, 1]
    torch.testing.assert_close(predictor.predict(batch), expected, rtol=1e-5, atol=1e-5)


def test_an_imported_model_becomes_a_weights_file(path, batch, tmp_path):
    torch.save(published_checkpoint(), path)
    predictor = import_cgcnn(path)
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, predictor, provenance=published_provenance(path, predictor))
    assert torch.equal(load_predictor(weights).predict(batch), predictor.predict(batch))
    provenance = read_header(weights).provenance
    assert (provenance.licence, provenance.overlap) == ("", "unknown")
    assert provenance.origin == "imported from my-gap.pth.tar"


class Harmful:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "argument"),
    [(exec, "raise SystemExit('executed')"), (os.system, "exit 1"), (Path, "a")],
)
def test_pickled_code_is_named_and_not_executed(function, argument, path):
    harmful = Harmful(function, argument)
    torch.save({**published_checkpoint(), "extra": harmful}, path)
    text = rf"Python object \([\w.]*{function.__name__}\), which is not loaded"
    with pytest.raises(InputError, match=text):
        import_cgcnn(path)


def edited(**changes):
    checkpoint = published_checkpoint()
    checkpoint["args"].update(changes)
    return checkpoint


def with_tensor(name, tensor):
    checkpoint = published_checkpoint()
    checkpoint["state_dict"][name] = tensor
    return checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "text"),
    [
        (torch.zeros(3), "it holds a Tensor"),
        ({"model": {}}, r"is missing or incomplete \('args'\)"),
        (edited(task="ranking"), "`task` is 'ranking' but must be regression or"),
        (edited(n_conv="many"), "is missing or incomplete"),
        (edited(n_conv=3), "missing: encoder.convolutions.2.gate.linear.weight"),
        (edited(n_conv=1), "unexpected: encoder.convolutions.1.gate.linear.weight"),
        (edited(n_conv=0), "`convolutions` is 0 but must be at least 1"),
        (edited(h_fea_len=6), r"head.first.weight is \(5, 8\) instead of \(6, 8\)"),
        (
            with_tensor("embedding.weight", torch.zeros(8, 101)),
            r"encoder.embedding.weight is \(8, 101\) instead of \(8, 92\)",
        ),
        (
            with_tensor("bilinear.weight", torch.zeros(2)),
            "it has no place for `bilinear.weight`",
        ),
    ],
)
def test_checkpoints_of_other_models_are_refused(checkpoint, text, path):
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=text):
        import_cgcnn(path)


def test_files_that_are_no_checkpoints_are_refused(path, tmp_path):
    with pytest.raises(InputError, match=r"my-gap\.pth\.tar: no such file"):
        import_cgcnn(path)
    with pytest.raises(InputError, match="is a folder; give the checkpoint in it"):
        import_cgcnn(tmp_path)
    path.write_text("id,prop\n1,2\n")
    with pytest.raises(InputError, match="is not a readable PyTorch checkpoint"):
        import_cgcnn(path)
    torch.save(published_checkpoint(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="is not a readable PyTorch checkpoint"):
        import_cgcnn(path)
