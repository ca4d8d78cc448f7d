"""Distances of test crystals from training crystals, and maps of embeddings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.studies.collect import report_study
from crysdistill.studies.distances import _fractions, corpus_distances, nearest
from crysdistill.studies.embedding_maps import embedding_maps
from crysdistill.studies.run_files import judged_predictions
from crysdistill.studies.sections.embeddings import maps
from crysdistill.studies.statistics import check_results
from crysdistill.studies.study import StudyConfig, study
from crysdistill.studies.tables import result_groups
from crysdistill.training.pretrain import pretrain
from crysdistill.transfer.weights import load_encoder
from tests.toy_runs import pretraining_config
from tests.toy_stores import labelled, open_store, write_store
from tests.toy_studies import BASE


def of(name: str, numbers: list[int]) -> Crystal:
    """Return a crystal of the given atoms, in a row."""
    places = [[(i + 0.5) / len(numbers), 0.1 * i, 0.0] for i in range(len(numbers))]
    made = labelled(1)[0]
    cell = np.diag([3.0 * len(numbers), 4.0, 4.0])
    return replace(
        made, material_id=name, atomic_numbers=np.array(numbers), cell=cell,
        frac_coords=np.array(places), properties={"density": 1.0},
    )  # fmt: skip


class TestNearest:
    def test_share_of_atoms_to_exchange(self, tmp_path):
        names = {"MgO": [12, 8], "Mg2O": [12, 12, 8], "Fe": [26], "MgO2": [12, 8, 8]}
        store = open_store(tmp_path / "s.h5", [of(n, z) for n, z in names.items()])
        at = {name: row for row, name in enumerate(store.material_ids)}
        known = _fractions(store)

        def far(asked: str, *others: str) -> float:
            columns = known[:, [at[name] for name in others]]
            return nearest(known[:, [at[asked]]], columns)[0]

        assert far("MgO", "MgO") == 0
        assert far("MgO", "Mg2O") == pytest.approx(1 / 6)
        assert far("Mg2O", "MgO2") == pytest.approx(1 / 3)
        assert far("MgO", "Fe") == 1
        assert far("Mg2O", "Fe", "MgO2", "MgO") == pytest.approx(1 / 6)

    def test_agrees_with_all_pairs(self, tmp_path):
        store = open_store(tmp_path / "s.h5", labelled(40))
        known = _fractions(store)
        dense = known.toarray()
        a, b = dense[:, :15], dense[:, 15:]
        shared = np.minimum(a[:, :, None], b[:, None, :]).sum(axis=0)
        found = nearest(known[:, :15], known[:, 15:])
        assert found == pytest.approx(1 - shared.max(axis=1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, weights that left out some of its crystals, and a study with them."""
    folder = tmp_path_factory.mktemp("made")
    crystals = labelled(48)
    corpus = write_store(folder / "corpus.h5", labelled(12, first=100) + crystals[:8])
    dataset = write_store(folder / "d.h5", crystals)
    given = {"dataset": dataset, **BASE, "split": {"train": 20, "val": 8, "test": 12}}
    del given["encoder"]
    more = {"exclude": [dataset], "objectives": {"node_features": {}}}
    weights = pretrain(pretraining_config(corpus, folder / "pretrain", **more))
    config = StudyConfig(
        base=given, weights=weights, out=folder / "study", workers=1, controls=False,
        axes={"arm": ["scratch", "finetuned"], "labels": [20], "seed": [0, 1]},
    )  # fmt: skip
    results = study(config, progress=False)
    runs = [str(config.out / run) for run in results["run"]]
    return config.out, weights, check_results(results.assign(run=runs))


def test_distance_to_what_pretraining_kept_of_its_corpus(made):
    _, weights, table = made
    predictions = judged_predictions(table)
    values, absent = corpus_distances(table, predictions)
    assert absent == []
    corpus = Store.open(weights.parents[1] / "corpus.h5")
    own = Store.open(weights.parents[1] / "d.h5")
    record = json.loads((weights.parent / "excluded.json").read_text())["found"]
    left_out = {row for row, _ in record["rows"]}
    assert len(left_out) >= 8
    rows = [row for row in range(len(corpus)) if row not in left_out]
    far = nearest(_fractions(own), _fractions(corpus)[:, rows])
    right = dict(zip(own.material_ids, far, strict=True))
    assert values.tolist() == predictions["material_id"].map(right).tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"corpus": "gone.h5"}, "the corpus of {weights} is not on this machine"),
        ({"corpus": "other"}, "the corpus of {weights} is not on this machine"),
        ({"subset": 10}, "{run} learned from a part of its corpus"),
        (
            {"weights": "first.safetensors"},
            "{run} began with weights that have a corpus of their own",
        ),
        (None, "{run} does not say which crystals it left out of its corpus"),
    ],
)
def test_why_there_is_no_distance_to_the_corpus(made, change, reason):
    _, weights, table = made
    path, record = weights.parent / "config.yaml", weights.parent / "excluded.json"
    before = path.read_text(), record.read_text()
    if change and change.get("corpus") == "other":
        change = {"corpus": str(weights.parents[1] / "d.h5")}
    try:
        if change is None:
            record.unlink()
        path.write_text(yaml.safe_dump({**yaml.safe_load(before[0]), **(change or {})}))
        values, absent = corpus_distances(table, judged_predictions(table))
    finally:
        path.write_text(before[0])
        record.write_text(before[1])
    said = reason.format(weights=weights, run=weights.parent)
    assert absent == [f"Errors by distance to the corpus are not shown: {said}."]
    assert values.isna().all()


def test_maps_before_and_after_fine_tuning(made):
    _, weights, table = made
    points, absent = embedding_maps(table)
    assert absent == []
    assert set(points["arm"]) == {"finetuned"}
    run = Path(table.loc[table["arm"] == "finetuned", "run"].iloc[0])
    store = Store.open(weights.parents[1] / "d.h5")
    split = pd.read_csv(run / "split.csv")
    tested = set(split.loc[split["subset"] == "test", "material_id"])
    rows = [row for row, name in enumerate(store.material_ids) if name in tested]
    for stage, path in (
        ("pretrained", weights),
        ("fine-tuned", run / "weights.safetensors"),
    ):
        mine = points[points["stage"] == stage]
        with torch.no_grad():
            x = load_encoder(path)(store.batch(np.array(rows))).crystals.double()
        shares = torch.linalg.svdvals(x - x.mean(dim=0)).square()
        assert mine["explained_x"].iloc[0] == pytest.approx(
            float(shares[0] / shares.sum()), rel=1e-4
        )
        assert mine["value"].tolist() == store.property("density")[rows].tolist()
        assert np.corrcoef(mine["x"], mine["value"])[0, 1] >= 0
    section = maps(points, result_groups(table))
    assert [picture.name for picture in section.pictures] == [
        "embeddings-density-pretrained", "embeddings-density-fine-tuned",
    ]  # fmt: skip
    assert section.exhibits[0].shown["Crystals"].tolist() == ["12", "12"]


def test_no_maps_without_weights(made):
    _, _, table = made
    points, absent = embedding_maps(table[table["arm"] == "scratch"])
    assert points.empty
    assert absent == [
        "Embeddings are not drawn: no fine-tuned network has its weights beside its "
        "results."
    ]
    assert maps(points, []) is None


def test_the_page_has_them(made):
    folder, _, _ = made
    text = report_study(folder).read_text("utf-8")
    assert "Embeddings in two dimensions" in text
    assert "by distance to the nearest crystal of the corpus" in text
    assert "No arm predicts an uncertainty" in text
    listed = pd.read_csv(folder / "report" / "contents.csv")
    assert {"embeddings.csv", "corpus-distance-density.csv"} <= set(listed.iloc[:, 0])
