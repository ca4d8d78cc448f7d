"""Licences pass from a source to the store, the weights and their readers."""

from __future__ import annotations

import json

import pytest

from crysdistill.cli import main
from crysdistill.corpus.build import build
from crysdistill.corpus.inspection import inspect
from crysdistill.errors import InputError
from crysdistill.store.origins import (
    Origin,
    is_non_commercial,
    joint_licence,
    licence_remark,
)
from crysdistill.store.store import Store
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.settings import TrainerSettings
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import read_header
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled, write_lines

QUIET = {"graph": SMALL_GRAPH, "symmetry": None, "workers": 1, "progress": False}


@pytest.mark.parametrize(
    ("licence", "answer"),
    [
        ("CC-BY-4.0", False),
        ("CC-BY-NC-4.0", True),
        ("CC-BY-4.0 AND CC-BY-NC-SA-4.0", True),
        ("PolyForm-Noncommercial-1.0.0", True),
        ("NCSA", False),  # of the University of Illinois, and free
        ("", False),
    ],
)
def test_what_forbids_commercial_use(licence, answer):
    assert is_non_commercial(licence) is answer


def test_all_licences_bind():
    assert joint_licence(["CC-BY-4.0", "", "CC-BY-4.0"]) == "CC-BY-4.0"
    both = joint_licence(["MIT", "CC-BY-NC-4.0 AND CC-BY-4.0"])
    assert both == "CC-BY-4.0 AND CC-BY-NC-4.0 AND MIT"
    assert joint_licence([]) == ""
    assert licence_remark("") == "not known"
    assert licence_remark("MIT") == "MIT"
    assert licence_remark("CC-BY-NC-4.0") == "CC-BY-NC-4.0 (not for commercial use)"


def test_a_licence_that_is_no_identifier(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", labelled(2))
    message = "`licence` is 'CC BY 4.0' but must be an SPDX identifier; did you mean"
    with pytest.raises(InputError, match=message):
        build([source], tmp_path / "s.h5", licence="CC BY 4.0", **QUIET)


def test_a_store_keeps_the_origins_of_all_it_was_made_from(tmp_path):
    """Also those of sources behind another store."""
    crystals = labelled(6)
    first = write_lines(tmp_path / "a" / "ours.jsonl", crystals[:3])
    second = write_lines(tmp_path / "b" / "theirs.jsonl", crystals[3:])
    inner = build([second], tmp_path / "inner.h5", licence="CC-BY-NC-4.0", **QUIET)
    outer = build([first, inner.store], tmp_path / "o.h5", licence="MIT", **QUIET)
    store = Store.open(outer.store)
    assert store.origins == [
        Origin("ours.jsonl", licence="MIT"),
        Origin("theirs.jsonl", licence="CC-BY-NC-4.0"),
    ]
    assert store.licence == "CC-BY-NC-4.0 AND MIT"
    found = inspect(outer.store)
    assert found.facts["licence"] == "CC-BY-NC-4.0 AND MIT (not for commercial use)"
    origins = next(s for s in found.sections if s.title == "Origins")
    assert [row[:2] for row in origins.rows] == [
        ("ours.jsonl", "MIT"),
        ("theirs.jsonl", "CC-BY-NC-4.0"),
    ]


def test_a_non_commercial_corpus_marks_all_weights_made_from_it(tmp_path, capsys):
    corpus = write_lines(tmp_path / "c" / "gnome.jsonl", labelled(24))
    dataset = write_lines(tmp_path / "d" / "own.jsonl", labelled(12, first=30))
    line = f"build {corpus} -o {tmp_path / 'c.h5'} --licence CC-BY-NC-4.0 --workers 1"
    options = "--cutoff 7 --max-neighbors 6 --no-symmetry --no-progress"
    assert main(f"{line} {options}".split()) == 0
    build([dataset], tmp_path / "d.h5", licence="CC-BY-4.0", **QUIET)
    trainer = TrainerSettings(epochs=1, batch_size=8, progress=False)
    weights = pretrain(
        PretrainConfig(
            corpus=tmp_path / "c.h5",
            out=tmp_path / "pretrain",
            encoder=SMALL_ENCODER,
            objectives={"node_features": {"weight": 1.0}},
            trainer=trainer,
        )
    )
    shown = capsys.readouterr().out
    assert "licence of the weights: CC-BY-NC-4.0 (not for commercial use)" in shown
    assert read_header(weights).provenance.licence == "CC-BY-NC-4.0"
    results = json.loads((tmp_path / "pretrain" / "results.json").read_text("utf-8"))
    assert results["licence"] == "CC-BY-NC-4.0"
    tuned = finetune(
        FinetuneConfig(
            dataset=tmp_path / "d.h5",
            target=Target("density", "1"),
            weights=weights,
            out=tmp_path / "finetune",
            trainer=trainer,
        )
    )
    assert read_header(tuned).provenance.licence == "CC-BY-4.0 AND CC-BY-NC-4.0"
