"""`configs/freeze.yaml`: every number of frozen layers, and a final sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from crysdistill.cli import main
from crysdistill.studies.collect import report_study
from tests.toy_stores import SMALL_ENCODER, labelled, write_store
from tests.toy_studies import pretrained, results

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "freeze.yaml"


@pytest.mark.slow
def test_the_freezing_study(tmp_path, capsys):
    dataset = write_store(tmp_path / "d.h5", labelled(40))
    weights = pretrained(tmp_path / "w.safetensors")
    out = tmp_path / "study"
    encoder = [f"base.encoder.{name}={value}" for name, value in SMALL_ENCODER.items()]
    argv = [
        "study", str(CONFIG), f"base.dataset={dataset}", "base.target.name=density",
        f"weights={weights}", f"out={out}", "base.head.hidden=8", "workers=1",
        "base.split={train: 20, val: 8, test: 8}", "base.trainer.epochs=4",
        "base.trainer.batch_size=8", "base.trainer.accelerator=cpu", *encoder,
        "axes.labels=[12]", "axes.seed=[0, 1]", "controls=[mean]",
        "axes.freeze.convolutions=[null, 0, all]",
    ]  # fmt: skip
    assert main(argv) == 0
    shown = capsys.readouterr().out
    table = pd.read_csv(out / "results.csv", keep_default_na=False)
    count = table.groupby("arm").size().to_dict()
    # None frozen, the embedding, and all layers with two policies.
    assert count == {"scratch": 2, "finetuned": 8, "gradual": 2, "layerwise": 2,
                     "mean": 2}  # fmt: skip
    tuned = table[table["arm"] == "finetuned"]
    assert set(tuned["freeze.convolutions"]) == {"null", "0", "all"}
    assert set(tuned["freeze.batch_norm"]) == {"frozen", "adaptive"}
    assert set(table.loc[table["arm"] != "finetuned", "freeze.convolutions"]) == {""}
    sentence = " ".join(shown.split())
    assert "has the best mean" in sentence
    assert "frozen" in sentence
    assert "The worst choice, " in sentence
    assert "costs" in sentence
    for row in tuned.itertuples():
        found = results(out / row.run)
        blocks = ["embedding", "convolution 1", "convolution 2"]
        assert list(found["drift"]) == list(found["cka"]) == blocks
    page = report_study(out).read_text("utf-8")
    assert "Which layers to freeze" in page
    facts = json.loads((out / "study.json").read_text("utf-8"))
    assert "layerwise" in facts["arms"]
