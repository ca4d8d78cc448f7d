"""Studies: every arm on the same crystals, each cell once, baselines beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.splits import Split, read_split
from crysdistill.store.store import Store
from crysdistill.studies import arms
from crysdistill.studies import compare as comparing
from crysdistill.studies.arms import ARMS, make_arm
from crysdistill.studies.baselines import (
    composition_features,
    forest_baseline,
    mean_baseline,
)
from crysdistill.studies.compare import CompareConfig, about, compare
from crysdistill.training.settings import HeadSettings, SplitSettings, TrainerSettings
from crysdistill.training.train import TrainConfig
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import read_header, save_weights
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled, write_store

EVERY_ARM = [*ARMS, "frozen-0", "frozen-1", "frozen-all"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("dataset") / "d.h5", labelled(40))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(7)  # not that of a network from scratch
    settings = {**SMALL_ENCODER, "width": 6, "bias": False, "normalize": True}
    encoder = make_encoder(**settings, cutoff=SMALL_GRAPH.cutoff)
    path = tmp_path_factory.mktemp("weights") / "pretrained.safetensors"
    return save_weights(path, encoder, SMALL_GRAPH)


@pytest.fixture
def config(dataset, weights, tmp_path) -> CompareConfig:
    base = TrainConfig(
        dataset=dataset,
        target=Target("density", "1/Å³"),
        encoder=SMALL_ENCODER,
        head=HeadSettings(hidden=8),
        split=SplitSettings(train=20, val=8, test=8),
        trainer=TrainerSettings(
            epochs=2, batch_size=8, accelerator="cpu", progress=False
        ),
    )
    return CompareConfig(
        weights=weights,
        base=base,
        out=tmp_path / "study",
        arms=["scratch", "finetuned"],
        seeds=[0, 1],
        labels=[10],
        baselines=["mean"],
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


class TestArms:
    def test_every_arm_runs(self, config):
        table = compare(
            replace(config, arms=EVERY_ARM, seeds=[0], baselines=["mean", "forest"]),
            progress=False,
        )
        assert list(table["arm"]) == [*EVERY_ARM, "mean", "forest"]
        values = table.set_index("arm")["value"]
        assert np.isfinite(values).all()
        assert values.nunique() == len(values)
        frozen = {
            name: results(config.out / "runs" / f"{name}-10-0")["convolutions"]
            for name in ("finetuned", "frozen-0", "frozen-1", "frozen-all")
        }
        assert frozen == {
            "finetuned": None,
            "frozen-0": 0,
            "frozen-1": 1,
            "frozen-all": 2,
        }

    def test_a_frozen_encoder_stays(self, config, weights):
        compare(replace(config, arms=["frozen-all"], seeds=[0]), progress=False)
        run = config.out / "runs" / "frozen-all-10-0" / "weights.safetensors"
        before, after = load_file(weights), load_file(run)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_architectures(self, config):
        chosen = ["scratch", "scratch-large", "finetuned", "distilled"]
        compare(replace(config, arms=chosen, seeds=[0]), progress=False)
        settings = {
            name: read_header(
                config.out / "runs" / f"{name}-10-0" / "weights.safetensors"
            ).encoder["settings"]
            for name in chosen
        }
        assert settings["scratch"]["width"] == 8
        assert settings["finetuned"]["width"] == 6
        assert settings["distilled"] == settings["scratch"]
        # A control differs from what it controls in its weights alone: the pooling
        # of the teacher, which averages unit vectors, is in neither.
        assert settings["scratch-large"] == settings["finetuned"]
        assert not settings["finetuned"]["normalize"]

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("finetune", "; did you mean `finetuned`?"),
            ("random-techer", "; did you mean `random-teacher`?"),
            ("frozen-x", ""),
            ("frozen--1", ""),
        ],
    )
    def test_unknown(self, name, hint):
        with pytest.raises(InputError) as caught:
            make_arm(name)
        text = str(caught.value)
        assert text.startswith(f"unknown arm {name!r}; choose of scratch, ")
        assert text.endswith(f"frozen-all{hint}")

    def test_each_says_what_it_is(self):
        lines = about([*EVERY_ARM, "mean", "forest"])
        assert list(lines) == [*EVERY_ARM, "mean", "forest"]
        assert len(set(lines.values())) == len(lines)
        assert "embedding and 1 convolutions" in lines["frozen-1"]


class TestCells:
    def test_all_arms_of_a_seed_see_the_same_crystals(self, config):
        table = compare(config, progress=False)
        found = {}
        for seed in config.seeds:
            same = {
                results(config.out / "runs" / f"{arm}-10-{seed}")["split"]
                for arm in config.arms
            }
            assert len(same) == 1
            found[seed] = same.pop()
        assert found[0] != found[1]
        assert set(table["labels"]) == {10}

    def test_fewer_labels_are_part_of_more_and_tests_are_the_same(self, config):
        compare(
            replace(config, labels=[5, 10], arms=["scratch"], seeds=[0]), progress=False
        )
        store = Store.open(config.base.dataset)
        few, many = (
            read_split(
                config.out / "runs" / f"scratch-{n}-0" / "split.csv",
                store.material_ids,
                np.arange(40),
            )
            for n in (5, 10)
        )
        assert set(few.train) < set(many.train)
        assert set(few.test) == set(many.test)
        assert set(few.val) == set(many.val)

    def test_the_table(self, config):
        table = compare(config, progress=False)
        assert list(table) == [
            "arm", "target", "unit", "metric", "labels", "seed", "value", "validation",
        ]  # fmt: skip
        assert len(table) == 2 * (2 + 1)
        written = pd.read_csv(config.out / "results.csv")
        pd.testing.assert_frame_equal(written, table, check_dtype=False)
        for line in table[table["arm"].isin(config.arms)].itertuples():
            run = results(config.out / "runs" / f"{line.arm}-10-{line.seed}")
            assert (line.value, line.validation) == (run["test"], run["val"])

    def test_it_goes_on_cell_by_cell(self, config, monkeypatch):
        done: list[Path] = []
        real = arms.train, arms.finetune

        def watch(run):
            def watched(config):
                done.append(config.out)
                if len(done) == 3:
                    raise KeyboardInterrupt
                return run(config)

            return watched

        with monkeypatch.context() as patch:
            patch.setattr(arms, "train", watch(real[0]))
            patch.setattr(arms, "finetune", watch(real[1]))
            with pytest.raises(KeyboardInterrupt):
                compare(config, progress=False)
            assert [path.name for path in done] == [
                "scratch-10-0", "finetuned-10-0", "scratch-10-1",
            ]  # fmt: skip
            table = compare(config, progress=False)
        assert [path.name for path in done[3:]] == ["scratch-10-1", "finetuned-10-1"]
        whole = compare(replace(config, out=config.out / "whole"), progress=False)
        pd.testing.assert_frame_equal(table, whole)

    def test_more_seeds_are_added_to_what_is_there(self, config, monkeypatch):
        first = compare(config, progress=False)
        made = []
        real = comparing.replace

        def watch(config, **changes):
            made.extend([changes["out"].name] if changes.get("resume") else [])
            return real(config, **changes)

        monkeypatch.setattr(comparing, "replace", watch)
        second = compare(replace(config, seeds=[0, 1, 2]), progress=False)
        assert made == ["scratch-10-2", "finetuned-10-2"]
        keys = ["arm", "seed", "value"]
        both = first[keys].merge(second[keys])
        assert len(both) == len(first)

    def test_cells_of_another_base_are_not_mixed_in(self, config):
        compare(replace(config, seeds=[0]), progress=False)
        trainer = replace(config.base.trainer, epochs=3)
        changed = replace(config, base=replace(config.base, trainer=trainer))
        with pytest.raises(InputError, match=r"holds a study.*different: .*epochs: 3"):
            compare(changed, progress=False)

    def test_a_broken_run_is_made_again(self, config):
        """What stands without its numbers was interrupted."""
        first = compare(config, progress=False)
        run = config.out / "runs" / "scratch-10-0"
        (run / "results.json").unlink()
        (run / "split.csv").write_text("half")
        pd.testing.assert_frame_equal(compare(config, progress=False), first)

    @pytest.mark.slow
    def test_two_workers_find_the_same(self, config):
        one = compare(config, progress=False)
        two = compare(
            replace(config, out=config.out / "two", workers=2), progress=False
        )
        pd.testing.assert_frame_equal(one, two)


class TestBaselines:
    @pytest.fixture
    def split(self) -> Split:
        order = np.random.default_rng(0).permutation(40)
        return Split(order[:24], order[24:32], order[32:])

    def test_features_of_the_composition(self, dataset):
        store = Store.open(dataset)
        rows = np.array([7, 2])
        features = composition_features(store, rows)
        assert features.shape == (2, 101 + 92)
        for row, line in zip(rows, features, strict=True):
            numbers = store.crystal(row).atomic_numbers
            share = np.bincount(numbers, minlength=101) / len(numbers)
            assert np.allclose(line[:101], share)

    def test_the_mean(self, dataset, split):
        store = Store.open(dataset)
        values = mean_baseline(store, split, Target("density"), 0)
        assert values.shape == (8,)
        assert np.allclose(values, store.property("density")[split.train].mean())

    def test_the_forest(self, dataset, split):
        store = Store.open(dataset)
        target = Target("density")
        first = forest_baseline(store, split, target, 0)
        assert np.array_equal(first, forest_baseline(store, split, target, 0))
        assert not np.array_equal(first, forest_baseline(store, split, target, 1))
        known = store.property("density")[split.train]
        assert known.min() <= first.min() <= first.max() <= known.max()

    def test_the_forest_gives_probabilities(self, dataset, split):
        target = Target("class", task="classification")
        values = forest_baseline(Store.open(dataset), split, target, 0)
        assert ((values >= 0) & (values <= 1)).all()

    def test_a_logarithm(self, dataset, split):
        target = Target("density", transform="log10")
        store = Store.open(dataset)
        values = forest_baseline(store, split, target, 0)
        known = store.property("density")[split.train]
        assert (
            known.min() * 0.999 <= values.min() <= values.max() <= known.max() * 1.001
        )

    def test_in_a_study_they_see_what_the_arms_see(self, config):
        table = compare(replace(config, seeds=[0]), progress=False)
        store = Store.open(config.base.dataset)
        labels = store.property("density")
        run = config.out / "runs" / "scratch-10-0"
        split = read_split(run / "split.csv", store.material_ids, np.arange(40))
        expected = np.abs(labels[split.test] - labels[split.train].mean()).mean()
        told = table.set_index("arm").loc["mean", "value"]
        assert told == pytest.approx(expected)

    def test_classes(self, config):
        split = SplitSettings(train=16, val=12, test=12)
        target = Target("class", task="classification")
        base = replace(config.base, target=target, split=split)
        table = compare(
            replace(config, base=base, seeds=[0], baselines=["mean", "forest"]),
            progress=False,
        )
        values = table.set_index("arm")["value"]
        assert values["mean"] == 0.5
        assert 0 <= values["forest"] <= 1
        assert set(table["metric"]) == {"auc"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["scrach"]}, "unknown arm 'scrach'.*did you mean `scratch`"),
        ({"baselines": ["tree"]}, "unknown baseline 'tree'; choose of mean, forest"),
        ({"seeds": []}, "at least one of `arms` and one of `seeds`"),
        ({"arms": []}, "at least one of `arms` and one of `seeds`"),
        ({"workers": 0}, "`workers` is 0 but must be at least 1"),
        ({"seeds": [0, 0]}, "`seeds` names 0 twice"),
        ({"arms": ["scratch", "scratch"]}, "`arms` names scratch twice"),
    ],
)
def test_bad_settings(config, change, message):
    with pytest.raises(InputError, match=message):
        replace(config, **change)


def test_a_study_needs_test_crystals(config):
    base = replace(config.base, split=SplitSettings(train=24, val=8, test=0))
    with pytest.raises(
        InputError, match=r"`base\.split\.test` is 0, but a study compares"
    ):
        replace(config, base=base)
