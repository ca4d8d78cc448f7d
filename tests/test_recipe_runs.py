"""What recipes share: runs that are done once, numbers of a command line, tables."""

from __future__ import annotations

import argparse
import io
from dataclasses import replace

import pytest
from rich.console import Console

from crysdistill.errors import InputError
from crysdistill.studies.recipe import at_least_one, narrow_tables, results_of_run
from crysdistill.training.train import train
from pretrain import evidence, scaling
from pretrain.evidence import small
from tests.toy_runs import training_config
from tests.toy_stores import labelled, write_store


def test_a_run_is_done_once_and_only_with_one_configuration(tmp_path):
    store = write_store(tmp_path / "d.h5", labelled(40))
    config = training_config(store, tmp_path / "run")
    calls = []

    def counted(given):
        calls.append(given)
        return train(given)

    first = results_of_run(counted, config)
    moved = replace(config, trainer=replace(config.trainer, threads=1))
    assert results_of_run(counted, moved) == first
    assert len(calls) == 1
    other = replace(config, trainer=replace(config.trainer, epochs=4))
    text = r"run was begun with another configuration; .*: trainer.epochs: 3 -> 4; give"
    with pytest.raises(InputError, match=text):
        results_of_run(counted, other)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config.yaml is damaged; start anew"):
        results_of_run(counted, config)


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "many", ""])
def test_numbers_that_are_no_counts(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match=f"{text} is not a whole number above 0"
    ):
        at_least_one(text)
    assert at_least_one("12") == 12


def test_tables_fit_into_80_columns():
    tasks = ["exp. formation energy", "phonons"]
    columns = {
        f"joint_embedding\n{k} epochs": dict.fromkeys(tasks, f"+{k}.0%")
        for k in range(8)
    }
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    console.print(*narrow_tables("Changes", columns, "two seeds"))
    text = shown.getvalue()
    assert "…" not in text
    assert text.count("exp. formation energy") == 2
    assert [text.count(f"+{k}.0%") for k in range(8)] == [2] * 8
    assert text.count("Changes") == text.count("two seeds") == 1


@pytest.mark.slow
def test_another_encoder_or_an_unclean_corpus_is_refused(tmp_path):
    base = small(tmp_path, ["bank"], longer=False)
    one = replace(base, seeds=(0,), epochs=1)
    table = evidence.run(one, tmp_path)
    assert table["arm"].tolist() == ["scratch", "bank"]
    assert evidence.run(one, tmp_path)["test"].tolist() == table["test"].tolist()
    wider = replace(one, encoder={**one.encoder, "width": 12})
    with pytest.raises(InputError, match=r"encoder.width: \d+ -> 12; give the old"):
        evidence.run(wider, tmp_path)
    unclean = write_store(tmp_path / "unclean.h5", labelled(60))
    text = r"corpus.h5 was not cleared of .*unclean.h5; remove the corpus"
    with pytest.raises(InputError, match=text):
        evidence.run(replace(one, datasets={"alloys": unclean}), tmp_path)


def test_sizes_that_cannot_be(tmp_path):
    store = write_store(tmp_path / "c.h5", labelled(40))
    scaling.check_sizes(store, [38, 5])
    text = "c.h5 has 38 crystals to pretrain on, which is less than 39; give smaller"
    with pytest.raises(InputError, match=text):
        scaling.check_sizes(store, [39])


@pytest.mark.parametrize(
    ("same", "size", "epochs"), [(None, 50, 6), (100, 50, 12), (100, 200, 3)]
)
def test_the_epochs_that_make_as_many_steps(same, size, epochs):
    assert scaling.epochs_over(size, 6, same) == epochs


def test_steps_that_no_whole_number_of_epochs_makes():
    text = r"`--same-steps 12000`: 1.44 passes over 50,000 crystals make as many steps"
    with pytest.raises(InputError, match=text):
        scaling.epochs_over(50_000, 6, 12_000)
