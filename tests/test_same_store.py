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
from crysdistill.store.store import Store
from crysdistill.store.used import UNKNOWN, Used, join_used, used_rows
from crysdistill.teachers.teacher import Foreign
from crysdistill.transfer.same_store import Judges, seen_in_it, used_by
from crysdistill.transfer.seen import (
    at_most,
    seen,
    with_teachers,
)
from crysdistill.transfer.weights import Provenance, read_header, save_weights
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled, write_store

DATASET = CrystalList(labelled(20))
NAME = DATASET.structures_hash
TESTED = Judges(np.arange(15, 20), ("gap",), ("energy", "class"))
TEACHES = Used.of(DATASET, np.arange(15), labels=True, target="gap", corpus=False)
CORPUS = Used("c", False, TEACHES.rows)


def inputs(*rows: int) -> Used:
    return Used.of(DATASET, np.array(rows), labels=False)


def labels(target: str, *rows: int) -> Used:
    return Used.of(DATASET, np.array(rows), labels=True, target=target)


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
            "clean (by row, none of the 5 test crystals is among those that the "
            "weights and their teachers learned from)",
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
            (inputs(17), UNKNOWN, labels("gap", 15, 16), labels("energy", 17)),
            "leaked (the weights or their teachers learned from the labels of 2 of the "
            "5 test crystals)",
        ),
        (  # beside the target in the store, so it is another property
            (TEACHES, labels("energy", 14, 15), labels("class", 15, 16, 17)),
            "transductive (the weights or their teachers learned from 3 of the 5 test "
            "crystals, with labels of another property: energy, class)",
        ),
        ((labels("energy", 15), replace(CORPUS, labels=True)), None),
        (
            (TEACHES, labels("energy", 2)),
            "clean (by row, none of the 5 test crystals is among those that the "
            "weights and their teachers learned from)",
        ),
        (  # the store has no such property: it may be the target by another name
            (labels("energy", 15), labels("band_gap", 16), inputs(17)),
            "unknown (the weights or their teachers learned from labels of 1 of the 5 "
            "test crystals, perhaps of the same property: band_gap)",
        ),
        (
            (labels("", 16, 17),),
            "unknown (the weights or their teachers learned from labels of 2 of the 5 "
            "test crystals, perhaps of the same property)",
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


def test_no_test_crystals_prove_nothing():
    weights = Foreign(Provenance(used=(TEACHES,)), "predictor")
    assert seen(weights, DATASET, replace(TESTED, rows=np.arange(0)))[0] == "unknown"


def test_rows_are_told_apart_by_the_labels_that_they_have(tmp_path):
    crystals = labelled(6)
    for row, name in ((0, "density"), (1, "class"), (2, "density"), (2, "class")):
        crystals[row].properties[name] = np.nan
    store = Store.open(write_store(tmp_path / "s.h5", crystals))
    found = used_rows(store, np.arange(1, 5), ["density", "class"], corpus=True)
    rows = [np.flatnonzero(one.has(np.arange(6))).tolist() for one in found]
    assert [
        (one.target, one.labels, row) for one, row in zip(found, rows, strict=True)
    ] == [
        ("density", True, [1, 3, 4]),
        ("class", True, [3, 4]),
        ("", False, [2]),
    ]


def test_old_readers_find_a_word_that_they_know(tmp_path):
    """Version 0.1 refuses `leaked`."""
    encoder = make_encoder(**SMALL_ENCODER, cutoff=SMALL_GRAPH.cutoff)
    given = Provenance(overlap="leaked", used=(TEACHES,))
    path = save_weights(tmp_path / "w.safetensors", encoder, SMALL_GRAPH, given)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["crysdistill"])
    assert facts["provenance"]["overlap"] == "unknown"
    assert read_header(path).provenance == given


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


KEPT = "2 of 20 structures of d.h5 are also in the corpus"


@pytest.mark.parametrize(
    ("kind", "more", "labels"),
    [
        ("encoder", {}, False),  # of earlier versions, which learned without labels
        ("encoder", {"used": (CORPUS,)}, False),
        ("encoder", {"used": (CORPUS, TEACHES)}, False),  # not of test crystals
        ("encoder", {"used": (replace(CORPUS, labels=True, target="x"),)}, True),
        ("encoder", {"used": (UNKNOWN, replace(CORPUS, labels=True))}, True),
        ("encoder", {"used": (CORPUS, replace(TEACHES, store="p"))}, False),  # a probe
        ("encoder", {"taught_by": "a stranger"}, True),
        ("foreign", {}, True),
        ("predictor", {}, True),
        ("predictor", {"used": (CORPUS, TEACHES)}, False),
    ],
)
def test_a_corpus_that_holds_test_crystals_may_hold_their_labels(kind, more, labels):
    known = Provenance("c", checks=[check(NAME, kept=2)], **more)
    word, sentence = seen(Foreign(known, kind), DATASET, TESTED)
    start = (
        f"unknown ({KEPT}, perhaps with their" if labels else f"transductive ({KEPT});"
    )
    assert word == start.partition(" ")[0]
    assert sentence.startswith(start)


def test_labels_that_choose_an_epoch_count_in_their_own_store():
    probe = Used("p", True, TEACHES.rows, "gap", corpus=False)
    known = Provenance("c", checks=[check(NAME)], used=(CORPUS, probe))
    assert seen(Foreign(known, "encoder"), DATASET, TESTED)[0] == "clean"
    own = replace(known, used=(CORPUS, TEACHES))
    assert seen(Foreign(own, "encoder"), DATASET, TESTED)[0] == "clean"
    own = replace(known, used=(CORPUS, labels("gap", 15)))
    assert seen(Foreign(own, "encoder"), DATASET, TESTED)[0] == "leaked"


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
