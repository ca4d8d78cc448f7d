"""What weights record of the rows that they learned from, and what that proves."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.overlap import CrystalList
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.formulas import Formulas
from crysdistill.store.used import UNKNOWN, Used, join_used
from crysdistill.teachers.teacher import Foreign
from crysdistill.transfer.same_store import seen_in_it, used_by
from crysdistill.transfer.seen import at_most, seen, with_teachers
from crysdistill.transfer.weights import Provenance, read_header, save_weights
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled

DATASET = CrystalList(labelled(20))
NAME = DATASET.structures_hash
TESTED = np.arange(15, 20)
TEACHES = Used.of(DATASET, np.arange(15), labels=True)
CORPUS = Used("c", False, TEACHES.rows)


def inputs(*rows: int) -> Used:
    return Used.of(DATASET, np.array(rows), labels=False)


def test_rows_survive():
    rows = np.array([0, 3, 19])
    found = Used.of(DATASET, rows, labels=True)
    assert np.flatnonzero(found.has(np.arange(20))).tolist() == [0, 3, 19]
    assert found.has(np.array([19, 2])).tolist() == [True, False]
    assert found.store == NAME
    with pytest.raises(
        InputError,
        match="the rows that the weights learned from are damaged; copy or write the",
    ):
        replace(found, rows="x").has(rows)
    assert join_used([(found,), (UNKNOWN, found), ()]) == (found, UNKNOWN)


def test_they_are_in_the_weights_file_and_missing_in_older_ones(tmp_path):
    encoder = make_encoder(**SMALL_ENCODER, cutoff=SMALL_GRAPH.cutoff)
    given = Provenance(used=(TEACHES, CORPUS))
    path = save_weights(tmp_path / "w.safetensors", encoder, SMALL_GRAPH, given)
    assert read_header(path).provenance == given
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["crysdistill"])
    assert "used" not in facts["provenance"]  # earlier versions read the rest
    del facts["used"]
    save_file(load_file(path), path, {"crysdistill": json.dumps(facts)})
    assert read_header(path).provenance.used == (UNKNOWN,)


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        ((), None),
        ((UNKNOWN,), None),
        (
            (TEACHES,),
            "clean (the weights and their teachers learned from other crystals of the "
            "dataset than the 5 test crystals)",
        ),
        ((TEACHES, CORPUS), None),  # the corpus may hold test crystals
        (
            (TEACHES, inputs(14, 15, 16), inputs(16, 17)),
            "transductive (the corpus holds 3 of the 5 test crystals, without their "
            "labels)",
        ),
        (
            (inputs(17), CORPUS),
            "transductive (the corpus holds 1 of the 5 test crystals, without their "
            "labels)",
        ),
        ((inputs(17), replace(CORPUS, labels=True)), None),  # perhaps their labels
        ((inputs(17), UNKNOWN), None),
        (
            (inputs(17), UNKNOWN, Used.of(DATASET, np.array([15, 16]), labels=True)),
            "leaked (the weights or their teachers learned from the labels of 2 of the "
            "5 test crystals)",
        ),
    ],
)
def test_what_rows_prove(used, expected):
    found = seen_in_it(used, NAME, TESTED)
    assert (found and found[1]) == expected
    if expected is None:
        return
    assert expected.startswith(f"{found[0]} (")
    weights = Foreign(Provenance(used=used, formulas=Formulas()), "predictor")
    assert seen(weights, DATASET, TESTED) == found
    assert at_most(weights, DATASET, TESTED) == {}


def check(dataset: str, kept: int = 0) -> DatasetCheck:
    return DatasetCheck("d.h5", dataset, "0" * 64, ("id",), 20, 5, 5, kept)


def test_weights_of_earlier_versions_used_nothing_that_their_corpus_is_clean_of():
    clean = Provenance("c", checks=[check("a"), check("b"), check("d", kept=1)])
    assert used_by("encoder", clean, ["a", "b"]) == ()
    for kind, provenance, stores in (
        ("predictor", clean, ["a"]),
        ("encoder", clean, ["a", "x"]),
        ("encoder", clean, ["d"]),
        ("encoder", clean, []),
        ("encoder", replace(clean, taught_by="a stranger"), ["a"]),
    ):
        assert used_by(kind, provenance, stores) == (UNKNOWN,)


def test_labels_that_are_recorded_leave_only_the_corpus_to_compare():
    """A predictor on the dataset itself, from an encoder that is clean of it."""
    known = Provenance("c", checks=[check(NAME)], used=(TEACHES, CORPUS))
    assert seen(Foreign(known, "predictor"), DATASET, TESTED)[0] == "clean"
    assert seen(Foreign(known, "predictor"), DATASET)[0] == "unknown"
    unsure = replace(known, used=(TEACHES, CORPUS, UNKNOWN))
    assert seen(Foreign(unsure, "predictor"), DATASET, TESTED)[0] == "unknown"
    # So is its student, unless one of the two corpora was not compared.
    own = Provenance("o", checks=[check(NAME)], used=(replace(CORPUS, store="o"),))
    for theirs, word in ((known, "clean"), (replace(known, checks=[]), "unknown")):
        found = with_teachers(own, [Foreign(theirs, "predictor")])
        assert seen(Foreign(found, "encoder"), DATASET, TESTED)[0] == word
    # A teacher from scratch has no corpus.
    scratch = replace(known, corpus="", checks=[], used=(TEACHES,))
    found = with_teachers(own, [Foreign(scratch, "predictor")])
    assert seen(Foreign(found, "encoder"), DATASET, TESTED)[0] == "clean"
