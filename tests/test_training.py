"""Runs: their files, their interruption, and no leak of test labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.locks import locked
from crysdistill.splits import make_split
from crysdistill.store.store import Store
from crysdistill.training import distill as distilling
from crysdistill.training import pretrain as pretraining
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import FinetunePlan, finetune
from crysdistill.training.pretrain import pretrain
from crysdistill.training.runs import CONTENTS
from crysdistill.training.settings import (
    FreezeSettings,
    OptimizerSettings,
    SplitSettings,
)
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_encoder, load_predictor, read_header
from tests.toy_runs import (
    SHORT,
    history,
    pretraining_config,
    results,
    rows,
    same,
    shared,
    training_config,
    tuning,
    weights_of,
)
from tests.toy_stores import SMALL_ENCODER, labelled, write_store


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    crystals = labelled(40)
    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    return write_store(path, crystals, symmetry="fast")


@pytest.fixture
def config(dataset, tmp_path) -> TrainConfig:
    return training_config(dataset, tmp_path / "run")


@pytest.fixture(scope="module")
def pretrained(dataset, tmp_path_factory) -> Path:
    """An encoder after a short pretraining."""
    return pretrain(pretraining_config(dataset, tmp_path_factory.mktemp("p") / "run"))


# ------------------------------------------------------------------ the run directory


class TestRunDirectory:
    def test_every_promised_file(self, config):
        assert train(config) == config.out / "weights.safetensors"
        found = {path.name for path in config.out.iterdir()}
        assert found == set(CONTENTS) - {
            "teacher",
            "diverged.json",
            "candidates.csv",
            "excluded.json",
            "probes.png",
        }
        assert any((config.out / "tensorboard").iterdir())
        assert len(rows(config.out / "split.csv")) == 40
        environment = json.loads((config.out / "environment.json").read_text())
        assert environment["torch"] == torch.__version__.split("+")[0] or (
            environment["torch"] == torch.__version__
        )
        assert "epochs: 3" in (config.out / "config.yaml").read_text()

    def test_one_process_at_a_time(self, config):
        train(config)
        with (
            locked(config.out.with_name(".run.lock"), "held"),
            pytest.raises(InputError, match="another process trains there; wait, or"),
        ):
            train(replace(config, overwrite=True))
        assert (config.out / "weights.safetensors").exists()

    def test_predictions_are_those_of_the_weights(self, config):
        store = Store.open(config.dataset)
        predictor = load_predictor(train(config))
        row_of = {name: row for row, name in enumerate(store.material_ids)}
        table = rows(config.out / "predictions.csv")
        asked = [row_of[line["material_id"]] for line in table]
        assert len(asked) == 8
        expected = predictor.predict(store.batch(asked))
        written = torch.tensor([float(line["prediction"]) for line in table])
        assert torch.equal(written, expected)
        truth = [float(line["truth"]) for line in table]
        assert np.allclose(truth, store.property("density")[asked])
        mae = np.abs(expected.numpy() - store.property("density")[asked]).mean()
        assert results(config.out)["test"] == pytest.approx(mae, rel=1e-5)
        subset = {r["material_id"]: r["subset"] for r in rows(config.out / "split.csv")}
        assert {subset[line["material_id"]] for line in table} == {"test"}

    def test_the_best_epoch_is_kept(self, config):
        config.trainer = replace(SHORT, epochs=6)
        config.optimizer = OptimizerSettings(lr=0.05, schedule="constant")
        train(config)
        validation = history(config.out, "val_mae")
        assert len(validation) == 6
        assert min(validation) < validation[-1]  # otherwise the test proves nothing
        assert results(config.out)["val"] == pytest.approx(min(validation), rel=1e-5)

    def test_an_earlier_run_is_not_overwritten(self, config):
        train(config)
        before = weights_of(config.out / "weights.safetensors")
        message = "holds an earlier run; give another `out`, or `resume=true` to go on"
        with pytest.raises(InputError, match=message):
            train(config)
        config.overwrite, config.seed = True, 5
        train(config)
        after = weights_of(config.out / "weights.safetensors")
        assert any(not torch.equal(before[n], after[n]) for n in before)

    def test_something_else_is_never_overwritten(self, config):
        config.out.mkdir()
        (config.out / "thesis.tex").write_text("years of work")
        config.overwrite = True
        with pytest.raises(InputError, match="is not a run directory, so it will not"):
            train(config)
        assert (config.out / "thesis.tex").exists()

    def test_the_same_run_twice_gives_the_same_bits(self, config):
        first = train(config)
        second = train(replace(config, out=config.out.with_name("again")))
        assert same(first, second)
        assert not same(
            first, train(replace(config, out=config.out.with_name("other"), seed=1))
        )


# --------------------------------------------------------------------- no leakage


class TestTestLabelsStayUnseen:
    def changed(self, dataset, tmp_path, subset: str) -> Path:
        """A store with the same rows, and other labels in one subset."""
        store = Store.open(dataset)
        sizes = SplitSettings(train=24, val=8, test=8)
        split = make_split(store, sizes, store.property("density"))
        crystals = labelled(40)
        for row in getattr(split, subset):
            known = {**crystals[row].properties, "density": 5.0 + row}
            crystals[row] = replace(crystals[row], properties=known)
        return write_store(tmp_path / "changed.h5", crystals, symmetry="fast")

    def test_weights_do_not_depend_on_test_labels(self, config, tmp_path):
        first = train(config)
        other = self.changed(config.dataset, tmp_path, "test")
        second = train(
            replace(config, dataset=other, out=config.out.with_name("other"))
        )
        assert same(first, second)
        assert read_header(first).normalizer == read_header(second).normalizer
        assert (
            results(config.out)["test"]
            != results(config.out.with_name("other"))["test"]
        )

    def test_only_the_choice_of_the_epoch_depends_on_validation_labels(
        self, config, tmp_path
    ):
        first = train(config)
        other = self.changed(config.dataset, tmp_path, "val")
        second = train(
            replace(config, dataset=other, out=config.out.with_name("other"))
        )
        assert read_header(first).normalizer == read_header(second).normalizer
        assert history(config.out, "train_loss") == history(
            config.out.with_name("other"), "train_loss"
        )

    def test_the_scale_is_that_of_the_training_labels(self, config):
        train(config)
        store = Store.open(config.dataset)
        subset = {r["material_id"]: r["subset"] for r in rows(config.out / "split.csv")}
        known = [
            value
            for name, value in zip(
                store.material_ids, store.property("density"), strict=True
            )
            if subset[name] == "train"
        ]
        scale = read_header(config.out / "weights.safetensors").normalizer
        assert scale.mean == pytest.approx(np.mean(known))
        assert scale.std == pytest.approx(np.std(known, ddof=1))


# ---------------------------------------------------------------- teachers, freezing


class TestDistillation:
    def test_the_teacher_is_frozen(self, config, pretrained):
        before = pretrained.read_bytes()
        distill(DistillConfig(**shared(config), teacher=str(pretrained)))
        assert pretrained.read_bytes() == before
        names = weights_of(config.out / "weights.safetensors")
        assert not [name for name in names if "teacher" in name or "projector" in name]

    def test_only_training_crystals_meet_the_teacher(
        self, config, pretrained, monkeypatch
    ):
        """The teacher is asked about other crystals only after training."""
        asked = []
        real = distilling.answers_for

        def watching(teacher, store, rows, **options):
            asked.append((rows.tolist(), (config.out / "metrics.csv").exists()))
            return real(teacher, store, rows, **options)

        monkeypatch.setattr(distilling, "answers_for", watching)
        distill(DistillConfig(**shared(config), teacher=str(pretrained)))
        store = Store.open(config.dataset)
        subset = {r["material_id"]: r["subset"] for r in rows(config.out / "split.csv")}
        (before, begun), (after, ended) = asked
        assert {subset[store.material_ids[row]] for row in before} == {"train"}
        assert {subset[store.material_ids[row]] for row in after} == {"val", "test"}
        assert (begun, ended) == (False, True)

    def test_alpha_0_is_plain_training(self, config, pretrained):
        plain = train(replace(config, out=config.out.with_name("plain")))
        config.out = config.out.with_name("distilled")
        helped = DistillConfig(**shared(config), teacher=str(pretrained), alpha=0.0)
        assert same(distill(helped), plain)

    def test_the_teacher_matters(self, config, pretrained):
        made = []
        for teacher in (str(pretrained), "random"):
            out = config.out.with_name(f"by-{Path(teacher).stem}")
            given = shared(replace(config, out=out))
            encoder = {**SMALL_ENCODER, "normalize": True}
            made.append(
                distill(
                    DistillConfig(**given, teacher=teacher, teacher_encoder=encoder)
                )
            )
            assert "train_embedding" in rows(out / "metrics.csv")[0]
        assert not same(*made)

    def test_another_width_needs_no_word(self, config, pretrained):
        config.encoder = {**SMALL_ENCODER, "width": 6}
        weights = distill(DistillConfig(**shared(config), teacher=str(pretrained)))
        assert load_predictor(weights).encoder.width == 6

    def test_alpha_out_of_range(self, config):
        with pytest.raises(
            InputError, match="`alpha` is 2 but must be between 0 and 1"
        ):
            DistillConfig(**shared(config), teacher="random", alpha=2)


class TestFinetuning:
    def run(self, config, pretrained, **more) -> tuple[dict, dict]:
        """Return the encoder's tensors before and after fine-tuning."""
        weights = finetune(tuning(config, pretrained, **more))
        before, after = weights_of(pretrained), weights_of(weights)
        return before, {n: t for n, t in after.items() if n.startswith("encoder.")}

    def changed(self, before: dict, after: dict) -> set[str]:
        assert before.keys() == after.keys()
        return {n for n in before if not torch.equal(before[n], after[n])}

    def test_frozen_all(self, config, pretrained):
        frozen = FreezeSettings(convolutions="all")
        assert self.changed(*self.run(config, pretrained, freeze=frozen)) == set()
        report = results(config.out)
        assert report["convolutions"] == 2
        assert report["trainable_parameters"] == 8 * 8 + 8 + 8 + 1
        assert report["fixed_batch_norms"] > 0

    def test_frozen_one(self, config, pretrained):
        moved = self.changed(
            *self.run(config, pretrained, freeze=FreezeSettings(convolutions=1))
        )
        encoder = load_encoder(pretrained)
        blocks = list(encoder.blocks())
        frozen = [name for b in blocks[:2] for name in self.names_of(encoder, b)]
        assert frozen
        assert not moved & set(frozen)
        assert moved & set(self.names_of(encoder, blocks[2]))

    def names_of(self, encoder, stage) -> list[str]:
        inside = {id(t) for t in stage.state_dict(keep_vars=True).values()}
        return [
            f"encoder.{name}"
            for name, tensor in encoder.state_dict(keep_vars=True).items()
            if id(tensor) in inside
        ]

    def test_adaptive_batch_norms_move_and_nothing_else(self, config, pretrained):
        frozen = FreezeSettings(convolutions="all", batch_norm="adaptive")
        moved = self.changed(*self.run(config, pretrained, freeze=frozen))
        assert moved
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        assert all(name.endswith(statistics) for name in moved)
        assert results(config.out)["fixed_batch_norms"] == 0

    def test_nothing_frozen(self, config, pretrained):
        before, after = self.run(config, pretrained)
        moved = self.changed(before, after)
        assert moved == {n for n in before if n != "encoder.element_table"}

    def test_more_than_there_are(self, config, pretrained):
        with pytest.raises(
            InputError, match="`convolutions` is 7 but the encoder has 2"
        ):
            self.run(config, pretrained, freeze=FreezeSettings(convolutions=7))

    def test_what_is_not_kept_starts_anew(self, dataset, config, pretrained):
        plan = FinetunePlan(tuning(config, pretrained, keep=1))
        torch.manual_seed(0)
        begun, known = plan.encoder(Store.open(dataset)), load_encoder(pretrained)

        def alike(one, other) -> bool:
            pairs = zip(one.parameters(), other.parameters(), strict=True)
            return all(torch.equal(a, b) for a, b in pairs)

        blocks = zip(begun.blocks(), known.blocks(), strict=True)
        assert [alike(*pair) for pair in blocks] == [True, True, False]
        report = FreezeSettings(convolutions=1)
        before, after = self.run(config, pretrained, keep=1, freeze=report)
        assert self.changed(before, after)
        assert results(config.out)["convolutions"] == 1

    def test_what_starts_anew_is_not_frozen(self, config, pretrained):
        with pytest.raises(
            InputError,
            match=r"`freeze.convolutions` is 2 but `keep` is 1; convolutions with",
        ):
            tuning(config, pretrained, keep=1, freeze=FreezeSettings(convolutions=2))
        with pytest.raises(InputError, match="`keep` is 9 but the encoder has 2 conv"):
            self.run(config, pretrained, keep=9)

    def test_another_pooling(self, dataset, config, pretrained):
        """Pretraining averages unit vectors; a predictor does so only if told to."""
        store = Store.open(dataset)
        plain = FinetunePlan(tuning(config, pretrained)).encoder(store)
        assert not plain.settings["normalize"]
        told = tuning(config, pretrained, encoder={"normalize": True})
        assert FinetunePlan(told).encoder(store).settings["normalize"]
        named = tuning(config, pretrained, encoder={"name": "cgcnn"})
        assert not FinetunePlan(named).encoder(store).settings["normalize"]
        other = tuning(config, pretrained, encoder={"name": "schnet"})
        with pytest.raises(InputError, match=r"`encoder.name` is schnet but .* holds"):
            FinetunePlan(other).encoder(store)
        wider = tuning(config, pretrained, encoder={"width": 9})
        with pytest.raises(InputError, match="`encoder` changes the shapes of weights"):
            FinetunePlan(wider).encoder(store)

    def test_a_slower_encoder(self, config, pretrained):
        fast = self.run(config, pretrained)
        slow = self.run(
            replace(config, out=config.out.with_name("slow")),
            pretrained,
            encoder_lr=1e-3,
        )
        name = "encoder.embedding.weight"
        steps = [
            (after[name] - before[name]).abs().max() for before, after in (fast, slow)
        ]
        assert steps[1] < 0.1 * steps[0]
        with pytest.raises(InputError, match="`encoder_lr` is 0 but must be positive"):
            tuning(config, pretrained, encoder_lr=0)


def test_weights_of_another_graph(config, tmp_path, pretrained):
    graph = GraphSettings(cutoff=6.0, max_neighbors=5)
    other = write_store(tmp_path / "other.h5", labelled(40), graph=graph)
    config.dataset = other
    with pytest.raises(InputError, match=r"learned on another graph.*--graph shells"):
        finetune(tuning(config, pretrained))


# --------------------------------------------------------------------------- targets


def test_classification_end_to_end(config):
    config.target = Target("class", task="classification")
    config.split = SplitSettings(train=20, val=10, test=10)
    config.trainer = replace(SHORT, epochs=20)
    config.optimizer = OptimizerSettings(lr=0.02)
    weights = train(config)
    found = results(config.out)
    assert found["metric"] == "auc"
    assert 0.8 < found["val"] <= 1
    assert found["val"] == pytest.approx(max(history(config.out, "val_auc")))
    table = rows(config.out / "predictions.csv")
    probabilities = [float(line["prediction"]) for line in table]
    assert all(0 <= p <= 1 for p in probabilities)
    assert {float(line["truth"]) for line in table} == {0.0, 1.0}
    ones = [p for p, r in zip(probabilities, table, strict=True) if float(r["truth"])]
    zeros = [
        p for p, r in zip(probabilities, table, strict=True) if not float(r["truth"])
    ]
    pairs = [(a > b) + 0.5 * (a == b) for a in ones for b in zeros]
    assert found["test"] == pytest.approx(np.mean(pairs))
    assert read_header(weights).target.task == "classification"


def several(config, tmp_path) -> None:
    """Give a run three targets: a number, two classes, three classes, with gaps."""
    crystals = labelled(60)
    for row, crystal in enumerate(crystals):
        known = {**crystal.properties, "atoms": float(row % 3)}
        if row % 4 == 0:
            del known["density"]
        if row % 5 == 0:
            del known["class"]
        crystals[row] = replace(crystal, properties=known)
    config.dataset = write_store(tmp_path / "several.h5", crystals)
    config.target = None
    config.targets = [
        Target("density", "1/Å³"),
        Target("class", task="classification"),
        Target("atoms", task="classification"),
    ]
    config.split = SplitSettings(train=36, val=12, test=12)


def test_several_targets(config, tmp_path, capsys):
    several(config, tmp_path)
    config.trainer = replace(SHORT, epochs=8)
    weights = train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "density, class, atoms from 36 crystals" in said
    found = results(config.out)
    assert found["metric"] == "score"
    assert {n: t["metric"] for n, t in found["targets"].items()} == {
        "density": "mae",
        "class": "auc",
        "atoms": "accuracy",
    }
    table = rows(config.out / "predictions.csv")
    assert list(table[0])[:3] == ["material_id", "density_truth", "density_prediction"]
    pairs = [(r["density_truth"], r["density_prediction"]) for r in table]
    errors = [abs(float(a) - float(b)) for a, b in pairs if a]
    assert 0 < len(errors) < len(table)
    mae = found["targets"]["density"]["test"]
    assert mae == pytest.approx(np.mean(errors), rel=1e-5)
    right = [r["atoms_truth"] == r["atoms_prediction"] for r in table]
    assert 0 <= sum(right) <= len(right)
    best = min(history(config.out, "val_score"))
    assert found["val"] == pytest.approx(best, rel=1e-4)
    # Each part of the loss is logged and falls.
    for name in ("train_density", "train_class", "train_atoms"):
        assert len(history(config.out, name)) == 8
    header = read_header(weights)
    assert [t.name for t in header.targets] == ["density", "class", "atoms"]
    assert [n.classes for n in header.normalizers] == [0, 2, 3]
    predictor = load_predictor(weights)
    assert predictor.predict(Store.open(config.dataset).batch([0, 1])).shape == (2, 3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([Target("density"), Target("density")], "`targets` names `density` twice"),
        ([Target("density"), Target("gap")], "no property `gap`"),
    ],
)
def test_targets_that_cannot_be(config, targets, message):
    with pytest.raises(InputError, match=message):
        train(replace(config, target=None, targets=targets))
    assert not config.out.exists()


def test_one_or_several_and_not_both(config):
    with pytest.raises(InputError, match="`target` and `targets` are both given; put"):
        replace(config, targets=[Target("density")])
    with pytest.raises(InputError, match=r"`target.name` is missing; give it in the c"):
        replace(config, target=None)


def test_a_target_that_nobody_can_judge(config, tmp_path):
    several(config, tmp_path)
    store = Store.open(config.dataset)
    labels = store.property("density")
    split = make_split(store, config.split, np.zeros(len(store)))
    crystals = list(store.crystals())
    for row in split.val:
        known = {k: v for k, v in crystals[row].properties.items() if k != "density"}
        crystals[row] = replace(crystals[row], properties=known)
    assert np.isfinite(labels[split.val]).any()
    config.dataset = write_store(tmp_path / "gaps.h5", crystals)
    with pytest.raises(InputError, match="no `val` crystal has a label `density`; enl"):
        train(config)


def test_a_class_that_no_training_crystal_has(config, tmp_path):
    crystals = [
        replace(c, properties={"kind": float(k % 2)})
        for k, c in enumerate(labelled(40))
    ]
    config.dataset = write_store(tmp_path / "kinds.h5", crystals)
    store = Store.open(config.dataset)
    split = make_split(store, config.split, store.property("kind"))
    row = int(split.test[0])
    crystals[row] = replace(crystals[row], properties={"kind": 2.0})
    config.dataset = write_store(tmp_path / "more.h5", crystals)
    config.target = Target("kind", task="classification")
    with pytest.raises(InputError, match="`test` has class 2 of `kind`, which no trai"):
        train(config)


def test_one_class_alone_has_no_auc(config, tmp_path):
    crystals = [replace(c, properties={"class": 1.0}) for c in labelled(40)]
    crystals[0] = replace(crystals[0], properties={"class": 0.0})
    config.dataset = write_store(tmp_path / "one.h5", crystals)
    config.target = Target("class", task="classification")
    with pytest.raises(
        InputError, match=r"all `(train|val)` crystals have `class` 1; en"
    ):
        train(config)


def test_a_logarithmic_target_comes_back_in_its_unit(config, tmp_path):
    crystals = [
        replace(c, properties={"modulus": 10 ** (1 + 2 * c.properties["density"])})
        for c in labelled(40)
    ]
    config.dataset = write_store(tmp_path / "log.h5", crystals)
    config.target = Target("modulus", "GPa", transform="log10")
    config.trainer = replace(SHORT, epochs=10)
    weights = train(config)
    known = {c.material_id: c.properties["modulus"] for c in crystals}
    table = rows(config.out / "predictions.csv")
    for line in table:
        assert float(line["truth"]) == pytest.approx(known[line["material_id"]])
        assert float(line["prediction"]) > 5
    errors = [abs(float(r["truth"]) - float(r["prediction"])) for r in table]
    assert results(config.out)["test"] == pytest.approx(np.mean(errors), rel=1e-4)
    scale = read_header(weights).normalizer
    assert 1 < scale.mean < 5  # of the logarithm


def test_labels_that_are_not_known_are_left_out(config, tmp_path, capsys):
    crystals = labelled(50)
    for row in range(0, 50, 5):
        crystals[row] = replace(crystals[row], properties={"class": 1.0})
    config.dataset = write_store(tmp_path / "gaps.h5", crystals)
    train(config)
    assert "10 have no `density`" in " ".join(capsys.readouterr().out.split())
    used = {r["material_id"] for r in rows(config.out / "split.csv")}
    assert used == {c.material_id for c in crystals if "density" in c.properties}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": Target("densty")}, "no property `densty`.*did you mean `density`"),
        (
            {"target": Target("density", task="classification")},
            "but a class must be a whole number",
        ),
        ({"split": SplitSettings(train=90, val=8, test=8)}, "only 40 crystals have a"),
        ({"split": SplitSettings(train=24, val=0, test=8)}, "no crystal for `val`"),
        ({"encoder": {"name": "cgcn"}}, "cgcn.*did you mean `cgcnn`"),
        ({"dataset": Path("nowhere.h5")}, "no such store"),
    ],
)
def test_bad_settings_leave_no_folder_behind(config, change, message):
    with pytest.raises(InputError, match=message):
        train(replace(config, **change))
    assert not config.out.exists()


def test_a_split_file(config, tmp_path):
    names = Store.open(config.dataset).material_ids
    lines = [f"{n},{'train' if i < 20 else 'val' if i < 30 else 'test'}"
             for i, n in enumerate(names)]  # fmt: skip
    path = tmp_path / "split.csv"
    path.write_text("\n".join(["material_id,subset", *lines]))
    config.split = SplitSettings(file=str(path), train_subset=12)
    train(config)
    subset = {r["material_id"]: r["subset"] for r in rows(config.out / "split.csv")}
    assert {n for n, s in subset.items() if s == "test"} == set(names[30:])
    chosen = {n for n, s in subset.items() if s == "train"}
    assert len(chosen) == 12 <= len(set(names[:20]))
    assert chosen < set(names[:20])
    assert results(config.out)["labels"] == 12


def test_no_test_crystals(config):
    config.split = SplitSettings(train=24, val=8, test=0)
    train(config)
    assert not (config.out / "predictions.csv").exists()
    assert "test" not in results(config.out)


# ----------------------------------------------------------------------- pretraining


class TestPretraining:
    def test_the_folder_and_the_numbers(self, dataset, tmp_path):
        weights = pretrain(pretraining_config(dataset, tmp_path / "run"))
        numbers = results(tmp_path / "run")["numbers"]
        assert numbers
        assert all(np.isfinite(value) for value in numbers.values())
        chances = [name for name in numbers if name.endswith("_chance")]
        assert all(name.removesuffix("_chance") in numbers for name in chances)
        assert len(history(tmp_path / "run", "val_loss")) == 3
        header = read_header(weights)
        assert header.kind == "encoder"
        assert header.provenance.overlap == "unknown"
        assert header.provenance.corpus == Store.open(dataset).hash

    def test_overlapping_crystals_are_left_out(self, tmp_path, monkeypatch):
        corpus = labelled(40)
        planted = [replace(c, material_id=f"copy-{c.material_id}") for c in corpus[5:9]]
        corpus_path = write_store(tmp_path / "corpus.h5", corpus, symmetry="fast")
        other = write_store(tmp_path / "judge.h5", [*planted, *labelled(4, first=100)])
        seen: set[str] = set()
        real = pretraining.BatchLoader

        def watching(store, rows, *rest, **options):
            seen.update(store.material_ids[row] for row in rows)
            return real(store, rows, *rest, **options)

        monkeypatch.setattr(pretraining, "BatchLoader", watching)
        weights = pretrain(
            pretraining_config(corpus_path, tmp_path / "run", exclude=[other])
        )
        assert not seen & {c.material_id for c in corpus[5:9]}
        assert len(seen) == 36
        assert read_header(weights).provenance.overlap == "clean"
        assert "clean of judge.h5 (4 corpus" in results(tmp_path / "run")["overlap"]

    def test_labels_are_not_read(self, dataset, tmp_path):
        blank = [replace(c, properties={}) for c in labelled(40)]
        without = write_store(tmp_path / "blank.h5", blank, symmetry="fast")
        first = pretrain(pretraining_config(dataset, tmp_path / "a"))
        second = pretrain(pretraining_config(without, tmp_path / "b"))
        assert same(first, second)

    def test_with_properties_beside_what_needs_no_labels(self, dataset, tmp_path):
        objectives = {
            "fingerprint": {},
            "properties": {
                "targets": [Target("density"), Target("class", task="classification")]
            },
        }
        trainer = replace(SHORT, epochs=15)
        out = tmp_path / "run"
        weights = pretrain(
            pretraining_config(dataset, out, objectives=objectives, trainer=trainer)
        )
        assert read_header(weights).kind == "encoder"
        numbers = results(out)["numbers"]
        assert numbers["density_mae"] < numbers["density_mae_chance"]
        assert numbers["class_auc_chance"] == 0.5
        assert {"fingerprint_r2", "class_auc"} <= numbers.keys()
        losses = history(out, "train_properties")
        assert losses[-1] < losses[0]

    def test_properties_that_the_corpus_lacks(self, dataset, tmp_path):
        objectives = {"properties": {"targets": [{"name": "gapp"}]}}
        config = pretraining_config(dataset, tmp_path / "run", objectives=objectives)
        with pytest.raises(InputError, match="no property `gapp`; it has: "):
            pretrain(config)
        assert not (tmp_path / "run").exists()

    def test_bad_settings(self, dataset, tmp_path):
        with pytest.raises(
            InputError, match="`objectives` is empty; name at least one"
        ):
            pretraining_config(dataset, tmp_path, objectives={})
        with pytest.raises(InputError, match="`held_out` is 0 but must be between 0"):
            pretraining_config(dataset, tmp_path, held_out=0)
        with pytest.raises(InputError, match="`subset` is -5 but must be at least 1"):
            pretraining_config(dataset, tmp_path, subset=-5)
        few = write_store(tmp_path / "few.h5", labelled(3), symmetry="fast")
        with pytest.raises(
            InputError, match="leaves 1 crystals to learn from; use a la"
        ):
            pretrain(pretraining_config(few, tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_pretraining_refuses_objectives_that_have_nothing_to_say(tmp_path):
    store = write_store(tmp_path / "plain.h5", labelled(12), symmetry=None)
    with pytest.raises(
        InputError,
        match=r"no space groups .*: objectives.space_group=false objectives.crystal",
    ):
        pretrain(pretraining_config(store, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    objectives = {"fingerprint": {"weight": 1.0}}
    assert pretrain(
        pretraining_config(store, tmp_path / "run", objectives=objectives)
    ).exists()
