"""From overlap to report, every step states which crystals of a dataset were seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from crysdistill.corpus.build import build
from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.store import Store
from crysdistill.studies.collect import report_study
from crysdistill.studies.study import StudyConfig, study
from crysdistill.training import cleaning
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.settings import HeadSettings, SplitSettings, TrainerSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.seen import seen
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import (
    Provenance,
    WeightsHeader,
    read_header,
    save_weights,
)
from tests.test_resume import stopped
from tests.toy_stores import (
    SMALL_ENCODER,
    SMALL_GRAPH,
    known_by_hash,
    labelled,
    write_lines,
    write_store,
)
from tests.toy_studies import BASE

SHORT = TrainerSettings(epochs=1, batch_size=8, accelerator="cpu", progress=False)
DENSITY = Target("density", "1/Å³")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus of 40 crystals, a dataset that shares 4 with it, and another."""
    folder = tmp_path_factory.mktemp("seen")
    write_store(folder / "corpus.h5", [replace(c, properties={}) for c in labelled(40)])
    shared = [replace(c, material_id=f"copy-{c.material_id}") for c in labelled(4)]
    write_store(folder / "judge.h5", [*shared, *labelled(20, first=100)])
    # Cells of one atom are too alike to be told apart.
    other = [c for c in labelled(32, first=200) if len(c.atomic_numbers) > 1]
    write_store(folder / "other.h5", other)
    return folder


def pretrain_config(
    folder: Path, out: Path, corpus: str = "corpus.h5", **more
) -> PretrainConfig:
    return PretrainConfig(
        corpus=folder / corpus,
        out=out,
        encoder={**SMALL_ENCODER, "bias": False, "normalize": True},
        objectives={"fingerprint": {"weight": 1.0}},
        held_out=0.2,
        trainer=SHORT,
        **more,
    )


def pretraining(folder: Path, out: Path, corpus: str = "corpus.h5", **more) -> Path:
    return pretrain(pretrain_config(folder, out, corpus, **more))


def labels(folder: Path, out: Path, dataset: str = "judge.h5") -> dict:
    return {
        "dataset": folder / dataset,
        "target": DENSITY,
        "out": out,
        "head": HeadSettings(hidden=8),
        "split": SplitSettings(train=12, val=6, test=6),
        "trainer": SHORT,
    }


def said(weights: Path) -> tuple[str, str]:
    """The word in the weights, and the sentence in the results beside them."""
    results = json.loads((weights.parent / "results.json").read_text())
    return read_header(weights).provenance.overlap, results["overlap"]


def test_a_resumed_run_leaves_out_the_same_without_a_search(
    folder, tmp_path, monkeypatch
):
    exclude = [folder / "judge.h5"]
    whole = pretraining(folder, tmp_path / "whole", exclude=exclude)
    config = pretrain_config(folder, tmp_path / "cut", exclude=exclude)
    stopped(monkeypatch, pretrain, config, 2)

    def search(*_, **__):
        pytest.fail("a resumed run has searched")

    monkeypatch.setattr(cleaning, "find_exclusion", search)
    again = pretrain(replace(config, resume=True))
    assert said(again) == said(whole)
    found = [read_header(weights).provenance for weights in (again, whole)]
    assert found[0].checks == found[1].checks


def test_clean_all_the_way_to_the_report(folder, tmp_path):
    weights = pretraining(folder, tmp_path / "p", exclude=[folder / "judge.h5"])
    judge = Store.open(folder / "judge.h5")
    before = read_header(weights).provenance
    assert said(weights) == ("clean", "clean of judge.h5 (4 corpus crystals left out)")
    assert before.excluded == [judge.structures_hash]
    [check] = before.checks
    assert (check.shared, check.kept, len(check.overlap)) == (4, 0, 64)
    expected = (
        "clean of judge.h5 (4 corpus crystals left out); "
        f"hash of the overlap {check.overlap[:12]}"
    )
    for number, run in enumerate((finetune, distill)):
        out = tmp_path / str(number)
        if run is finetune:
            config = FinetuneConfig(**labels(folder, out), weights=weights)
        else:
            config = DistillConfig(
                **labels(folder, out), encoder=SMALL_ENCODER, teacher=str(weights)
            )
        predictor = run(config)
        assert said(predictor) == ("clean", expected)
        # The checks come from the corpus and stay with the weights.
        assert read_header(predictor).provenance.checks == [check]
        assert read_header(predictor).provenance.corpus == before.corpus
    split = {"train": 12, "val": 6, "test": 6}
    base = {"dataset": folder / "judge.h5", **BASE, "split": split}
    given = StudyConfig(
        base=base,
        weights=weights,
        out=tmp_path / "study",
        axes={"arm": ["scratch", "finetuned"], "seed": [0, 1]},
        controls=["mean"],
        workers=1,
    )
    study(given, progress=False)
    assert json.loads((given.out / "study.json").read_text())["overlap"] == expected
    page = report_study(given.out).read_text("utf-8")
    assert f"overlap {check.overlap[:12]}" in page


def test_a_corpus_built_clean_says_so_in_the_same_words(folder, tmp_path):
    source = [replace(c, properties={}) for c in labelled(40)]
    lines = write_lines(tmp_path / "lines" / "s.jsonl", source)
    built = tmp_path / "clean.h5"
    build(
        [lines], built, graph=SMALL_GRAPH, symmetry=None, workers=1, progress=False,
        exclude=[folder / "judge.h5"],
    )  # fmt: skip
    first = pretraining(tmp_path, tmp_path / "a", "clean.h5")
    excluded = [folder / "judge.h5", folder / "other.h5"]
    second = pretraining(tmp_path, tmp_path / "b", "clean.h5", exclude=excluded)
    third = pretraining(folder, tmp_path / "c", exclude=[folder / "judge.h5"])
    checks = [read_header(weights).provenance.checks for weights in (first, third)]
    assert checks[0] == checks[1]
    assert said(first) == said(third)
    # Excluding more keeps the record of what the build left out.
    assert said(second) == (
        "clean",
        "clean of judge.h5, other.h5 (4 corpus crystals left out)",
    )
    predictor = finetune(
        FinetuneConfig(**labels(folder, tmp_path / "d"), weights=first)
    )
    assert said(predictor)[0] == "clean"


def test_what_is_kept_is_transductive_everywhere(folder, tmp_path):
    weights = pretraining(
        folder, tmp_path / "p", exclude=[folder / "judge.h5"], exclude_kinds=[]
    )
    text = "transductive (4 of 24 structures of judge.h5 are also in the corpus)"
    assert said(weights) == ("transductive", text)
    assert read_header(weights).provenance.excluded == []
    predictor = finetune(
        FinetuneConfig(**labels(folder, tmp_path / "f"), weights=weights)
    )
    word, sentence = said(predictor)
    assert word == "transductive"
    assert sentence.startswith(text + "; hash of the overlap ")


def test_what_nobody_compared_is_unknown(folder, tmp_path):
    weights = pretraining(folder, tmp_path / "p", exclude=[folder / "judge.h5"])
    other = finetune(
        FinetuneConfig(**labels(folder, tmp_path / "f", "other.h5"), weights=weights)
    )
    word, sentence = said(other)
    assert word == "unknown"
    assert sentence.endswith("can be in the corpus: their compositions occur there)")
    # These weights have learned from labels, so a clean corpus is not enough.
    again = finetune(FinetuneConfig(**labels(folder, tmp_path / "g"), weights=other))
    word, sentence = said(again)
    assert word == "unknown"
    assert "can be among those that the weights learned from: their" in sentence
    plain = pretraining(folder, tmp_path / "q")
    assert said(plain) == ("unknown", "unknown (compared with no dataset)")


def test_from_scratch_nothing_was_seen(folder, tmp_path):
    scratch = TrainConfig(**labels(folder, tmp_path / "t"), encoder=SMALL_ENCODER)
    random = DistillConfig(
        **labels(folder, tmp_path / "r"), encoder=SMALL_ENCODER, teacher="random",
        teacher_encoder=SMALL_ENCODER,
    )  # fmt: skip
    for weights in (train(scratch), distill(random)):
        assert said(weights) == (
            "clean",
            "clean (no pretraining: nothing was seen but labels)",
        )


def test_unknown_kinds_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="unknown kind `structur`; did you mean"):
        PretrainConfig(corpus=tmp_path, exclude_kinds=["structur"])


def check(kept: int) -> DatasetCheck:
    return DatasetCheck("d.h5", "abc", "0" * 64, ("id", "structure"), 9, 5, 3, kept)


def header(kind: str, *checks: DatasetCheck) -> WeightsHeader:
    provenance = Provenance(checks=list(checks))
    return WeightsHeader(kind, {}, SMALL_GRAPH, provenance, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "word"),
    [
        (None, "clean"),
        (header("encoder"), "unknown"),
        (header("encoder", check(0)), "clean"),
        (header("encoder", check(2)), "transductive"),
        (header("predictor"), "unknown"),
        (header("predictor", check(0)), "unknown"),
        (header("predictor", check(2)), "unknown"),  # perhaps with their labels
    ],
)
def test_the_word_and_its_sentence(before, word):
    found, sentence = seen(before, known_by_hash("abc"))
    assert found == word
    assert sentence.startswith(word)


def test_checks_survive_the_weights_file(tmp_path):
    encoder = make_encoder(**SMALL_ENCODER, cutoff=SMALL_GRAPH.cutoff)
    provenance = Provenance("corpus", "transductive", checks=[check(2), check(0)])
    path = save_weights(tmp_path / "w.safetensors", encoder, SMALL_GRAPH, provenance)
    assert read_header(path).provenance == provenance
    assert read_header(path).provenance.checks[0].kinds == ("id", "structure")
