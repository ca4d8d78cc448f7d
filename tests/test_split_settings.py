"""Ways to specify splits: settings, folds, Matbench, files, the verb, runs."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import KFold, StratifiedKFold

from crysdistill.cli import main
from crysdistill.configs import load_config
from crysdistill.errors import InputError
from crysdistill.schema import dump_config
from crysdistill.splits import (
    Split,
    SplitSettings,
    fold_file,
    make_folds,
    make_split,
    random_split,
    read_split,
)
from crysdistill.splits.folds import MATBENCH_TASKS
from crysdistill.splits.written import write_splits
from crysdistill.store.store import Store
from crysdistill.studies.study import StudyConfig, study
from crysdistill.training.settings import HeadSettings, TrainerSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.targets import Target
from tests.toy_stores import SMALL_ENCODER, labelled, write_store
from tests.toy_studies import BASE


class Names:
    """A collection with only the names that a split needs."""

    def __init__(self, names: list[str]) -> None:
        self.material_ids = names

    def __len__(self) -> int:
        return len(self.material_ids)


PLAIN = Names([f"m{i}" for i in range(120)])
SIZES = np.random.default_rng(0).normal(size=120)
SIZES[::10] = np.nan  # unknown
CLASSES = np.where(np.isnan(SIZES), np.nan, np.arange(120) % 8 == 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "d.h5"
    return write_store(path, labelled(40), symmetry="fast")


def members(split: Split, names: list[str]) -> list[set[str]]:
    return [{names[r] for r in s} for s in (split.train, split.val, split.test)]


# ----------------------------------------------------------------------------- settings


@pytest.mark.parametrize("seed", range(3))
def test_random_stays_what_it_was(seed):
    settings = SplitSettings(train=0.5, val=20, test=0.2, seed=seed, train_subset=30)
    split = make_split(PLAIN, settings, SIZES)
    known = np.flatnonzero(~np.isnan(SIZES))
    order = np.random.default_rng(seed).permutation(known)
    assert split.test.tolist() == order[:21].tolist()
    assert split.val.tolist() == order[21:41].tolist()
    assert split.train.tolist() == order[41:71].tolist()
    assert split.made_by == f"random, seed {seed}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "prototyp"}, "'prototyp' but must be .*; did you mean `prototype`"),
        ({"seed": -1}, "`split.seed` is -1 but must not be negative"),
        ({"by": "element"}, r"`split.by=element` needs `split.elements`, such as \[F"),
        ({"elements": ("F",)}, "`split.elements` needs `split.by=element`"),
        ({"by": "formula", "stratify": True}, "cannot go with `split.by=formula`"),
        ({"fold": 1}, "`split.fold` needs `split.folds`"),
        ({"folds": 1}, "`split.folds` is 1 but must be at least 2"),
        ({"folds": 5, "fold": 5}, "`split.fold` is 5 but must be 0 to 4"),
        ({"by": "matbench", "folds": 4}, "is 4, but Matbench has 5; leave it out"),
        (
            {"by": "element", "elements": ("F",), "folds": 3},
            "defines the test set; leave out `split.folds`",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        SplitSettings(**settings)


def test_what_only_shows_with_the_data():
    for settings, labels, message in (
        (SplitSettings(folds=3), SIZES, "`split.folds` needs `split.fold`, 0 to 2"),
        (SplitSettings(stratify=True), None, "needs a target whose values are"),
        (SplitSettings(stratify=True), SIZES, r"1 of 108 crystals have the class -"),
        (SplitSettings(by="matbench", fold=0), None, "need the target of the task"),
    ):
        with pytest.raises(InputError, match=message):
            make_split(PLAIN, settings, labels)


def test_settings_from_text_and_back():
    line = "dataset=d.h5 target.name=x split.by=element split.elements=[F,Cl]"
    config = load_config(None, line.split(), TrainConfig)
    assert config.split == SplitSettings(by="element", elements=("F", "Cl"))
    dumped = dump_config(config)
    assert "by: element" in dumped
    with pytest.raises(InputError, match=r"split\.by.*did you mean `formula`"):
        load_config(None, [*line.split(), "split.by=formul"], TrainConfig)


# ------------------------------------------------------------------------------- folds


def test_folds_are_those_of_sklearn_and_validate_on_others():
    known = np.flatnonzero(~np.isnan(SIZES))
    settings = SplitSettings(folds=4, seed=3)
    expected = KFold(4, shuffle=True, random_state=3).split(known)
    splits = make_folds(PLAIN, settings, SIZES)
    for number, (split, (_, test)) in enumerate(zip(splits, expected, strict=True)):
        assert split.test.tolist() == known[test].tolist()
        assert len(split.val) == 9  # 0.1 to 0.8 of the fold's other 81
        assert len(split.train) == 72
        one = make_split(PLAIN, replace(settings, fold=number), SIZES)
        assert members(one, PLAIN.material_ids) == members(split, PLAIN.material_ids)
    assert splits[2].made_by == "random, fold 2 of 4 (from 0), seed 3"


def test_stratified_folds():
    settings = SplitSettings(folds=3, stratify=True)
    for split in make_folds(PLAIN, settings, CLASSES):
        ones = [CLASSES[r].sum() for r in (split.train, split.val, split.test)]
        assert ones[2] == np.nansum(CLASSES) / 3
        assert ones[1] >= 1


def test_folds_in_the_order_of_names():
    splits = make_folds(PLAIN, SplitSettings(by="id", folds=3))
    assert [(s.test.min(), s.test.max()) for s in splits] == [
        (0, 39), (40, 79), (80, 119),
    ]  # fmt: skip


@pytest.mark.parametrize("by", ["formula", "cluster", "prototype"])
def test_grouped_folds_of_a_store(dataset, by):
    store = Store.open(dataset)
    settings = SplitSettings(by=by, folds=3, clusters=6, train=0.5, val=0.2)
    splits = make_folds(store, settings)
    tested = np.concatenate([split.test for split in splits])
    assert sorted(tested) == list(range(40))
    assert f"whole {by.replace('_', ' ')}s, fold 1 of 3" in splits[1].made_by


# ---------------------------------------------------------------------------- Matbench


def test_the_official_folds_of_phonons(shared_data):
    with (shared_data / "phonons" / "properties.csv").open() as file:
        rows = list(csv.DictReader(file))
    task = Names([row["material_id"] for row in rows])
    labels = np.array([float(row["last_phdos_peak"]) for row in rows])
    official = KFold(5, shuffle=True, random_state=18012019).split(np.arange(1265))
    splits = make_folds(task, SplitSettings(by="matbench", seed=7), labels)
    for split, (known, test) in zip(splits, official, strict=True):
        assert split.test.tolist() == test.tolist()
        assert set(split.train) | set(split.val) == set(known)
    tested = np.concatenate([split.test for split in splits])
    assert sorted(tested) == list(range(1265))
    assert splits[0].test[:5].tolist() == [1, 2, 6, 9, 17]


def test_matbench_stratifies_classes():
    count = MATBENCH_TASKS["expt_is_metal"]
    labels = (np.random.default_rng(0).random(count) < 0.3).astype(float)
    task = Names([f"mb-expt-is-metal-{i + 1:04}" for i in range(count)])
    official = StratifiedKFold(5, shuffle=True, random_state=18012019)
    splits = make_folds(task, SplitSettings(by="matbench"), labels)
    pairs = zip(splits, official.split(labels, labels), strict=True)
    assert all(split.test.tolist() == test.tolist() for split, (_, test) in pairs)


def test_half_a_task_has_no_official_folds():
    settings = SplitSettings(by="matbench", fold=0)
    task = Names([f"mb-phonons-{i + 1:04}" for i in range(1265)])
    labels = np.ones(1265) * 2
    make_split(task, settings, labels)
    some = Names(task.material_ids[1:])
    message = (
        r"1,264 crystals have a label, but no Matbench task has so many \(the "
        r"nearest, `matbench_phonons`, has 1,265\)"
    )
    with pytest.raises(InputError, match=message):
        make_split(some, settings, labels[1:])
    mixed = Names([*task.material_ids[:7], *task.material_ids[:6:-1]])
    with pytest.raises(InputError, match="mb-phonons-1265 is not at its place"):
        make_split(mixed, settings, labels)


# ------------------------------------------------------------------------------- files


def test_a_file_that_divides_a_group_is_refused(dataset, tmp_path):
    store = Store.open(dataset)
    path = tmp_path / "split.csv"
    drawn = SplitSettings(by="cluster", clusters=6, train=0.5, val=0.25, test=0.25)
    split = make_split(store, drawn)
    split.write(path, store.material_ids)
    settings = replace(drawn, file=str(path))
    again = make_split(store, settings)
    assert again.hash(store.material_ids) == split.hash(store.material_ids)
    assert again.made_by == "read from split.csv"
    random_split(np.arange(40), 0.5, 0.25, 0.25, 0).write(path, store.material_ids)
    message = r"`\w+` and `\w+` share the cluster 00\d \(\S+ and \S+\); split"
    with pytest.raises(InputError, match=message):
        make_split(store, settings)
    assert make_split(store, replace(settings, by="random")).made_by
    element = store.crystal(int(read(path, store).train[0])).to_pymatgen()[0]
    symbol = element.specie.symbol
    settings = SplitSettings(by="element", elements=(symbol,), file=str(path))
    with pytest.raises(InputError, match=rf"holds one of {symbol}, but is not in `te"):
        make_split(store, settings)


def read(path: Path, store: Store) -> Split:
    return read_split(path, store.material_ids, np.arange(len(store)))


def test_each_fold_has_its_file(dataset, tmp_path):
    store = Store.open(dataset)
    settings = SplitSettings(by="formula", folds=3)
    written = write_splits(dataset, tmp_path / "split.csv", settings)
    assert written.paths == [tmp_path / f"split-{fold}.csv" for fold in range(3)]
    assert written.paths[2] == fold_file(tmp_path / "split.csv", 2)
    files = replace(settings, file=str(tmp_path / "split.csv"))
    for fold, split in enumerate(make_folds(store, settings)):
        again = make_split(store, replace(files, fold=fold))
        assert again.hash(store.material_ids) == split.hash(store.material_ids)
    written.paths[1].unlink()
    with pytest.raises(InputError, match=r"split-1\.csv: no such split file"):
        make_split(store, replace(files, fold=1))


class TestVerb:
    def run(self, capsys, *argv: str) -> str:
        assert main(["split", *argv]) == 0
        return capsys.readouterr().out

    def refused(self, capsys, *argv: str) -> str:
        assert main(["split", *argv]) == 2
        return capsys.readouterr().err.removeprefix("error: ").strip()

    def test_it_writes_what_a_run_reads(self, dataset, tmp_path, capsys):
        out = tmp_path / "split.csv"
        sizes = ["--train", "0.5", "--val", "0.25", "--test", "10", "--seed", "3"]
        shown = self.run(capsys, str(dataset), "-o", str(out), "--by=formula", *sizes)
        store = Store.open(dataset)
        split = read(out, store)
        assert len(split.test) == 10
        assert len(split.val) == 10
        assert split.hash(store.material_ids) in shown
        assert "whole formulas at random, seed 3" in shown
        numbers = [re.findall(r"[\w.%]+", line) for line in shown.splitlines()]
        table = {row[-4]: row[-3:] for row in numbers if len(row) in (4, 5)}
        formulas = {store.crystal(row).formula for row in split.test.tolist()}
        assert table["test"] == ["10", "25.0%", str(len(formulas))]
        again = tmp_path / "again.csv"
        self.run(capsys, str(dataset), "-o", str(again), "--by=formula", *sizes)
        assert again.read_bytes() == out.read_bytes()

    def test_what_is_shared_and_left_out_is_said(self, dataset, tmp_path, capsys):
        out = str(tmp_path / "split.csv")
        sizes = ["--train", "20", "--val", "10", "--test", "6"]
        shown = self.run(capsys, str(dataset), "-o", out, *sizes)
        assert re.search(r"none\W+4\W+10\.0%", shown)

    def test_folds_classes_and_labels(self, dataset, tmp_path, capsys):
        out = str(tmp_path / "split.csv")
        argv = [str(dataset), "-o", out, "--folds", "4", "--stratify"]
        said = self.refused(capsys, *argv)
        assert said == "`--stratify` needs a property, such as `--target NAME`"
        shown = self.run(capsys, *argv, "--target", "class")
        assert shown.count("random within classes, fold") == 4
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            f"split-{fold}.csv" for fold in range(4)
        ]

    def test_no_other_split_is_overwritten(self, dataset, tmp_path, capsys):
        out = str(tmp_path / "split.csv")
        self.run(capsys, str(dataset), "-o", out)
        self.run(capsys, str(dataset), "-o", out)  # the same split
        said = self.refused(capsys, str(dataset), "-o", out, "--seed", "1")
        assert said == f"{out} holds another split; give `--overwrite` or another name"
        self.run(capsys, str(dataset), "-o", out, "--seed", "1", "--overwrite")
        nowhere = str(tmp_path / "no" / "split.csv")
        said = self.refused(capsys, str(dataset), "-o", nowhere)
        assert said == f"{tmp_path / 'no'}: no such folder; create it first"


# -------------------------------------------------------------------------------- runs


@pytest.fixture
def config(dataset, tmp_path) -> TrainConfig:
    return TrainConfig(
        dataset=dataset,
        target=Target("density", "1/Å³"),
        encoder=SMALL_ENCODER,
        head=HeadSettings(hidden=8),
        split=SplitSettings(by="formula", train=0.5, val=0.25, test=0.25),
        trainer=TrainerSettings(
            epochs=1, batch_size=8, accelerator="cpu", progress=False
        ),
        out=tmp_path / "run",
    )


def test_a_run_says_by_what_it_was_split(config):
    train(config)
    results = json.loads((config.out / "results.json").read_text())
    store = Store.open(config.dataset)
    split = make_split(store, config.split, store.property("density"))
    assert results["split_by"] == "whole formulas at random, seed 0"
    assert results["split"] == split.hash(store.material_ids)
    written = read(config.out / "split.csv", store)
    assert written.hash(store.material_ids) == results["split"]


def test_seeds_of_a_study_are_its_folds(config, tmp_path):
    split = {"by": "formula", "folds": 3}
    base = {"dataset": config.dataset, **BASE, "split": split}
    axes = {"arm": ["scratch"], "seed": [0, 1, 2]}
    given = StudyConfig(
        base=base, out=tmp_path / "study", axes=axes, controls=["mean"], workers=1
    )
    with pytest.raises(InputError, match=r"seed 3 has no fold: `split\.folds` is 3"):
        study(replace(given, axes={**axes, "seed": [0, 3]}), progress=False)
    store = Store.open(config.dataset)
    labels = store.property("density")
    settings = SplitSettings(by="formula", folds=3)
    folds = make_folds(store, settings, labels)
    table = study(given, progress=False)
    assert list(table["arm"]) == ["scratch", "mean"] * 3
    assert list(table["fold"]) == [0, 0, 1, 1, 2, 2]
    for row in table.itertuples():
        found = read(given.out / row.run / "split.csv", store)
        expected = folds[row.fold].hash(store.material_ids)
        assert found.hash(store.material_ids) == expected
    found = make_split(store, settings.for_seed(1, 9), labels)
    assert found.train.tolist() == folds[1].train[:9].tolist()
    # With a separate axis for folds, seeds vary the training.
    both = {"arm": ["scratch"], "fold": [0, 1], "seed": [7]}
    table = study(replace(given, out=tmp_path / "both", axes=both), progress=False)
    assert list(table["fold"]) == [0, 0, 1, 1]
    assert set(table["seed"]) == {7}
    other = {**base, "split": {"by": "formula", "folds": 2}}
    with pytest.raises(InputError, match=r"now different: split\.folds: 3 -> 2"):
        study(replace(given, base=other, axes={**axes, "seed": [0, 1]}), progress=False)
    drawn = SplitSettings(train=0.5).for_seed(4, 7)
    assert drawn == SplitSettings(train=0.5, seed=4, train_subset=7)


def test_classes_of_a_study_need_no_luck(config):
    """If a random split leaves a subset with one class, one setting mends it."""
    store = Store.open(config.dataset)
    labels = store.property("class")
    sizes = SplitSettings(train=30, val=5, test=5)
    unlucky = []
    for seed in range(60):
        split = make_split(store, replace(sizes, seed=seed), labels)
        if any(len(np.unique(labels[r])) == 1 for r in (split.val, split.test)):
            unlucky.append(seed)
        split = make_split(store, replace(sizes, seed=seed, stratify=True), labels)
        for rows in (split.train[:4], split.val, split.test):
            assert len(np.unique(labels[rows])) == 2
    assert unlucky
    target = Target("class", task="classification")
    split = replace(sizes, seed=unlucky[0])
    with pytest.raises(InputError, match=r"or set `split\.stratify=true`"):
        train(replace(config, target=target, split=split))
    train(replace(config, target=target, split=replace(split, stratify=True)))
