"""Arms and controls: what each one trains, and when a study adds it."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crysdistill.encoders import find_encoder
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.studies.arms import ARMS, MEMBERS, controls_of, make_arm
from crysdistill.studies.axes import read_axes
from crysdistill.studies.cells import make_cells
from crysdistill.studies.descriptors import magpie, onehot, structure
from crysdistill.studies.kinds import flat
from crysdistill.studies.readouts import ReadoutConfig, readout
from crysdistill.studies.study import StudyConfig, study
from crysdistill.teachers.answers import Block, TeacherAnswers
from crysdistill.training.settings import SplitSettings
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import read_header
from tests.toy_stores import SMALL_ENCODER, labelled, write_store
from tests.toy_studies import BASE, pretrained, results

EVERY_ARM = [*ARMS, "frozen-0", "frozen-1", "frozen-all"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("dataset") / "d.h5", labelled(40))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def every(dataset, weights, tmp_path_factory):
    """A study of every arm, with one seed."""
    base = {"dataset": dataset, **BASE}
    config = StudyConfig(
        base={**base, "trainer": {**base["trainer"], "epochs": 4}},
        weights=weights,
        out=tmp_path_factory.mktemp("study"),
        axes={"arm": EVERY_ARM, "labels": [12], "seed": [0]},
        controls=False,
        workers=1,
    )
    table = study(config, progress=False).set_index("arm")
    return table, {arm: config.out / run for arm, run in table["run"].items()}


@pytest.mark.slow
class TestEveryArm:
    def test_it_runs(self, every):
        table, _ = every
        assert list(table.index) == EVERY_ARM
        assert set(table["error"]) == {""}
        assert np.isfinite(table["value"]).all()
        assert np.isfinite(table["validation"]).all()

    def test_every_run_has_its_files(self, every):
        for arm, folder in every[1].items():
            names = {path.name for path in folder.iterdir()}
            assert {
                "config.yaml", "environment.json", "split.csv", "predictions.csv",
                "results.json", "cell.json",
            } <= names, arm  # fmt: skip

    def test_all_have_the_same_crystals(self, every):
        assert len({results(folder)["split"] for folder in every[1].values()}) == 1

    def test_frozen_layers(self, every):
        frozen = {
            name: results(every[1][name])["convolutions"]
            for name in ("finetuned", "frozen-0", "frozen-1", "frozen-all")
        }
        assert list(frozen.values()) == [None, 0, 1, 2]
        moved = results(every[1]["frozen-1"])["drift"]
        assert moved["embedding"] == moved["convolution 1"] == 0
        assert moved["convolution 2"] > 0
        kept = results(every[1]["frozen-all"])
        assert set(kept["drift"].values()) == {0.0}
        assert all(value == pytest.approx(1) for value in kept["cka"].values())

    def test_a_frozen_encoder_stays(self, every, weights):
        after = load_file(every[1]["frozen-all"] / "weights.safetensors")
        before = load_file(weights)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_architectures(self, every):
        settings = {
            name: read_header(every[1][name] / "weights.safetensors").encoder[
                "settings"
            ]
            for name in ("scratch", "scratch-larger", "finetuned", "distilled")
        }
        assert settings["scratch"]["width"] == 8
        assert settings["finetuned"]["width"] == 6
        assert settings["distilled"] == settings["scratch"]
        # A control differs from its arm only in the initial weights.
        assert settings["scratch-larger"] == settings["finetuned"]

    def test_ensembles(self, every):
        for name in ("finetuned-ensemble", "scratch-ensemble"):
            folder = every[1][name]
            assert results(folder)["networks"] == MEMBERS
            assert read_header(folder / "weights.safetensors").kind == "stack"
            values = [results(folder / f"network-{k}")["test"] for k in range(MEMBERS)]
            assert len(set(values)) == MEMBERS
            assert results(folder)["test"] <= max(values)

    def test_teachers_differ(self, every):
        table, _ = every
        values = table.loc[["distilled", "random-teacher", "shuffled-teacher"], "value"]
        assert values.nunique() == 3


class TestNames:
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
        assert text.startswith(f"unknown arm {name!r}; choose one of scratch, ")
        assert text.endswith(f"frozen-all{hint}")

    def test_each_says_what_it_is(self):
        lines = [make_arm(name).about for name in EVERY_ARM]
        assert len(set(lines)) == len(lines)

    def test_an_arm_with_another_teacher_needs_no_weights(self):
        arm = make_arm("potential", {"like": "distilled", "teacher": "chgnet"})
        assert arm.own({}) == {"teacher": "chgnet"}

    def test_an_arm_of_the_user(self):
        arm = make_arm("gentle", {"like": "finetuned", "encoder_lr": "0.1"})
        assert arm.settings == {"encoder_lr": "0.1"}
        assert arm.about.endswith("; encoder_lr=0.1")
        assert not arm.control

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"encoder_lr": 0.1}, "the arm `a` must say which arm it changes"),
            (
                {"like": "finetuned", "encoder_r": 1},
                "unknown key `axes.arm.a.encoder_r`",
            ),
            ({"like": "scratch", "alpha": 1}, "does not apply to the arm `scratch`"),
            (
                {"like": "scratch", "repeats": 0},
                "`axes.arm.a.repeats` is 0 but must be",
            ),
        ],
    )
    def test_mistakes(self, changes, message):
        with pytest.raises(InputError) as caught:
            make_arm("a", changes)
        assert message in str(caught.value)


ALWAYS = [
    "fingerprint-ridge", "forest", "forest-onehot", "boosted", "boosted-onehot",
    "mean", "median",
]  # fmt: skip
PRETRAINED = ["scratch", "scratch-longer", "random-encoder-ridge", "pretrained-ridge"]


class TestControls:
    @pytest.mark.parametrize(
        ("arm", "more"),
        [
            ("scratch", []),
            ("finetuned", [*PRETRAINED, "scratch-larger"]),
            ("distilled", [*PRETRAINED, "random-teacher", "shuffled-teacher"]),
            ("stack", [*PRETRAINED, "stack-scratch"]),
            ("finetuned-ensemble", [*PRETRAINED, "scratch-larger", "scratch-ensemble"]),
        ],
    )
    def test_those_that_answer_to_an_arm(self, arm, more):
        found = [one.name for one in controls_of([make_arm(arm)], True)]
        assert sorted(found) == sorted([*ALWAYS, *more])

    def test_none_or_some(self):
        arms = [make_arm("finetuned")]
        assert controls_of(arms, False) == []
        assert [c.name for c in controls_of(arms, ["mean", "scratch"])] == [
            "mean", "scratch",
        ]  # fmt: skip

    def test_a_control_that_is_the_same_run_is_left_out(self, weights):
        larger = make_arm("scratch-larger").own({"weights": weights})["encoder"]
        base = flat({"dataset": "d.h5", **BASE, "weights": weights})
        axes = read_axes({"arm": ["scratch", "finetuned"], "seed": [0]})
        own = signature(find_encoder(larger["name"])).parameters
        brief = {k: v for k, v in larger.items() if k == "name" or v != own[k].default}
        assert len(brief) < len(larger)
        for encoder, there in ((SMALL_ENCODER, True), (larger, False), (brief, False)):
            cells = make_cells({**base, **flat({"encoder": encoder})}, axes)
            assert ("scratch-larger" in {cell.arm.name for cell in cells}) == there


class TestCells:
    def cells(self, axes, exclude=(), **more):
        base = flat({"dataset": "d.h5", **BASE, **more})
        return make_cells(base, read_axes(axes), exclude, False)

    def test_an_axis_that_does_not_apply_collapses(self, weights):
        found = self.cells(
            {"arm": ["scratch", "finetuned", "frozen-1"], "seed": [0, 1],
             "freeze": {"convolutions": "[0, 1, all]"}},
            weights=weights,
        )  # fmt: skip
        count = {}
        for cell in found:
            count[cell.arm.name] = count.get(cell.arm.name, 0) + 1
            applies = cell.arm.name == "finetuned"
            assert ("freeze.convolutions" in cell.coordinates) == applies
        assert count == {"scratch": 2, "finetuned": 6, "frozen-1": 2}
        values = [c.coordinates.get("freeze.convolutions") for c in found]
        assert {0, 1, "all"} <= set(values)  # typed by the schema

    def test_tasks_are_named_mappings(self):
        found = self.cells(
            {"arm": ["scratch"], "seed": [0], "task": {
                "a": {"target": {"name": "x"}}, "b": {"dataset": "e.h5"}}},
        )  # fmt: skip
        about = [(c.task, c.config.target.name, str(c.config.dataset)) for c in found]
        assert about == [("a", "x", "d.h5"), ("b", "density", "e.h5")]

    def test_exclusions(self, weights):
        axes = {"arm": ["scratch", "finetuned"], "labels": [10, 20], "seed": [0]}
        found = self.cells(axes, [{"arm": "scratch", "labels": [20]}], weights=weights)
        left = [(c.arm.name, c.coordinates["labels"]) for c in found]
        assert left == [("scratch", 10), ("finetuned", 10), ("finetuned", 20)]

    def test_encoders_by_name(self):
        found = self.cells({"arm": ["scratch"], "seed": [0], "encoder": ["schnet"]})
        assert found[0].config.encoder["name"] == "schnet"
        assert "width" not in found[0].config.encoder  # CGCNN's width is dropped

    def test_names_differ_with_every_setting(self, weights):
        axes = {"arm": ["finetuned"], "seed": [0], "encoder_lr": [1.0, 0.3]}
        names = {cell.name for cell in self.cells(axes, weights=weights)}
        plain = {
            c.name for c in self.cells({**axes, "encoder_lr": [1.0]}, weights=weights)
        }
        assert len(names) == 2
        assert plain < names


class TestDescriptors:
    def test_the_composition(self, dataset):
        store = Store.open(dataset)
        rows = np.array([7, 2])
        shares = onehot(store.batch(rows))
        for row, line in zip(rows, shares, strict=True):
            numbers = store.crystal(row).atomic_numbers
            share = np.bincount(numbers, minlength=101) / len(numbers)
            assert np.allclose(line, share)

    def test_statistics_of_the_elements(self, dataset):
        from crysdistill.studies.descriptors import _properties

        store = Store.open(dataset)
        table = _properties().numpy()
        count = table.shape[1]
        for row in (3, 11):
            found = magpie(store.batch(np.array([row])))[0].numpy()
            numbers = store.crystal(row).atomic_numbers
            atoms = table[numbers]  # (N, P)
            mean = atoms.mean(axis=0)
            assert np.allclose(found[:count], mean)
            assert np.allclose(
                found[count : 2 * count], np.abs(atoms - mean).mean(axis=0)
            )
            assert np.allclose(found[2 * count : 3 * count], atoms.min(axis=0))
            assert np.allclose(found[3 * count : 4 * count], atoms.max(axis=0))
            assert np.allclose(found[4 * count : 5 * count], np.ptp(atoms, axis=0))
            share = np.bincount(numbers) / len(numbers)
            tail = found[6 * count :]
            assert tail[0] == (share > 0).sum()
            assert tail[1] == pytest.approx(np.sqrt((share**2).sum()))

    def test_the_fingerprint_does_not_depend_on_the_batch(self, dataset):
        store = Store.open(dataset)
        both = structure(store.batch(np.array([4, 9])))
        alone = structure(store.batch(np.array([9])))
        assert torch.isfinite(both).all()
        assert torch.allclose(both[1], alone[0], atol=1e-5)


class TestReadouts:
    def run(self, dataset, out, **more) -> dict:
        settings = {
            "target": Target("density"), "split": SplitSettings(20, 8, 8), **more,
        }  # fmt: skip
        readout(ReadoutConfig(dataset=dataset, out=out, **settings))
        return results(out)

    def expected(self, dataset, value: float) -> float:
        from crysdistill.splits import make_split

        store = Store.open(dataset)
        labels = store.property("density")
        split = make_split(store, SplitSettings(20, 8, 8), labels)
        typical = {"mean": np.mean, "median": np.median}[value](labels[split.train])
        return float(np.abs(labels[split.test] - typical).mean())

    @pytest.mark.parametrize("name", ["mean", "median"])
    @pytest.mark.parametrize("transform", ["none", "log10"])
    def test_constants_in_the_unit(self, dataset, tmp_path, name, transform):
        target = Target("density", transform=transform)
        found = self.run(dataset, tmp_path / "r", readout=name, target=target)
        assert found["test"] == pytest.approx(self.expected(dataset, name), rel=1e-5)

    @pytest.mark.parametrize("name", ["ridge", "forest", "boosted"])
    def test_models_on_a_logarithm(self, dataset, tmp_path, name):
        target = Target("density", transform="log10")
        found = self.run(dataset, tmp_path / "r", readout=name, target=target)
        plain = self.run(dataset, tmp_path / "p", readout=name)
        assert np.isfinite(found["test"])
        if name != "boosted":  # too few crystals for a tree
            assert found["test"] != plain["test"]

    @pytest.mark.parametrize("name", ["mean", "median", "ridge", "forest", "boosted"])
    def test_classes(self, dataset, tmp_path, name):
        target = Target("class", task="classification")
        split = SplitSettings(16, 12, 12)
        found = self.run(
            dataset, tmp_path / "r", readout=name, target=target, split=split
        )
        assert found["metric"] == "auc"
        assert 0 <= found["test"] <= 1
        if name in ("mean", "median"):
            assert found["test"] == 0.5

    def test_seeds_of_a_forest(self, dataset, tmp_path):
        same = [
            self.run(dataset, tmp_path / str(k), readout="forest", seed=seed)["test"]
            for k, seed in enumerate((0, 0, 1))
        ]
        assert same[0] == same[1] != same[2]


def test_shuffled_answers_go_to_other_crystals():
    first = torch.tensor([0, 2, 3])
    counts = torch.tensor([2, 1, 3])
    values = torch.arange(6.0)[:, None]
    atoms = Block(values, first, counts)
    crystals = Block(
        10 + torch.arange(3.0)[:, None], torch.arange(3), torch.ones(3).long()
    )
    rows = torch.arange(3)
    found = TeacherAnswers(rows, atoms, crystals).shuffled(0)
    told = found.gather_crystals(rows)[:, 0].tolist()
    assert sorted(told) == [10, 11, 12]
    assert all(value != 10 + row for row, value in enumerate(told))
    own = found.gather_atoms(rows)[:, 0].tolist()
    assert len(own) == 6
    start = 0
    for row, count in enumerate(counts.tolist()):
        owner = int(told[row]) - 10
        theirs = values[first[owner] : first[owner] + counts[owner], 0].tolist()
        part = own[start : start + count]
        assert part == [theirs[k % len(theirs)] for k in range(count)]
        start += count


def test_replacing_keeps_the_arm_plain():
    assert replace(make_arm("scratch"), repeats=3).features == {"any", "ensemble"}
