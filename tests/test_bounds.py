"""Weights carry their corpus's formulas: what each step says of other datasets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crysdistill.cli import main
from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.overlap import CrystalList
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.formulas import Formulas
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.studies.collect import report_study
from crysdistill.studies.study import StudyConfig, study
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.fit import FitConfig, fit
from crysdistill.training.overlap import overlap_line
from crysdistill.training.pretrain import pretrain
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.card import write_card
from crysdistill.transfer.same_store import Judges
from crysdistill.transfer.seen import at_most, seen
from crysdistill.transfer.weights import (
    Provenance,
    WeightsHeader,
    load_encoder,
    read_header,
    save_weights,
)
from tests.test_cli import refusal
from tests.test_seen import SHORT, labels
from tests.toy_runs import pretraining_config, results
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled, write_store
from tests.toy_studies import BASE

ENCODER = {**SMALL_ENCODER, "bias": False, "normalize": True}
MASKS = {"node_features": {"weight": 1.0}}


def strange(crystals: list[Crystal]) -> list[Crystal]:
    """The same crystals, each with one element replaced by a unique one."""
    found = []
    for z, one in enumerate(crystals, 60):
        numbers = one.atomic_numbers
        changed = np.where(numbers == numbers.max(), z, numbers).astype(np.uint8)
        found.append(replace(one, atomic_numbers=changed))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus; a dataset that shares 4 of 24 formulas with it; and a foreign one."""
    folder = tmp_path_factory.mktemp("bounds")
    write_store(folder / "corpus.h5", [replace(c, properties={}) for c in labelled(40)])
    strangers = strange(labelled(24, first=100))
    shared = [replace(c, material_id=f"copy-{c.material_id}") for c in labelled(4)]
    write_store(folder / "some.h5", [*shared, *strangers[4:]])
    write_store(folder / "none.h5", strangers)
    return folder


@pytest.fixture(scope="module")
def weights(folder) -> Path:
    config = pretraining_config(
        folder / "corpus.h5", folder / "p", objectives=MASKS, trainer=SHORT
    )
    return pretrain(config)


SOME = (
    "at most 4 of 24 crystals, 17 %, can be in the corpus: their compositions occur "
    "there"
)
NONE = (
    "clean (by formula: no crystal of the dataset has the composition of a crystal in "
    "the corpus)"
)


def formulas(path: Path) -> Formulas | None:
    return read_header(path).provenance.formulas


def of(path: Path) -> Formulas:
    return Formulas.of(Store.open(path))


def test_weights_carry_the_formulas_of_what_they_used(folder, weights):
    """Formulas of training crystals, and of held-out ones, which choose the epoch."""
    assert formulas(weights) == of(folder / "corpus.h5")
    config = pretraining_config(
        folder / "corpus.h5", folder / "part", objectives=MASKS, trainer=SHORT, subset=9
    )
    part = formulas(pretrain(config))
    assert 0 < len(part) < len(formulas(weights))
    assert part | formulas(weights) == formulas(weights)


@pytest.mark.parametrize("run", [finetune, distill])
def test_the_bound_goes_into_results_and_weights(
    run, folder, weights, tmp_path, capsys
):
    kind, given = (
        (FinetuneConfig, {"weights": weights})
        if run is finetune
        else (DistillConfig, {"teacher": str(weights), "encoder": ENCODER})
    )
    made = run(kind(**labels(folder, tmp_path / "s", "some.h5"), **given))
    found = results(tmp_path / "s")
    assert found["overlap"] == f"unknown ({SOME})"
    numbers = found["overlap_at_most"]
    assert (numbers["crystals"], numbers["of_crystals"]) == (4, 24)
    tested = pd.read_csv(tmp_path / "s" / "predictions.csv")["material_id"]
    copies = sum(name.startswith("copy-") for name in tested)
    assert (numbers["test_crystals"], numbers["of_test_crystals"]) == (copies, 6)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"overlap: unknown ({SOME}); of the 6 test crystals at most {copies}" in (
        printed
    )
    # The new weights add this dataset's formulas, but not those of its test set.
    assert read_header(made).provenance.overlap == "unknown"
    grown = formulas(made)
    assert len(formulas(weights)) < len(grown)
    assert len(grown) < len(formulas(weights) | of(folder / "some.h5"))
    card = write_card(made)
    assert f"- overlap with its own dataset: unknown ({SOME})\n" in card

    made = run(kind(**labels(folder, tmp_path / "n", "none.h5"), **given))
    found = results(tmp_path / "n")
    assert found["overlap"] == NONE
    assert found["overlap_at_most"]["test_crystals"] == 0
    assert read_header(made).provenance.overlap == "clean"


def test_a_bound_does_not_qualify_what_is_known():
    """It is of pretraining; here the run itself learned from test crystals."""
    numbers = {"crystals": 4, "of_crystals": 9, "test_crystals": 2}
    known = {"overlap_at_most": {**numbers, "of_test_crystals": 3}}
    said = "transductive (1 of 3 test crystals are also in the training set)"
    assert overlap_line({"overlap": said, **known}) == f"overlap: {said}"
    assert overlap_line({"overlap": "unknown (at most 4)", **known}) == (
        "overlap: unknown (at most 4); of the 3 test crystals at most 2"
    )


def test_fit_says_it_too(folder, weights, tmp_path):
    given = labels(folder, tmp_path / "fit", "some.h5")
    del given["head"]
    made = fit(FitConfig(**given, weights=[weights]))
    found = results(tmp_path / "fit")
    assert found["overlap"] == f"unknown ({SOME})"
    assert found["overlap_at_most"]["crystals"] == 4
    assert len(formulas(made)) > len(formulas(weights))


def test_a_study_and_its_report_say_it(folder, weights, tmp_path):
    split = {"train": 12, "val": 6, "test": 6}
    given = StudyConfig(
        base={"dataset": folder / "some.h5", **BASE, "split": split},
        weights=weights,
        out=tmp_path / "study",
        axes={"arm": ["scratch", "finetuned"], "seed": [0, 1]},
        controls=["mean"],
        workers=1,
    )
    study(given, progress=False)
    facts = json.loads((given.out / "study.json").read_text())
    assert facts["overlap"] == f"unknown ({SOME})"
    page = report_study(given.out).read_text("utf-8")
    assert SOME.removeprefix("at") in page


def test_labels_alone_are_all_that_a_network_from_scratch_knows(folder, tmp_path):
    given = labels(folder, tmp_path / "t", "none.h5")
    made = train(TrainConfig(**given, encoder=ENCODER))
    known = formulas(made)
    assert 0 < len(known) < len(of(folder / "none.h5"))
    taught = distill(
        DistillConfig(**{**given, "out": tmp_path / "r"}, encoder=ENCODER,
                      teacher="random", teacher_encoder=ENCODER)
    )  # fmt: skip
    assert formulas(taught) == known
    other = CrystalList(labelled(3))
    text = "no crystal of the dataset has the composition of a crystal among those that"
    assert text in seen(read_header(made), other)[1]


def test_further_pretraining_joins(folder, weights, tmp_path):
    config = pretraining_config(
        folder / "none.h5", tmp_path / "more", objectives=MASKS, trainer=SHORT,
        weights=weights,
    )  # fmt: skip
    assert formulas(pretrain(config)) == formulas(weights) | of(folder / "none.h5")


def old(weights: Path, path: Path) -> Path:
    """The same weights without formulas, as an earlier version wrote them."""
    header = read_header(weights)
    provenance = replace(header.provenance, formulas=None)
    return save_weights(path, load_encoder(weights), header.graph, provenance)


def test_weights_without_formulas_still_serve(folder, weights, tmp_path, capsys):
    path = old(weights, tmp_path / "old.safetensors")
    assert formulas(path) is None
    made = finetune(
        FinetuneConfig(**labels(folder, tmp_path / "s", "some.h5"), weights=path)
    )
    found = results(tmp_path / "s")
    assert found["overlap"].startswith("unknown (nobody has compared the corpus with")
    assert "overlap_at_most" not in found
    # If one source has no formulas, the result has none.
    assert formulas(made) is None
    config = pretraining_config(
        folder / "none.h5", tmp_path / "more", objectives=MASKS, trainer=SHORT,
        weights=path,
    )  # fmt: skip
    assert formulas(pretrain(config)) is None
    assert "overlap with others" not in write_card(path)
    capsys.readouterr()
    assert refusal(capsys, "overlap", str(path), str(folder / "some.h5")) == (
        f"{path} carries no formulas of its corpus (earlier versions wrote none, and "
        "nobody knows those of a foreign teacher); compare with the corpus itself"
    )


def test_a_comparison_of_structures_comes_first(folder):
    dataset = Store.open(folder / "some.h5")

    def known(kept: int) -> WeightsHeader:
        check = DatasetCheck(
            "some.h5", dataset.structures_hash, "0" * 64, ("id",), 24, 4, 4, kept
        )
        made = Provenance(checks=[check], formulas=of(folder / "corpus.h5"))
        return WeightsHeader("encoder", {}, SMALL_GRAPH, made, "")

    assert seen(known(0), dataset)[1].startswith("clean of some.h5 (4 corpus")
    assert seen(known(4), dataset)[0] == "transductive"
    assert at_most(known(0), dataset, Judges(np.arange(3))) == {}


def test_the_verb_takes_weights_for_their_corpus(folder, weights, tmp_path, capsys):
    table = tmp_path / "can-be.csv"
    argv = ["overlap", str(weights), str(folder / "some.h5"), "--no-progress"]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{weights}: by formula alone, {SOME}\n"
    assert main([*argv, "-o", str(table)]) == 0
    assert f"crystals that can be in it: {table}\n" in capsys.readouterr().out
    found = pd.read_csv(table)
    assert list(found.columns) == ["dataset_id", "formula"]
    assert sorted(found["dataset_id"]) == sorted(
        f"copy-{c.material_id}" for c in labelled(4)
    )
    store = Store.open(folder / "some.h5")
    for name, formula in found.itertuples(index=False):
        row = store.material_ids.index(name)
        reduced = store.crystal(row).to_pymatgen().composition.reduced_formula
        assert formula == reduced
    # A source works like a store.
    source = folder / "none.h5-source" / "s.jsonl"
    assert main(["overlap", str(weights), str(source), "--no-progress"]) == 0
    assert capsys.readouterr().out == (
        f"{weights}: by formula alone, none of 24 crystals has the composition of a "
        "crystal in the corpus\n"
    )


def test_the_verb_repeats_what_a_search_found(folder, tmp_path, capsys):
    config = pretraining_config(
        folder / "corpus.h5", tmp_path / "p", objectives=MASKS, trainer=SHORT,
        exclude=[folder / "some.h5"],
    )  # fmt: skip
    path = pretrain(config)
    capsys.readouterr()
    assert main(["overlap", str(path), str(folder / "some.h5"), "--no-progress"]) == 0
    # Polymorphs remain, since random crystals often share a formula.
    assert capsys.readouterr().out == (
        f"{path}: structures were compared: clean of some.h5 (4 corpus crystals left "
        "out)\n"
        f"{path}: by formula alone, {SOME}\n"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["{dataset}", "{weights}", "-o", "x.csv"],
            "{weights} holds weights, which stand for a corpus; name them before the "
            "dataset",
        ),
        (
            ["{weights}", "{dataset}", "--kinds", "id"],
            "`--kinds` needs the corpus itself; weights know only its formulas",
        ),
        (
            ["{weights}", "{dataset}", "--pairs-per-entry", "3"],
            "`--pairs-per-entry` needs the corpus itself; weights know only its "
            "formulas",
        ),
        (
            ["{dataset}", "{dataset}"],
            "`-o` is missing; name the table of pairs: `-o pairs.csv`",
        ),
        (
            ["{weights}", "{dataset}", "-o", "no/where.csv"],
            "no: no such folder; create it first",
        ),
        (["absent.safetensors", "{dataset}"], "absent.safetensors: no such file"),
    ],
)
def test_what_the_verb_refuses(words, text, folder, weights, capsys):
    names = {"weights": weights, "dataset": folder / "some.h5"}
    argv = [word.format(**names) for word in words]
    assert refusal(capsys, "overlap", *argv).startswith(text.format(**names))


def test_damaged_formulas_give_one_line(weights, tmp_path):
    path = tmp_path / "w.safetensors"
    with safe_open(weights, framework="pt") as file:
        facts = json.loads(file.metadata()["crysdistill"])
    facts["formulas"] = facts["formulas"][:-12]
    save_file(load_file(weights), path, {"crysdistill": json.dumps(facts)})
    for read in (read_header, load_encoder):
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path}: `provenance`: the formulas of its corpus are damaged; copy or "
            "write the file again"
        )


def test_they_come_back_and_leave_the_network_alone(weights, tmp_path):
    plain = old(weights, tmp_path / "old.safetensors")
    again = tmp_path / "new.safetensors"
    header = read_header(weights)
    save_weights(again, load_encoder(weights), header.graph, header.provenance)
    assert again.read_bytes() == weights.read_bytes()
    assert read_header(again) == header
    # The tensors are at the end of a file.
    size = sum(t.numel() * t.element_size() for t in load_file(plain).values())
    assert plain.read_bytes()[-size:] == weights.read_bytes()[-size:]


def test_the_card_says_how_to_ask(weights):
    line = f"it carries the {len(formulas(weights)):,} formulas that it learned from"
    assert line in write_card(weights)


def test_all_formulas_survive_with_an_encoder_of_its_own(tmp_path):
    encoder = make_encoder(**SMALL_ENCODER, cutoff=SMALL_GRAPH.cutoff)
    made = Provenance("c", formulas=Formulas())
    path = save_weights(tmp_path / "w.safetensors", encoder, SMALL_GRAPH, made)
    assert formulas(path) == Formulas()  # an empty set, not None
