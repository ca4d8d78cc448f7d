"""Predictions and embeddings: from any source, complete, in order."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from crysdistill.cli import main
from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, make_batch
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.training import inference
from crysdistill.training.inference import embed, predict
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import save_weights
from tests.toy_stores import (
    SMALL_ENCODER,
    SMALL_GRAPH,
    labelled,
    simple_cif,
    write_lines,
    write_store,
)

QUIET = {"progress": False, "workers": 1}
CRYSTALS = labelled(9)


def make_predictor(target: Target, normalizer: Normalizer) -> Predictor:
    torch.manual_seed(0)
    settings = {**SMALL_ENCODER, "cutoff": SMALL_GRAPH.cutoff}
    encoder = make_encoder(**settings)
    head = PropertyHead(encoder.width, 8, outputs=normalizer.outputs)
    outputs = Outputs([target], [normalizer])
    predictor = Predictor(encoder, head, outputs, SMALL_GRAPH).eval()
    for module in predictor.modules():  # give batch norms running statistics
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
    return predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    made = make_predictor(Target("gap", "eV"), Normalizer(2.0, 0.5))
    save_weights(folder / "gap.safetensors", made)
    return made


@pytest.fixture(scope="module")
def weights(folder, predictor) -> Path:
    return folder / "gap.safetensors"


@pytest.fixture(scope="module")
def encoder_weights(folder, predictor) -> Path:
    return save_weights(folder / "encoder.safetensors", predictor.encoder, SMALL_GRAPH)


def expected(predictor: Predictor, crystals: list[Crystal]) -> dict[str, float]:
    values = predictor.predict(make_batch(crystals, SMALL_GRAPH)).tolist()
    return dict(zip((c.material_id for c in crystals), values, strict=True))


def told(path: Path, column: str = "gap") -> dict[str, float]:
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert all(set(row) == {"material_id", column} for row in table)
    return {row["material_id"]: float(row[column]) for row in table}


def write_cifs(folder: Path, crystals: list[Crystal]) -> Path:
    folder.mkdir(parents=True)
    for crystal in crystals:
        text = simple_cif(crystal.material_id, crystal)
        (folder / f"{crystal.material_id}.cif").write_text(text)
    return folder


def check(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert list(found) == list(wanted)
    values = np.array(list(found.values()))
    assert np.allclose(values, list(wanted.values()), rtol=0, atol=2e-5)
    assert np.ptp(values) > 1e-3  # otherwise the test proves nothing


class TestPredict:
    def test_cif_files_in_the_order_given(self, weights, predictor, tmp_path):
        cifs = write_cifs(tmp_path / "cifs", CRYSTALS)
        chosen = [CRYSTALS[n] for n in (7, 2, 5)]
        files = [cifs / f"{c.material_id}.cif" for c in chosen]
        out = predict(weights, files, tmp_path / "out.csv", **QUIET)
        check(told(out), expected(predictor, chosen))

    def test_a_folder(self, weights, predictor, tmp_path):
        cifs = write_cifs(tmp_path / "cifs", CRYSTALS)
        out = predict(weights, [cifs], tmp_path / "out.csv", **QUIET)
        check(told(out), expected(predictor, CRYSTALS))
        assert {p.name for p in tmp_path.iterdir()} == {"cifs", "out.csv"}

    def test_lines(self, weights, predictor, tmp_path):
        plain = [replace(c, properties={}) for c in CRYSTALS[::-1]]
        source = write_lines(tmp_path / "s.jsonl", plain)
        out = predict(weights, [source], tmp_path / "out.csv", **QUIET)
        check(told(out), expected(predictor, plain))

    def test_a_store(self, weights, predictor, tmp_path, monkeypatch):
        """A store with the graph of the weights is read without a build."""
        store = write_store(tmp_path / "s.h5", CRYSTALS)
        monkeypatch.setattr(inference, "build", None)
        out = predict(weights, [store], tmp_path / "out.csv", batch_size=4, **QUIET)
        check(told(out), expected(predictor, CRYSTALS))

    def test_a_store_with_another_graph(self, weights, predictor, tmp_path):
        other = GraphSettings(cutoff=6.5, max_neighbors=3, mode="cgcnn")
        store = write_store(tmp_path / "s.h5", CRYSTALS, graph=other)
        before = store.read_bytes()
        out = predict(weights, [store], tmp_path / "out.csv", **QUIET)
        check(told(out), expected(predictor, CRYSTALS))
        assert store.read_bytes() == before

    def test_several_sources(self, weights, predictor, tmp_path):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:4])
        cifs = write_cifs(tmp_path / "cifs", CRYSTALS[4:])
        out = predict(weights, [store, cifs], tmp_path / "out.csv", **QUIET)
        check(told(out), expected(predictor, CRYSTALS))

    def test_the_batch_size_changes_nothing(self, weights, tmp_path):
        store = write_store(tmp_path / "s.h5", CRYSTALS)
        found = [
            told(predict(weights, [store], tmp_path / "o.csv", batch_size=n, **QUIET))
            for n in (1, 4, 256)
        ]
        for other in found[1:]:
            assert list(other) == list(found[0])
            values = [np.array(list(f.values())) for f in (found[0], other)]
            assert np.allclose(*values, rtol=0, atol=1e-5)

    def test_what_cannot_be_read_is_listed_beside_the_result(
        self, weights, predictor, tmp_path, capsys
    ):
        cifs = write_cifs(tmp_path / "cifs", CRYSTALS)
        (cifs / "broken.cif").write_text("data_x\nloop_\n")
        (cifs / "empty.cif").write_text("")
        out = tmp_path / "out.csv"
        line = f"predict {weights} {cifs} -o {out} --workers 1 --no-progress"
        assert main(line.split()) == 0
        check(told(out), expected(predictor, CRYSTALS))
        with (tmp_path / "out.csv.quarantine.csv").open(newline="") as file:
            listed = list(csv.DictReader(file))
        assert [row["material_id"] for row in listed] == ["broken", "empty"]
        assert "empty file" in listed[1]["reason"]
        said = capsys.readouterr()
        assert "2 refused" in said.out + said.err

    def test_an_old_quarantine_table_does_not_stay(self, weights, tmp_path):
        cifs = write_cifs(tmp_path / "cifs", CRYSTALS[:2])
        (cifs / "empty.cif").write_text("")
        predict(weights, [cifs], tmp_path / "out.csv", **QUIET)
        assert (tmp_path / "out.csv.quarantine.csv").exists()
        (cifs / "empty.cif").unlink()
        predict(weights, [cifs], tmp_path / "out.csv", **QUIET)
        assert not (tmp_path / "out.csv.quarantine.csv").exists()

    def test_labels_are_neither_needed_nor_read(self, weights, predictor, tmp_path):
        cifs = write_cifs(tmp_path / "cifs", CRYSTALS)
        labels = [
            "random-0,hello",
            "random-1,",
            "absent,3.0",
            "random-2,1",
            "random-2,2",
        ]
        (cifs / "id_prop.csv").write_text("\n".join(labels))
        out = predict(weights, [cifs], tmp_path / "out.csv", **QUIET)
        check(told(out), expected(predictor, CRYSTALS))
        assert not (tmp_path / "out.csv.quarantine.csv").exists()

    def test_nothing_readable(self, weights, tmp_path):
        (tmp_path / "cifs").mkdir()
        (tmp_path / "cifs" / "empty.cif").write_text("")
        out = tmp_path / "out.csv"
        message = "none of 1 entries became a crystal; .*out.csv.quarantine.csv says"
        with pytest.raises(InputError, match=message):
            predict(weights, [tmp_path / "cifs"], out, **QUIET)
        assert not out.exists()

    def test_odd_names(self, weights, tmp_path):
        names = ["a,b", 'say "x"', "日本", "0012", "1e5", "NaN"]
        crystals = [
            replace(c, material_id=n, properties={})
            for n, c in zip(names, CRYSTALS, strict=False)
        ]
        source = write_lines(tmp_path / "s.jsonl", crystals)
        out = predict(weights, [source], tmp_path / "out.csv", **QUIET)
        assert list(told(out)) == names

    def test_a_classifier_gives_probabilities(self, folder, tmp_path):
        target = Target("metal", task="classification")
        classifier = make_predictor(target, Normalizer(classes=2))
        weights = save_weights(folder / "metal.safetensors", classifier)
        store = write_store(tmp_path / "s.h5", CRYSTALS)
        out = predict(weights, [store], tmp_path / "out.csv", **QUIET)
        found = told(out, "metal")
        logits = classifier(make_batch(CRYSTALS, SMALL_GRAPH)).detach()
        share = 1 / (1 + (logits[:, 0] - logits[:, 1]).exp())
        assert np.allclose(list(found.values()), share, atol=2e-5)
        assert all(0 < p < 1 for p in found.values())

    def test_a_logarithmic_target_is_given_in_its_unit(self, folder, tmp_path):
        target = Target("modulus", "GPa", transform="log10")
        made = make_predictor(target, Normalizer(2.0, 0.1))
        weights = save_weights(folder / "modulus.safetensors", made)
        store = write_store(tmp_path / "s.h5", CRYSTALS)
        out = predict(weights, [store], tmp_path / "out.csv", **QUIET)
        raw = made(make_batch(CRYSTALS, SMALL_GRAPH)).detach().numpy()[:, 0]
        values = np.array(list(told(out, "modulus").values()))
        assert np.allclose(values, 10 ** (raw * 0.1 + 2.0), rtol=1e-4)


class TestSeveralTargets:
    @pytest.fixture
    def several(self, folder) -> tuple[Predictor, Path]:
        targets = [
            Target("gap", "eV"),
            Target("metal", task="classification"),
            Target("system", task="classification"),
        ]
        scales = [Normalizer(2.0, 0.5), Normalizer(classes=2), Normalizer(classes=3)]
        torch.manual_seed(1)
        encoder = make_encoder(**SMALL_ENCODER, cutoff=SMALL_GRAPH.cutoff)
        head = PropertyHead(encoder.width, 8, outputs=6)
        predictor = Predictor(encoder, head, Outputs(targets, scales), SMALL_GRAPH)
        path = save_weights(folder / "several.safetensors", predictor.eval())
        return predictor, path

    def test_each_has_its_columns(self, several, tmp_path):
        predictor, weights = several
        store = write_store(tmp_path / "s.h5", CRYSTALS)
        out = predict(weights, [store], tmp_path / "out.csv", batch_size=4, **QUIET)
        table = pd.read_csv(out, index_col="material_id")
        classes = ["system", "system_0", "system_1", "system_2"]
        assert list(table) == ["gap", "metal", *classes]
        raw = predictor(make_batch(CRYSTALS, SMALL_GRAPH)).detach().double()  # (B, 6)
        share = raw[:, 3:].softmax(1).numpy()
        assert np.allclose(table["gap"], raw[:, 0] * 0.5 + 2.0, atol=2e-5)
        assert np.allclose(table["metal"], raw[:, 1:3].softmax(1)[:, 1], atol=2e-5)
        assert np.allclose(table[classes[1:]], share, atol=2e-5)
        assert (table["system"] == share.argmax(1)).all()

    def test_a_unit_stands_behind_a_name_that_has_one(self, several, tmp_path):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:2])
        line = f"predict {several[1]} {store} -o {tmp_path / 'o.csv'} --units"
        assert main([*line.split(), "--no-progress"]) == 0
        header = (tmp_path / "o.csv").read_text().splitlines()[0]
        assert header == "material_id,gap (eV),metal,system,system_0,system_1,system_2"


class TestRefusals:
    @pytest.mark.parametrize("work", [predict, embed])
    def test_where_to_compute(self, weights, tmp_path, work, monkeypatch):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:2])
        out = tmp_path / "out.csv"
        with pytest.raises(InputError, match=r"`accelerator` is 'gpuu' .* mean `gpu`"):
            work(weights, [store], out, accelerator="gpuu", **QUIET)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(
            InputError, match="`accelerator` is gpu but there is no GPU"
        ):
            work(weights, [store], out, accelerator="gpu", **QUIET)
        assert work(weights, [store], out, accelerator="cpu", **QUIET) == out

    @pytest.mark.parametrize("work", [predict, embed])
    def test_an_unwritable_result_before_any_work(
        self, weights, tmp_path, monkeypatch, work
    ):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:2])
        monkeypatch.setattr(inference, "load_predictor", None)
        monkeypatch.setattr(inference, "load_encoder", None)
        with pytest.raises(
            InputError, match="nowhere: no such folder; create it first"
        ):
            work(weights, [store], tmp_path / "nowhere" / "out.csv", **QUIET)
        (tmp_path / "folder").mkdir()
        with pytest.raises(
            InputError, match="folder: a folder; give the name of a file in it"
        ):
            work(weights, [store], tmp_path / "folder", **QUIET)

    def test_an_encoder_cannot_predict(self, encoder_weights, tmp_path, capsys):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:2])
        out = tmp_path / "out.csv"
        with pytest.raises(InputError, match=r"without a head.*crysdistill finetune"):
            predict(encoder_weights, [store], out, **QUIET)
        assert main(["predict", str(encoder_weights), str(store), "-o", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not out.exists()

    def test_a_batch_size_of_zero(self, weights, tmp_path):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:2])
        with pytest.raises(
            InputError, match="`batch_size` is 0 but must be at least 1"
        ):
            predict(weights, [store], tmp_path / "out.csv", batch_size=0, **QUIET)

    def test_no_such_source(self, weights, tmp_path):
        for name in ("nowhere", "nowhere.h5", "nowhere.cif"):
            with pytest.raises(InputError, match="no such"):
                predict(weights, [tmp_path / name], tmp_path / "out.csv", **QUIET)


class TestEmbed:
    def wanted(self, predictor: Predictor) -> np.ndarray:
        batch = make_batch(CRYSTALS, SMALL_GRAPH)
        return predictor.embed(batch).crystals.detach().numpy()

    @pytest.mark.parametrize("kind", ["gap", "encoder"])
    def test_parquet(self, predictor, encoder_weights, folder, tmp_path, kind):
        cifs = write_cifs(tmp_path / "cifs", CRYSTALS)
        source = folder / f"{kind}.safetensors"
        out = embed(source, [cifs], tmp_path / "out.parquet", **QUIET)
        table = pd.read_parquet(out)
        assert list(table) == ["material_id", *(f"e{n}" for n in range(8))]
        assert list(table["material_id"]) == [c.material_id for c in CRYSTALS]
        values = table.drop(columns="material_id").to_numpy()
        assert values.dtype == np.float32
        assert np.allclose(values, self.wanted(predictor), atol=2e-5)

    def test_csv(self, predictor, weights, tmp_path):
        store = write_store(tmp_path / "s.h5", CRYSTALS)
        out = embed(weights, [store], tmp_path / "out.csv", batch_size=2, **QUIET)
        table = pd.read_csv(out, index_col="material_id")
        assert table.shape == (9, 8)
        assert np.allclose(table.to_numpy(), self.wanted(predictor), atol=2e-5)

    def test_nothing_readable(self, weights, tmp_path):
        (tmp_path / "cifs").mkdir()
        (tmp_path / "cifs" / "empty.cif").write_text("")
        out = tmp_path / "out.parquet"
        with pytest.raises(InputError, match="none of 1 entries became a crystal"):
            embed(weights, [tmp_path / "cifs"], out, **QUIET)
        assert not out.exists()
        assert (tmp_path / "out.parquet.quarantine.csv").exists()

    def test_the_command(self, encoder_weights, tmp_path, capsys):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:3])
        out = tmp_path / "out.parquet"
        line = f"embed {encoder_weights} {store} -o {out} --no-progress"
        assert main(line.split()) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert len(pd.read_parquet(out)) == 3

    def test_the_command_for_atoms(self, encoder_weights, tmp_path):
        store = write_store(tmp_path / "s.h5", CRYSTALS[:3])
        out = tmp_path / "out.parquet"
        line = f"embed {encoder_weights} {store} -o {out} --no-progress --level atoms"
        assert main([*line.split(), "--accelerator", "cpu"]) == 0
        atoms = [len(c.atomic_numbers) for c in CRYSTALS[:3]]
        assert [len(x) for x in pd.read_parquet(out)["atoms"]] == [8 * n for n in atoms]


def test_a_store_stays_open_to_others(weights, tmp_path):
    store = write_store(tmp_path / "s.h5", CRYSTALS)
    opened = Store.open(store)
    predict(weights, [store], tmp_path / "out.csv", **QUIET)
    opened.verify()
