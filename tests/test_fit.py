"""`crysdistill fit`: candidates, the choice, and the files it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from crysdistill.encoders import ENCODERS, make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.store import Store
from crysdistill.store.used import UNKNOWN
from crysdistill.training import candidates as module
from crysdistill.training.fit import _named, fit
from crysdistill.training.inference import predict
from crysdistill.training.probe import Probed, advice, probe
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.stack import Stack
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import (
    Provenance,
    load_encoder,
    load_predictor,
    read_header,
    save_weights,
)
from tests.toy_runs import fit_config
from tests.toy_stores import labelled, write_store

GRAPH = GraphSettings(6.0, 8)
DENSITY = Target("density", "1/Å³")
SMALL = ENCODERS["cgcnn"].SMALL


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("fit") / "d.h5", labelled(60), GRAPH)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("known") / "known.safetensors"
    return save_weights(path, make_encoder("cgcnn", GRAPH, **SMALL), GRAPH)


def test_validation_chooses_and_the_test_set_judges(store, weights, tmp_path, capsys):
    path = fit(fit_config(store, tmp_path / "fit", weights=[weights], repeats=2))
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "fit" / "candidates.csv")
    means = [name for name in table["candidate"] if "%" in name]
    assert len(means) < 2
    assert set(table["candidate"]) - set(means) == {
        "scratch",
        "fine-tuned",
        "composition",
        "frozen",
    }
    assert table["score"].is_monotonic_increasing
    results = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert results["chosen"] == table["candidate"][0]
    assert results["val"] == pytest.approx(table["density"][0])
    assert f"chosen: {results['chosen']}" in said
    assert "`fine-tuned` starts from known; `frozen` is known" in said
    assert "scratch-1  a network's own run, with its numbers" in said
    # The file holds the judged predictions.
    judged = pd.read_csv(tmp_path / "fit" / "predictions.csv").set_index("material_id")
    error = (judged["truth"] - judged["prediction"]).abs().mean()
    assert results["test"] == pytest.approx(error, rel=1e-5)
    opened = Store.open(store)
    known = dict(zip(opened.material_ids, opened.property("density"), strict=True))
    split = pd.read_csv(tmp_path / "fit" / "split.csv").set_index("subset")
    middle = np.quantile([known[i] for i in split.loc["train", "material_id"]], 0.5,
                         method="lower")  # fmt: skip
    guess = (judged["truth"] - middle).abs().mean()
    assert results["constant"] == pytest.approx(guess, rel=1e-5)
    assert "always the median of the training labels: MAE" in said
    out = predict(path, [store], tmp_path / "all.csv", progress=False)
    again = pd.read_csv(out).set_index("material_id").loc[judged.index]
    np.testing.assert_allclose(again["density"], judged["prediction"], rtol=1e-4)
    assert set(split.loc["test", "material_id"]) == set(judged.index)
    for kind in ("scratch", "finetuned"):
        for seed in (0, 1):
            assert (tmp_path / "fit" / f"{kind}-{seed}" / "results.json").exists()


def test_every_candidate_is_what_its_name_says(store, weights, tmp_path, monkeypatch):
    seen = {}
    real = module.Workshop._judged

    def watch(self, name, predictor, sources):
        seen[name] = predictor
        return real(self, name, predictor, sources)

    monkeypatch.setattr(module.Workshop, "_judged", watch)
    shares = {"fine-tuned": 0.6, "frozen": 0.4}
    monkeypatch.setattr(module, "choose_shares", lambda *_: shares)
    fit(fit_config(store, tmp_path / "fit", weights=[weights], repeats=2))
    assert isinstance(seen["frozen"], FrozenPredictor)
    assert seen["composition"].encoder is None
    assert isinstance(seen["scratch"], Stack)
    both = seen["60% fine-tuned + 40% frozen"]
    np.testing.assert_allclose(both.shares, [0.3, 0.3, 0.4], rtol=1e-6)
    assert both.members[2] is seen["frozen"]
    assert list(both.members[:2]) == list(seen["fine-tuned"].members)


def prefer_together(monkeypatch):
    """Make the probe prefer all weights side by side."""
    real = module.probe

    def prefer(*given, **more):
        found = real(*given, **more)
        assert {one.name for one in found} > {"composition", "untrained"}
        assert "all together" in [one.name for one in found]
        return sorted(found, key=lambda one: one.name != "all together")

    monkeypatch.setattr(module, "probe", prefer)


def prefer(monkeypatch, chosen):
    """Let a candidate win."""
    real = module.Workshop._judged

    def judged(self, name, predictor, sources):
        found = real(self, name, predictor, sources)
        return replace(found, score=0.0) if name == chosen else found

    monkeypatch.setattr(module.Workshop, "_judged", judged)


def test_several_weights_are_also_frozen_side_by_side(
    store, weights, tmp_path, monkeypatch
):
    torch.manual_seed(1)
    second = tmp_path / "second.safetensors"
    save_weights(second, make_encoder("cgcnn", GRAPH, **SMALL), GRAPH)
    prefer_together(monkeypatch)
    prefer(monkeypatch, "frozen")
    path = fit(fit_config(store, tmp_path / "fit", weights=[weights, second]))
    predictor = load_predictor(path)
    assert isinstance(predictor, FrozenPredictor)
    known, other = predictor.encoder.encoders
    for part, file in ((known, weights), (other, second)):
        theirs = load_encoder(file).state_dict()
        for key, tensor in part.state_dict().items():
            torch.testing.assert_close(tensor, theirs[key], atol=0, rtol=0)
    results = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert results["chosen"] == "frozen"
    assert results["probe"]["all together"] >= 0
    # The network starts from one of the weights.
    started = (tmp_path / "fit" / "finetuned-0" / "config.yaml").read_text()
    assert "known.safetensors" in started or "second.safetensors" in started
    judged_ = pd.read_csv(tmp_path / "fit" / "predictions.csv").set_index("material_id")
    again = pd.read_csv(predict(path, [store], tmp_path / "all.csv", progress=False))
    again = again.set_index("material_id").loc[judged_.index]
    np.testing.assert_allclose(again["density"], judged_["prediction"], rtol=1e-4)
    assert (judged_["sd"] > 0).all()  # a Gaussian process knows how sure it is


def test_what_any_of_the_weights_has_seen_counts(store, weights, tmp_path, monkeypatch):
    prefer_together(monkeypatch)
    prefer(monkeypatch, "frozen")
    torch.manual_seed(1)
    second = tmp_path / "second.safetensors"
    hash_ = Store.open(store).structures_hash
    kinds = ("id", "structure")
    clean = DatasetCheck("d.h5", hash_, "0" * 64, kinds, 60, 0, 0, 0)
    encoder = make_encoder("cgcnn", GRAPH, **SMALL)
    save_weights(second, encoder, GRAPH, Provenance(checks=[clean]))
    first = tmp_path / "first.safetensors"
    save_weights(first, encoder, GRAPH, Provenance(checks=[clean]))
    for names, word in (((first, second), "clean"), ((second, weights), "unknown")):
        out = tmp_path / word
        fit(fit_config(store, out, weights=list(names)))
        found = json.loads((out / "results.json").read_text())
        assert found["overlap"].startswith(word), names


@pytest.mark.parametrize(
    ("chosen", "word"),
    [("scratch", "clean (no pretraining"), ("composition", "clean (no pretraining"),
     ("fine-tuned", "unknown"), ("frozen", "unknown")],
)  # fmt: skip
def test_only_what_the_chosen_one_was_made_from_counts(
    store, weights, tmp_path, monkeypatch, chosen, word
):
    prefer(monkeypatch, chosen)
    path = fit(fit_config(store, tmp_path / "fit", weights=[weights]))
    found = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert found["chosen"] == chosen
    assert found["overlap"].startswith(word)
    used = read_header(path).provenance.used
    assert (UNKNOWN in used) == (word == "unknown")


def test_without_weights(store, tmp_path, capsys):
    fit(fit_config(store, tmp_path / "fit"))
    assert "no pretrained weights were given" in " ".join(
        capsys.readouterr().out.split()
    )
    table = pd.read_csv(tmp_path / "fit" / "candidates.csv")
    alone = {name for name in table["candidate"] if "%" not in name}
    assert alone == {"scratch", "composition"}
    header = read_header(tmp_path / "fit" / "weights.safetensors")
    assert header.target == DENSITY
    results = json.loads((tmp_path / "fit" / "results.json").read_text())
    assert results["overlap"].startswith("clean (no pretraining")


def test_goes_on_where_it_was(store, weights, tmp_path, monkeypatch):
    whole = fit_config(store, tmp_path / "whole", weights=[weights])
    fit(whole)

    def stop(*_, **__):
        raise KeyboardInterrupt

    cut = fit_config(store, tmp_path / "cut", weights=[weights])
    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(cut)
    before = (tmp_path / "cut" / "scratch-0" / "weights.safetensors").stat().st_mtime_ns
    cut.resume = True
    fit(cut)
    after = (tmp_path / "cut" / "scratch-0" / "weights.safetensors").stat().st_mtime_ns
    assert before == after
    for name in ("candidates.csv", "predictions.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()
    with pytest.raises(InputError, match="holds an earlier run"):
        fit(fit_config(store, tmp_path / "cut", weights=[weights]))
    with pytest.raises(InputError, match="was begun with another configuration"):
        fit(fit_config(store, tmp_path / "cut", resume=True))


def test_bad_settings(store, weights, tmp_path):
    with pytest.raises(InputError, match="`repeats` is 0 but must be at least 1"):
        fit_config(store, tmp_path, repeats=0)
    with pytest.raises(InputError, match=r"`weights` names .* twice; leave one out"):
        fit_config(store, tmp_path, weights=[weights, weights])
    with pytest.raises(InputError, match="no such file"):
        fit(
            fit_config(store, tmp_path / "x", weights=[tmp_path / "absent.safetensors"])
        )
    few = replace(fit_config(store, tmp_path / "x").split, train=9)
    text = "`density` has 9 training labels but a readout needs at least 10"
    with pytest.raises(InputError, match=text):
        fit(fit_config(store, tmp_path / "x", split=few))
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").write_text("a file")
    with pytest.raises(InputError, match="x is a file; give another `out`, a folder"):
        fit(fit_config(store, tmp_path / "x"))


def test_advice():
    looked = [Probed("known", 0.5, {}), Probed("composition", 0.8, {})]
    looked.append(Probed("untrained", 1.0, {}))
    assert "error with known is 38% lower than with comp" in advice(looked, "known")
    looked[0] = Probed("known", 0.79, {})
    assert "expect little from fine-tuning" in advice(looked, "known")


def test_probe_is_a_cross_validation(store):
    opened = Store.open(store)
    labels = opened.property("density")
    outputs = Outputs([DENSITY], [Normalizer.fit(DENSITY, labels)])
    told = []
    found = probe(
        opened,
        np.arange(60),
        outputs,
        {"composition": None},
        torch.device("cpu"),
        report=told.append,
    )
    assert found == told
    # A probe that saw the judged labels would predict them almost exactly.
    spread = np.abs(labels - labels.mean()).mean()
    assert 0.2 * spread < found[0].metrics["density"] < 2 * spread


def test_weights_of_equal_names_are_told_apart():
    names = ["a/run/weights.safetensors", "b/run/weights.safetensors"]
    names += ["c/known.safetensors", "untrained.safetensors"]
    found = _named([Path(name) for name in names], [])
    assert found == dict(
        zip([*names[:2], "known", names[3]], map(Path, names), strict=True)
    )
