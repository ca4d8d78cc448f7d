"""The package's own weights work by name wherever a weights file does."""

from __future__ import annotations

import hashlib
import re
import shutil

import pytest
import torch

from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.store.store import Store
from crysdistill.teachers import make_teacher
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.fit import FitConfig, fit
from crysdistill.training.inputs import find_inputs
from crysdistill.training.pretrain import pretrain
from crysdistill.training.settings import SplitSettings, TrainerSettings
from crysdistill.transfer import shipped as module
from crysdistill.transfer.card import write_card
from crysdistill.transfer.shipped import located, shipped
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import (
    Provenance,
    load_encoder,
    read_header,
    save_weights,
)
from tests.toy_runs import pretraining_config, results, weights_of
from tests.toy_stores import SMALL_ENCODER, labelled, write_store

GRAPH = GraphSettings(6.0, 8)
MOST = 5_000_000  # bytes per file
IN_THE_WHEEL = 10_000_000
MASKS = {"node_features": {"weight": 1.0}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package with two encoders: one for the graph of the tests, one for another."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(module, "FOLDER", folder)
    for name, graph in (("good", GRAPH), ("other", GraphSettings(5.0, 8))):
        torch.manual_seed(0)
        encoder = make_encoder(graph=graph, **SMALL_ENCODER)
        save_weights(
            folder / f"{name}.safetensors", encoder, graph, Provenance(corpus="abc")
        )
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("set") / "d.h5", labelled(60), GRAPH)


def test_they_are_in_the_order_of_their_names(folder):
    """`fit` takes the network from scratch from the first."""
    shutil.copy(folder / "good.safetensors", folder / "good-large.safetensors")
    assert list(shipped()) == ["good", "good-large", "other"]


def test_a_name_is_as_good_as_a_path(folder):
    path = folder / "good.safetensors"
    assert list(shipped()) == ["good", "other"]
    assert located("good") == path
    assert read_header("good") == read_header(path)
    known, named = load_encoder(path).state_dict(), load_encoder("good").state_dict()
    assert all(torch.equal(known[key], named[key]) for key in known)


def test_a_file_of_that_name_comes_first(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").write_bytes((folder / "other.safetensors").read_bytes())
    assert read_header("good").graph.cutoff == 5.0


def test_an_unknown_name_lists_those_there_are(folder, tmp_path):
    text = "bad: no such file; the weights of the package are good, other"
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        read_header("bad")
    missing = tmp_path / "bad.safetensors"
    with pytest.raises(InputError, match=r"no such file$"):
        read_header(missing)


def test_a_run_is_of_the_content_behind_the_name(folder):
    inputs = find_inputs({"weights": "good"})
    assert inputs == find_inputs({"weights": str(folder / "good.safetensors")})
    assert inputs != find_inputs({"weights": "other"})


def test_as_a_teacher(folder, dataset):
    teacher = make_teacher("good", Store.open(dataset))
    path = folder / "good.safetensors"
    again = make_teacher(path, Store.open(dataset))
    assert teacher.fingerprint() == again.fingerprint()


def settings(dataset, out, **more):
    trainer = TrainerSettings(
        epochs=1, batch_size=12, accelerator="cpu", progress=False, threads=1
    )
    split = SplitSettings(train=36, val=12, test=12)
    shared = {"dataset": dataset, "out": out, "split": split, "trainer": trainer}
    return {**shared, "target": Target("density", "1/Å³"), **more}


def test_fit_takes_those_that_read_the_graph(folder, dataset, tmp_path):
    fit(FitConfig(**settings(dataset, tmp_path / "fit")))
    found = results(tmp_path / "fit")
    assert {"good", "composition", "untrained"} == set(found["probe"])
    assert "fine-tuned" in found["candidates"]


def test_fit_takes_none_that_a_foreign_model_taught(folder, dataset, tmp_path):
    """What such a model has seen is unknown, so `fit` needs its name."""
    taught = folder / "good.safetensors"
    strange = Provenance(corpus="abc", taught_by="a model, trained on something")
    save_weights(folder / "strange.safetensors", load_encoder(taught), GRAPH, strange)
    fit(FitConfig(**settings(dataset, tmp_path / "fit")))
    assert "strange" not in results(tmp_path / "fit")["probe"]
    out = tmp_path / "named"
    fit(FitConfig(**settings(dataset, out, weights=["good", "strange"])))
    assert {"good", "strange", "all together"} < set(results(out)["probe"])


def test_fit_takes_a_large_one_by_name_only(folder, dataset, tmp_path):
    shutil.copy(folder / "good.safetensors", folder / "good-large.safetensors")
    fit(FitConfig(**settings(dataset, tmp_path / "fit")))
    assert "good-large" not in results(tmp_path / "fit")["probe"]
    fit(FitConfig(**settings(dataset, tmp_path / "named", weights=["good-large"])))
    assert "good-large" in results(tmp_path / "named")["probe"]


def test_fit_without_any(folder, dataset, tmp_path, capsys):
    encoder = dict(SMALL_ENCODER)
    fit(FitConfig(**settings(dataset, tmp_path / "fit", weights=[], encoder=encoder)))
    assert "fine-tuned" not in results(tmp_path / "fit")["candidates"]


def test_pretraining_goes_on_from_weights(folder, dataset, tmp_path):
    config = pretraining_config(
        dataset, tmp_path / "more", weights="good", objectives=MASKS
    )
    # The rate is so small that the weights do not change.
    config.optimizer.lr = 1e-30
    config.optimizer.weight_decay = 0.0
    path = pretrain(config)
    start, end = weights_of(folder / "good.safetensors"), weights_of(path)
    learned = [name for name in start if "running" not in name and "num_b" not in name]
    assert learned
    for name in learned:
        torch.testing.assert_close(end[name], start[name], rtol=0, atol=1e-7)
    assert read_header(path).provenance.checks == []


def test_pretraining_from_weights_of_another_graph(folder, dataset, tmp_path):
    config = pretraining_config(
        dataset, tmp_path / "more", weights="other", objectives=MASKS
    )
    with pytest.raises(InputError, match="other learned on another graph"):
        pretrain(config)


@pytest.mark.parametrize("name", shipped() or [None])
def test_what_the_package_brings(name):
    if name is None:
        pytest.fail("the package has no weights")
    path = shipped()[name]
    header = read_header(path)
    assert header.kind == "encoder"
    assert (
        header.provenance.licence == "CC-BY-4.0" or "AND" in header.provenance.licence
    )
    assert header.provenance.corpus
    assert path.stat().st_size < MOST
    card = path.with_suffix(".md").read_text("utf-8")
    plain = write_card(path).replace(path.name, name)
    plain = plain.replace("weights.safetensors", name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert card == f"{plain}\nSHA-256: `{digest}`\n"
    load_encoder(name)
    formulas = header.provenance.formulas
    if header.provenance.taught_by:  # nobody knows what its teacher has seen
        assert formulas is None
        return
    # Pretrained on 88,903 unlabelled crystals; `taught` starts from these weights.
    assert formulas is not None
    assert len(formulas) >= 61_209
    assert f"carries the {len(formulas):,} formulas" in card
    first = read_header("label-free").provenance.formulas
    assert first | formulas == formulas


def test_they_fit_into_the_wheel():
    sizes = [path.stat().st_size for path in module.FOLDER.glob("*")]
    assert 0 < sum(sizes) < IN_THE_WHEEL


def test_finetune_by_name(folder, dataset, tmp_path):
    config = FinetuneConfig(**settings(dataset, tmp_path / "tuned", weights="good"))
    finetune(config)
    assert results(tmp_path / "tuned")["test"] > 0
