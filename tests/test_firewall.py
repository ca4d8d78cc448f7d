"""The firewall keeps a dataset's crystals out of a corpus, and tells users."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crysdistill.cli import main
from crysdistill.corpus import firewall
from crysdistill.corpus.build import build
from crysdistill.corpus.filters import Filters
from crysdistill.corpus.inspection import inspect
from crysdistill.errors import InputError
from crysdistill.overlap import find_overlap
from crysdistill.overlap.exclusion import Exclusion, find_exclusion
from crysdistill.overlap.sides import open_side
from crysdistill.store.checks import (
    DatasetCheck,
    find_check,
    join_checks,
    read_checks,
    statement,
    status,
)
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from tests.toy_stores import SMALL_GRAPH, labelled, simple_cif, write_lines, write_store


def bare(crystals: list[Crystal]) -> list[Crystal]:
    return [replace(c, properties={}) for c in crystals]


def renamed(crystals: list[Crystal], by: str) -> list[Crystal]:
    return [replace(c, material_id=f"{by}-{c.material_id}") for c in crystals]


def strained(crystal: Crystal) -> Crystal:
    return replace(crystal, cell=crystal.cell * 1.01)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A source of 30 crystals without labels."""
    return write_lines(tmp_path / "corpus" / "s.jsonl", bare(labelled(30)))


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A store; rows 0 and 1 share ids with the corpus, rows 2 to 4 structures."""
    planted = [
        *labelled(2),
        *(strained(c) for c in renamed(labelled(3, first=2), "copy")),
        *renamed(labelled(4, first=100), "own"),
    ]
    return write_store(tmp_path / "judge.h5", planted)


def make(source: Path, out: Path, **options) -> Store:
    options = {"graph": SMALL_GRAPH, "symmetry": None, "workers": 1, **options}
    return Store.open(build([source], out, progress=False, **options).store)


def quarantine(store: Store) -> dict[str, str]:
    path = store.path.with_name(store.path.name + ".quarantine.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return {row["material_id"]: row["reason"] for row in csv.DictReader(file)}


# ------------------------------------------------------------------------- the build


def test_what_a_dataset_holds_does_not_enter_the_store(corpus, judge, tmp_path):
    store = make(corpus, tmp_path / "clean.h5", exclude=[judge])
    expected = [c.material_id for c in labelled(25, first=5)]
    assert store.material_ids == expected
    assert quarantine(store) == {
        "random-0": "excluded: same id as random-0 of judge.h5",
        "random-1": "excluded: same id as random-1 of judge.h5",
        **{
            f"random-{n}": f"excluded: same structure as copy-random-{n} of judge.h5"
            for n in (2, 3, 4)
        },
    }
    store.verify()
    # The result equals a build without those crystals.
    rest = write_lines(tmp_path / "rest" / "s.jsonl", bare(labelled(25, first=5)))
    assert make(rest, tmp_path / "rest.h5").hash == store.hash
    assert find_overlap(store, Store.open(judge)).statement == "clean"


def test_the_store_says_of_what_it_is_clean(corpus, judge, tmp_path):
    whole = make(corpus, tmp_path / "whole.h5")
    found = find_overlap(whole, Store.open(judge), kinds=("id", "structure"))
    store = make(corpus, tmp_path / "clean.h5", exclude=[judge])
    [check] = read_checks(store.facts)
    assert check == DatasetCheck(
        name="judge.h5",
        dataset=Store.open(judge).structures_hash,
        overlap=found.hash,
        kinds=("id", "structure"),
        structures=9,
        shared=5,
        left_out=5,
        kept=0,
    )
    assert check.statement == "clean of judge.h5 (5 corpus crystals left out)"
    assert read_checks(whole.facts) == []
    assert inspect(store.path).facts["overlap"] == check.statement
    assert "overlap" not in inspect(whole.path).facts


@pytest.mark.parametrize(
    ("kinds", "left", "kept"), [([], 30, 5), (["id"], 28, 3), (["structure"], 27, 2)]
)
def test_what_is_kept_is_counted(corpus, judge, tmp_path, kinds, left, kept):
    store = make(corpus, tmp_path / "c.h5", exclude=[judge], exclude_kinds=kinds)
    [check] = read_checks(store.facts)
    assert (len(store), check.shared, check.kept) == (left, 5, kept)
    assert check.status == "transductive"
    assert check.statement == (
        f"transductive ({kept} of 9 structures of judge.h5 are also in the corpus)"
    )


def test_several_datasets_of_any_kind(corpus, judge, tmp_path):
    folder = tmp_path / "cifs"
    folder.mkdir()
    for crystal in [*labelled(1, first=7), *renamed(labelled(2, first=3), "cif")]:
        text = simple_cif(crystal.material_id, crystal)
        (folder / f"{crystal.material_id}.cif").write_text(text)
    (folder / "broken.cif").write_text("data_broken\n")
    store = make(corpus, tmp_path / "clean.h5", exclude=[judge, folder])
    assert len(store) == 24
    assert quarantine(store)["random-7"] == "excluded: same id as random-7 of cifs"
    # The first dataset with the crystal gives the reason.
    assert quarantine(store)["random-3"].endswith("copy-random-3 of judge.h5")
    first, second = read_checks(store.facts)
    assert (first.left_out, second.left_out) == (5, 3)
    assert statement([first, second]) == (
        "clean of judge.h5, cifs (8 corpus crystals left out)"
    )


def test_duplicates_and_other_refusals_do_not_shift_rows(judge, tmp_path):
    crystals = bare(labelled(30))
    crystals.insert(1, crystals[0])
    crystals.insert(9, crystals[6])
    source = write_lines(tmp_path / "corpus" / "s.jsonl", crystals)
    store = make(
        source, tmp_path / "clean.h5", exclude=[judge], filters=Filters(max_atoms=3)
    )
    # Crystals have 1 to 4 atoms in turn; numbers 3, 7, ... have four.
    kept = [n for n in range(5, 30) if n % 4 != 3]
    assert store.material_ids == [f"random-{n}" for n in kept]
    path = tmp_path / "clean.h5.quarantine.csv"
    with path.open(newline="", encoding="utf-8") as file:
        reasons = [row["reason"].partition(" ")[0] for row in csv.DictReader(file)]
    assert (reasons.count("duplicate"), reasons.count("excluded:")) == (2, 4)


def test_all_may_be_left_out_or_nothing_be_there(corpus, judge, tmp_path):
    everything = make(corpus, tmp_path / "all.h5")
    none = build([corpus], tmp_path / "none.h5", exclude=[everything.path])
    assert (none.built, none.store.exists()) == (0, False)
    broken = tmp_path / "broken" / "s.jsonl"
    broken.parent.mkdir()
    broken.write_text("{}\n")
    assert build([broken], tmp_path / "empty.h5", exclude=[judge]).built == 0


STEPS = ("everything", "search", "found", "store", "quarantine")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_build_ends_with_the_same_bytes(
    corpus, judge, tmp_path, monkeypatch, step, workers
):
    from crysdistill.corpus import build as building
    from crysdistill.overlap import exclusion

    whole = make(corpus, tmp_path / "whole.h5", exclude=[judge])
    out = tmp_path / "stopped.h5"
    places = {
        "everything": (firewall, "merge_shards"),
        "search": (exclusion, "find_exclusion"),
        "found": (firewall, "write_whole"),
        "store": (building, "merge_shards"),
        "quarantine": (building, "_write_quarantine"),
    }

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*places[step], stop)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, out, exclude=[judge])
    assert (tmp_path / "stopped.h5.parts").exists()
    again = make(corpus, out, exclude=[judge], workers=workers)
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert quarantine(again) == quarantine(whole)
    assert not (tmp_path / "stopped.h5.parts").exists()


def test_what_was_found_is_not_looked_for_twice(corpus, judge, tmp_path, monkeypatch):
    from crysdistill.corpus import build as building
    from crysdistill.overlap import exclusion

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "merge_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, tmp_path / "a.h5", exclude=[judge])
    monkeypatch.setattr(exclusion, "find_exclusion", stop)
    assert len(make(corpus, tmp_path / "a.h5", exclude=[judge])) == 25


def test_a_resumed_run_does_not_search_again(corpus, judge, tmp_path, monkeypatch):
    from crysdistill.training import cleaning

    store = make(corpus, tmp_path / "whole.h5")
    run = tmp_path / "run"
    run.mkdir()
    first = cleaning.clean_rows(store, [judge], ["id", "structure"], run=run)
    assert len(first.rows) == 25
    (run / cleaning.EXCLUDED).write_text(json.dumps(first.record))

    def stop(*_, **settings):
        assert "workers" not in settings  # `trainer.threads` is for the training
        raise KeyboardInterrupt

    monkeypatch.setattr(cleaning, "find_exclusion", stop)
    again = cleaning.clean_rows(store, [judge], ["id", "structure"], run=run)
    np.testing.assert_array_equal(again.rows, first.rows)
    assert again.checks == first.checks
    for kinds, folder in ((["id"], run), (["id", "structure"], None)):
        with pytest.raises(KeyboardInterrupt):  # the earlier result does not apply
            cleaning.clean_rows(store, [judge], kinds, run=folder)
    (run / cleaning.EXCLUDED).write_text("{")
    with pytest.raises(KeyboardInterrupt):
        cleaning.clean_rows(store, [judge], ["id", "structure"], run=run)


def test_other_datasets_do_not_go_on_with_a_build(corpus, judge, tmp_path, monkeypatch):
    from crysdistill.corpus import build as building

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "merge_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, tmp_path / "a.h5", exclude=[judge])
    for options in ({}, {"exclude": [judge], "exclude_kinds": ["id"]}):
        with pytest.raises(
            InputError, match="interrupted build of something else: `excl"
        ):
            make(corpus, tmp_path / "a.h5", **options)


def test_what_cannot_be_excluded_is_refused(corpus, judge, tmp_path):
    out = tmp_path / "out.h5"
    with pytest.raises(InputError, match=r"no such file .*; did you mean `judge.h5`"):
        make(corpus, out, exclude=[judge.with_name("juge.h5x")])
    with pytest.raises(InputError, match="unknown kind `structures`; did you mean"):
        make(corpus, out, exclude=[judge], exclude_kinds=["structures"])
    broken = tmp_path / "broken" / "s.jsonl"
    broken.parent.mkdir()
    broken.write_text("{}\n")
    text = r"s.jsonl holds no crystals to exclude; .*1 of 1 entries quarantined"
    with pytest.raises(InputError, match=text):
        make(corpus, out, exclude=[broken])
    assert not out.exists()
    assert not out.with_name("out.h5.parts").exists()


def test_the_command_excludes(corpus, judge, tmp_path, capsys):
    out = tmp_path / "clean.h5"
    argv = ["build", corpus, "-o", out, "--exclude", judge, "--exclude-kinds", "id"]
    more = ["--no-symmetry", "--workers", "1", "--no-progress"]
    assert main([str(word) for word in [*argv, *more]]) == 0
    shown = capsys.readouterr().out
    assert "28 of 30 crystals" in shown
    assert (
        "overlap: transductive (3 of 9 structures of judge.h5 are also in the corpus)"
    ) in shown


# ------------------------------------------------------------------ sides and checks


def test_a_source_and_its_store_are_the_same_dataset(tmp_path):
    crystals = labelled(12)
    twice = bare([*crystals, crystals[0]])
    lines = write_lines(tmp_path / "d" / "s.jsonl", twice)
    side = open_side(lines)
    store = write_store(tmp_path / "d.h5", crystals, symmetry="spglib")
    assert side.crystals.structures_hash == Store.open(store).structures_hash
    assert side.quarantined == [("random-0", "duplicate id; the first one is kept")]
    assert open_side(store).quarantined == []
    moved = [strained(crystals[0]), *crystals[1:]]
    other = write_store(tmp_path / "e.h5", moved)
    assert Store.open(other).structures_hash != side.crystals.structures_hash


def test_the_graph_does_not_change_what_a_dataset_is(tmp_path):
    coarse = replace(SMALL_GRAPH, max_neighbors=3)
    stores = [
        Store.open(write_store(tmp_path / f"{n}.h5", labelled(6), graph=graph))
        for n, graph in enumerate((SMALL_GRAPH, coarse))
    ]
    assert stores[0].hash != stores[1].hash
    assert stores[0].structures_hash == stores[1].structures_hash


def check(name: str, kept: int = 0, left_out: int = 3) -> DatasetCheck:
    return DatasetCheck(
        name, f"hash of {name}", "0" * 64, ("id",), 9, 5, left_out, kept
    )


def test_what_is_said_of_several_datasets():
    assert (status([]), statement([])) == (
        "unknown",
        "unknown (compared with no dataset)",
    )
    both = [check("a.h5"), check("b.h5", kept=2)]
    assert status(both) == "transductive"
    assert statement(both) == (
        "transductive (2 of 9 structures of b.h5 are also in the corpus); "
        "clean of a.h5 (3 corpus crystals left out)"
    )
    assert find_check(both, "hash of b.h5") == both[1]
    assert find_check(both, "hash of c.h5") is None
    assert join_checks(both, [check("b.h5")]) == [check("a.h5"), check("b.h5")]


def test_an_exclusion_survives_a_file():
    found = Exclusion({3: "excluded: x", 12: "excluded: y"}, [check("a.h5")])
    assert Exclusion.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_one_dataset_takes_out_counts_for_the_other(tmp_path):
    corpus = open_side(write_lines(tmp_path / "c" / "s.jsonl", bare(labelled(5))))
    one = open_side(write_lines(tmp_path / "a" / "s.jsonl", bare(labelled(2))))
    two = [*renamed(labelled(1), "other"), *renamed(labelled(1, first=4), "other")]
    other = open_side(write_lines(tmp_path / "b" / "s.jsonl", bare(two)))
    found = find_exclusion(corpus.crystals, [one, other], kinds=["id"])
    assert list(found.rows) == [0, 1]
    # Two structures are shared; the other dataset's ids already removed the first.
    assert [(c.shared, c.kept) for c in found.checks] == [(2, 0), (2, 1)]


# ------------------------------------------------------------------------- the verb


def test_the_verb_reads_sources_and_writes_numbers(corpus, judge, tmp_path, capsys):
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join(["{}", *lines]))
    out = tmp_path / "pairs.csv"
    argv = ["overlap", corpus, judge, "-o", out, "--no-progress"]
    assert main([str(word) for word in argv]) == 0
    shown = capsys.readouterr().out
    assert "1 of 31 entries quarantined, not compared" in " ".join(shown.split())
    assert "Distance from dataset entries to the nearest corpus entry" in shown
    said = "transductive (5 of 9 dataset structures are also in the corpus)"
    assert f"{said}; pairs: {out}" in shown
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} >= {"id", "structure"}
    numbers = json.loads((tmp_path / "pairs.json").read_text())
    whole = find_overlap(open_side(corpus).crystals, Store.open(judge))
    assert numbers["statement"] == said
    assert numbers["hash"] == whole.hash
    assert numbers["counts"] == whole.counts
    assert numbers["dataset"]["structures_hash"] == Store.open(judge).structures_hash
    assert len(numbers["corpus"]["quarantined"]) == 1
    total = sum(row["same"] + row["other"] for row in numbers["nearest_distances"])
    assert total == len(whole.nearest)
    assert numbers["nearest_distances"][-1]["to"] is None


def test_kinds_and_their_number_can_be_asked_for(corpus, judge, tmp_path, capsys):
    out = tmp_path / "pairs.csv"
    argv = ["overlap", corpus, judge, "-o", out, "--kinds", "formula,id"]
    more = ["--pairs-per-entry", "1", "--no-progress"]
    assert main([str(word) for word in [*argv, *more]]) == 0
    numbers = json.loads((tmp_path / "pairs.json").read_text())
    assert numbers["kinds"] == ["id", "formula"]
    assert numbers["pairs_per_entry"] == 1
    with out.open(newline="") as file:
        rows = [(row["dataset_id"], row["kind"]) for row in csv.DictReader(file)]
    assert len(set(rows)) == len(rows)


def test_nothing_is_clean_of_what_was_not_looked_for(tmp_path):
    corpus, other = (
        open_side(write_lines(tmp_path / name / "s.jsonl", bare(crystals))).crystals
        for name, crystals in (("a", labelled(3)), ("b", renamed(labelled(3), "x")))
    )
    said = "unknown (`structure` pairs were not looked for)"
    assert find_overlap(corpus, other, kinds=["id"]).statement == said
    assert find_overlap(corpus, other).statement.startswith("transductive (3 of 3")


def test_the_verb_refuses_what_it_cannot_do(corpus, judge, tmp_path, capsys):
    def refused(*words: str | Path) -> str:
        argv = ["overlap", corpus, judge, "--no-progress", *words]
        assert main([str(word) for word in argv]) == 2
        return capsys.readouterr().err

    json_name = tmp_path / "pairs.json"
    assert "name the table of pairs, such as pairs.csv" in refused("-o", json_name)
    assert "no such folder" in refused("-o", tmp_path / "nowhere" / "pairs.csv")
    text = refused("-o", tmp_path / "pairs.csv", "--kinds", "id,structur")
    assert "unknown kind `structur`; did you mean `structure`" in text
    text = refused("-o", tmp_path / "pairs.csv", "--pairs-per-entry", "0")
    assert "`pairs_per_entry` is 0 but must be at least 1" in text


def test_a_large_source_is_read_by_several_processes(corpus, forked_workers):
    alone, together = open_side(corpus, workers=1), open_side(corpus, workers=2)
    names = alone.crystals.material_ids
    np.testing.assert_array_equal(together.crystals.material_ids, names)
    assert alone.crystals.structures_hash == together.crystals.structures_hash


def test_a_store_that_does_not_know_its_hash_works_it_out(judge):
    store = Store.open(judge)
    facts = {k: v for k, v in store.facts.items() if k != "structures_hash"}
    older = Store(store.path, store._arrays, facts)
    assert older.structures_hash == store.structures_hash


def test_many_datasets_have_one_file_name(tmp_path):
    lines = write_lines(tmp_path / "phonons" / "structures.jsonl", labelled(2))
    assert open_side(lines).name == "phonons/structures.jsonl"
