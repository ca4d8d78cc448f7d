"""Labels that weights know: what runs, weights and studies say of test crystals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crysdistill.store.store import Store
from crysdistill.studies.collect import report_study
from crysdistill.studies.joining import join_studies, read_study
from crysdistill.studies.study import StudyConfig, study
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.fit import FitConfig, fit
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.settings import AcrossSettings, HeadSettings, SplitSettings
from crysdistill.training.small_tasks import ProbeSettings
from crysdistill.transfer.card import write_card
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import read_header
from tests.test_seen import DENSITY, SHORT
from tests.toy_stores import SMALL_ENCODER, labelled, write_store
from tests.toy_studies import BASE

SPLIT = SplitSettings(train=12, val=6, test=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of 24 crystals, and a store of all but one of them."""
    folder = tmp_path_factory.mktemp("labels")
    crystals = labelled(24)
    write_store(folder / "dataset.h5", crystals)
    write_store(folder / "sub.h5", crystals[:-1])
    return folder


def pretrained(corpus: Path, out: Path, *targets: str, **more) -> Path:
    """Pretrain on properties, or without labels if none is given."""
    given = [
        {"name": name, "task": "classification" if name == "class" else "regression"}
        for name in targets
    ]
    objective = {"properties": {"targets": given}} if given else {"fingerprint": {}}
    return pretrain(
        PretrainConfig(
            corpus=corpus,
            out=out,
            encoder={**SMALL_ENCODER, "bias": False, "normalize": True},
            objectives=objective,
            held_out=0.2,
            trainer=SHORT,
            **more,
        )
    )


def tuning(dataset: Path, out: Path, weights: Path, **more) -> FinetuneConfig:
    given = {"target": DENSITY, "split": SPLIT, **more}
    head = HeadSettings(hidden=8)
    return FinetuneConfig(
        dataset=dataset, out=out, weights=weights, head=head, trainer=SHORT, **given
    )


def said(weights: Path) -> str:
    """The sentence in the results, whose word the weights beside them carry."""
    sentence = json.loads((weights.parent / "results.json").read_text())["overlap"]
    assert read_header(weights).provenance.overlap == sentence.partition(" ")[0]
    return sentence


def test_a_corpus_with_labels_that_holds_test_crystals_is_no_mere_corpus(
    folder, tmp_path
):
    dataset = folder / "dataset.h5"
    kept = {"exclude": [dataset], "exclude_kinds": []}
    weights = pretrained(folder / "sub.h5", tmp_path / "p", "density", **kept)
    text = (
        "unknown (23 of 24 structures of dataset.h5 are also in the corpus, perhaps "
        "with their labels)"
    )
    assert said(weights) == text
    assert f"overlap: {text}\n" in write_card(weights)
    tuned = finetune(tuning(dataset, tmp_path / "f", weights))
    assert said(tuned).startswith(f"{text}; hash of the overlap ")
    # Without labels it is.
    weights = pretrained(folder / "sub.h5", tmp_path / "q", **kept)
    assert said(finetune(tuning(dataset, tmp_path / "g", weights))).startswith(
        "transductive (23 of 24 structures of dataset.h5 are also in the corpus); hash"
    )


def test_labels_of_another_property_are_no_leak(folder, tmp_path):
    dataset = folder / "dataset.h5"
    weights = pretrained(dataset, tmp_path / "p", "class")
    tuned = finetune(tuning(dataset, tmp_path / "f", weights))
    assert said(tuned) == (
        "transductive (the weights or their teachers learned from 6 of the 6 test "
        "crystals, with labels of another property: class)"
    )
    target = Target("class", task="classification")
    again = finetune(tuning(dataset, tmp_path / "g", weights, target=target))
    assert said(again) == (
        "leaked (the weights or their teachers learned from the labels of 6 of the 6 "
        "test crystals)"
    )


def test_crystals_without_labels_do_not_leak(tmp_path):
    """Half of the crystals have no density, but all have a class to learn."""
    crystals = labelled(24)
    for crystal in crystals[::2]:
        crystal.properties["density"] = np.nan
    dataset = write_store(tmp_path / "dataset.h5", crystals)
    weights = pretrained(dataset, tmp_path / "p", "density", "class")
    used = {one.target: one for one in read_header(weights).provenance.used}
    rows = np.arange(24)
    assert used["density"].has(rows).tolist() == [False, True] * 12
    assert used["class"].has(rows).all()


@pytest.mark.parametrize("verb", ["finetune", "fit"])
def test_the_word_in_the_weights_is_about_the_store_that_judges(verb, folder, tmp_path):
    judges = write_store(tmp_path / "judges.h5", labelled(16, first=50))
    weights = pretrained(judges, tmp_path / "p", "density")
    more = {
        "split": SplitSettings(train=16, val=8, test=0),
        "test": AcrossSettings(dataset=judges),
    }
    config = tuning(folder / "dataset.h5", tmp_path / "run", weights, **more)
    if verb == "finetune":
        made = finetune(config)
    else:
        made = fit(
            FitConfig(
                dataset=config.dataset, out=config.out, weights=[weights],
                target=DENSITY, head=config.head, trainer=SHORT, **more,
            )
        )  # fmt: skip
    assert said(made) == (
        "leaked (the weights or their teachers learned from the labels of 16 of the 16 "
        "test crystals)"
    )


def test_kept_crystals_leak_beside_what_the_weights_know(folder, tmp_path):
    judges = folder / "sub.h5"
    weights = pretrained(judges, tmp_path / "p", "class")
    test = AcrossSettings(dataset=judges, keep_shared=True)
    made = finetune(tuning(folder / "dataset.h5", tmp_path / "f", weights, test=test))
    shared = json.loads((made.parent / "results.json").read_text())["test_set"][
        "shared"
    ]
    assert said(made) == (
        f"leaked (the training or validation set holds {shared} of the 23 test "
        "crystals with their labels); before this run: transductive (the weights or "
        "their teachers learned from 23 of the 23 test crystals, with labels of "
        "another property: class)"
    )


def test_without_test_crystals_rows_say_nothing(folder, tmp_path, capsys):
    weights = pretrained(folder / "dataset.h5", tmp_path / "p", "density")
    split = replace(SPLIT, test=0)
    config = tuning(folder / "dataset.h5", tmp_path / "f", weights, split=split)
    assert said(finetune(config)) == (
        "unknown (at most 24 of 24 crystals, 100 %, can be in the corpus: their "
        "compositions occur there)"
    )
    assert "of the 0 test crystals" not in " ".join(capsys.readouterr().out.split())


def test_crystals_of_probes_are_known_by_their_labels(folder, tmp_path):
    dataset = folder / "dataset.h5"
    probe = ProbeSettings(dataset=dataset, target=Target("density"), split=SPLIT)
    corpus = write_store(tmp_path / "corpus.h5", labelled(30, first=100))
    weights = pretrained(corpus, tmp_path / "p", exclude=[dataset], probes=[probe])
    corpus_used, probed = read_header(weights).provenance.used
    store = Store.open(dataset)
    assert (probed.store, probed.target) == (store.structures_hash, "density")
    assert probed.has(np.arange(24)).sum() == 18  # the test crystals are not looked at
    assert (corpus_used.labels, probed.labels, probed.corpus) == (False, True, False)
    # The same split tests on other crystals, and another split on these.
    tuned = finetune(tuning(dataset, tmp_path / "f", weights))
    assert said(tuned).startswith("clean of dataset.h5 (0 corpus crystals left out);")
    split = replace(SPLIT, seed=1)
    tuned = finetune(tuning(dataset, tmp_path / "g", weights, split=split))
    assert said(tuned).startswith("leaked (the weights or their teachers learned from")


def test_a_study_says_what_its_runs_say(folder, tmp_path):
    """Before the first run its test crystals are not known, nor are other teachers."""
    dataset = folder / "dataset.h5"
    weights = pretrained(dataset, tmp_path / "p", "density")
    teacher = pretrained(dataset, tmp_path / "t")
    given = StudyConfig(
        base={
            "dataset": dataset,
            **BASE,
            "split": {"train": 12, "val": 6, "test": 6},
        },
        weights=weights,
        out=tmp_path / "study",
        axes={
            "arm": {
                "scratch": None,
                "taught": {"like": "distilled", "teacher": str(teacher)},
                "finetuned": None,
            },
            "seed": [0, 1],
        },
        controls=False,
        workers=1,
    )
    study(given)
    facts = json.loads((given.out / "study.json").read_text())
    assert facts["overlap"].startswith("unknown (at most 24 of 24 crystals")
    leaked, seen = facts["overlap_of_runs"]
    common = {"task": "density", "runs": 2}
    assert leaked == {
        **common, "weights": str(weights), "arms": ["finetuned"], "status": "leaked",
        "said": "leaked (the weights or their teachers learned from the labels of 6 of "
        "the 6 test crystals)",
    }  # fmt: skip
    assert seen == {
        **common, "weights": str(teacher), "arms": ["taught"],
        "status": "transductive", "said": "transductive (the corpus holds 6 of the 6 "
        "test crystals, without their labels)",
    }  # fmt: skip
    assert facts["not_fair"][-2:] == [
        f"perhaps not fair, density: `{row['arms'][0]}`; after 2 runs, overlap "
        f"{row['said']}"
        for row in (leaked, seen)
    ]
    page = report_study(given.out).read_text("utf-8")
    assert '<h2>Overlap of corpus and test <span class="badge leaked">' in page
    assert "without their labels)" in page
    # A study that finished earlier has only the sentence from before.
    new = read_study(given.out)
    known = {k: v for k, v in new.facts.items() if k != "overlap_of_runs"}
    both = join_studies({"new": new, "old": new._replace(facts=known)})
    rows = both.facts["overlap_of_runs"]
    assert [(row["study"], row["status"]) for row in rows] == [
        ("new", "leaked"), ("new", "transductive"), ("old", "unknown"),
    ]  # fmt: skip
    assert join_studies({"a": new, "b": new}).facts == new.facts
