"""A test set from another store: the right crystals and numbers, and each refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crysdistill.corpus.build import build
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.splits import Split
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.training.across import find_shared, open_other
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import finetune
from crysdistill.training.fit import FitConfig, fit
from crysdistill.training.settings import (
    AcrossSettings,
    SplitSettings,
    TrainerSettings,
)
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_predictor, read_header
from tests.toy_runs import DENSITY, results, rows, shared, tuning
from tests.toy_stores import labelled, write_store

# `conftest.dataset` has random-0 to random-39. The other store has ten new crystals,
# five with the same ids, and five that have other ids and doubled cells.
NEW, BY_ID, BY_STRUCTURE = range(40, 50), range(5), range(5, 10)


def doubled(crystal: Crystal, name: str) -> Crystal:
    """The same crystal in a cell of twice the length, under another name."""
    halves = crystal.frac_coords * [0.5, 1, 1]
    return replace(
        crystal,
        material_id=name,
        atomic_numbers=np.tile(crystal.atomic_numbers, 2),
        frac_coords=np.concatenate([halves, halves + np.array([0.5, 0, 0])]),
        cell=crystal.cell * [[2], [1], [1]],
    )


def measured(crystal: Crystal) -> Crystal:
    """The crystal with its labels renamed and its density a fifth larger."""
    known = crystal.properties
    return replace(
        crystal,
        properties={"measured": 1.2 * known["density"], "kind": known["class"]},
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    known = {n: labelled(1, n)[0] for n in [*NEW, *BY_ID, *BY_STRUCTURE]}
    crystals = [known[n] for n in [*NEW, *BY_ID]]
    crystals += [doubled(known[n], f"again-{n}") for n in BY_STRUCTURE]
    found = [measured(crystal) for crystal in crystals]
    found[0] = replace(found[0], properties={"kind": 0.0})
    return write_store(tmp_path_factory.mktemp("other") / "other.h5", found)


def across(other: Path, **more) -> AcrossSettings:
    return AcrossSettings(dataset=other, properties=("measured",), **more)


def held(split: Path) -> set[int]:
    """The numbers of the crystals used for training or validation."""
    return {
        int(r["material_id"].partition("-")[2])
        for r in rows(split)
        if r["subset"] in ("train", "val")
    }


def names_of(numbers) -> set[str]:
    return {
        f"again-{n}" if n in BY_STRUCTURE else f"random-{n}"
        for n in numbers
        if n != NEW[0]  # it has no label
    }


def test_only_crystals_that_training_has_not_are_tested(config, other, capsys):
    train(replace(config, test=across(other)))
    taken = held(config.out / "split.csv")
    both = {n for n in [*BY_ID, *BY_STRUCTURE] if n in taken}
    assert 0 < len(both) < 10
    tested = [*NEW, *({*BY_ID, *BY_STRUCTURE} - both)]
    predicted = rows(config.out / "predictions.csv")
    assert {r["material_id"] for r in predicted} == names_of(tested)

    found = results(config.out)
    errors = [abs(float(r["truth"]) - float(r["prediction"])) for r in predicted]
    assert found["test"] == pytest.approx(np.mean(errors), rel=1e-5)
    truth = {r["material_id"]: float(r["truth"]) for r in predicted}
    expected = 1.2 * labelled(1, 41)[0].properties["density"]
    assert truth["random-41"] == pytest.approx(expected, rel=1e-6)
    assert found["test_set"] == {
        "store": str(other),
        "hash": Store.open(other).hash,
        "properties": ["measured"],
        "crystals": len(predicted),
        "shared": len(both),
        "shared_kept": False,
    }
    assert found["overlap"].startswith("clean")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"test on {len(predicted)} crystals of {other}; {len(both)} others, which the "
        "training or validation set also holds, are left out"
    ) in said
    assert "on test within" in said


def test_the_numbers_are_those_of_the_weights(config, other):
    predictor = load_predictor(train(replace(config, test=across(other))))
    store = Store.open(other)
    row_of = {name: row for row, name in enumerate(store.material_ids)}
    predicted = rows(config.out / "predictions.csv")
    batch = store.batch([row_of[r["material_id"]] for r in predicted])
    answers = predictor.predict(batch).numpy()
    said = [float(r["prediction"]) for r in predicted]
    np.testing.assert_allclose(answers, said, rtol=1e-5)


def test_the_own_test_crystals_give_the_number_within(config, other):
    train(config)
    alone = results(config.out)
    train(replace(config, test=across(other), overwrite=True))
    found = results(config.out)
    assert found["within"] == pytest.approx(alone["test"])
    assert found["val"] == pytest.approx(alone["val"])
    split = SplitSettings(train=24, val=8, test=0)
    train(replace(config, test=across(other), split=split, overwrite=True))
    assert "within" not in results(config.out)
    assert "test" in results(config.out)


def test_shared_crystals_can_be_kept_and_are_marked(config, other, capsys):
    train(replace(config, test=across(other, keep_shared=True)))
    found = results(config.out)
    assert found["test_set"]["crystals"] == 19
    assert found["test_set"]["shared_kept"]
    both = found["test_set"]["shared"]
    assert found["overlap"] == (
        f"leaked (the training or validation set holds {both} of the 19 test crystals "
        "with their labels); before this run: clean (no pretraining: nothing was seen "
        "but labels)"
    )
    weights = config.out / "weights.safetensors"
    assert read_header(weights).provenance.overlap == "leaked"
    said = " ".join(capsys.readouterr().out.split())
    assert f"{both} of them, which the training or validation set also holds" in said


def test_one_crystal_is_compared_with_training_and_validation_only(config, other):
    store = Store.open(config.dataset)
    held_out = open_other(across(other), [DENSITY], store)
    row_of = {name: row for row, name in enumerate(store.material_ids)}
    trained, chosen = row_of["random-7"], row_of["random-2"]
    rest = np.setdiff1d(np.arange(len(store)), [trained, chosen])
    split = Split(np.array([trained]), np.array([chosen]), rest)
    ids = held_out.store.material_ids
    found = {ids[row] for row in find_shared(held_out, store, split)}
    assert found == {"again-7", "random-2"}


@pytest.mark.parametrize("verb", ["finetune", "distill", "fit"])
def test_every_verb_can_do_it(verb, config, other, pretrained, tmp_path):
    given = replace(config, test=across(other), out=tmp_path / verb)
    if verb == "finetune":
        finetune(tuning(given, pretrained, interpolate=True))
    elif verb == "distill":
        distill(DistillConfig(**shared(given), teacher="random"))
    else:
        trainer = TrainerSettings(epochs=1, accelerator="cpu", progress=False)
        fit(FitConfig(**{**shared(given), "weights": [], "trainer": trainer}))
    found = results(given.out)
    predicted = rows(given.out / "predictions.csv")
    assert len(predicted) == found["test_set"]["crystals"]
    errors = [abs(float(r["truth"]) - float(r["prediction"])) for r in predicted]
    assert found["test"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert {"val", "within"} <= found.keys()
    if verb == "finetune":  # nobody has compared the corpus with the other store
        assert found["overlap"].startswith("unknown")
    if verb == "fit":  # rejected candidates never see the test set
        assert "test_set" not in results(given.out / "scratch-0")


def test_several_targets_have_a_property_each(config, other):
    kind = Target("class", task="classification")
    settings = replace(across(other), properties=("measured", "kind"))
    targets = [DENSITY, kind]
    train(replace(config, target=None, targets=targets, test=settings))
    found = results(config.out)
    assert found["targets"]["class"]["test"] > 0
    assert list(rows(config.out / "predictions.csv")[0]) == [
        "material_id", "density_truth", "density_prediction", "class_truth",
        "class_prediction",
    ]  # fmt: skip


# ---------------------------------------------------------------------- refusals


def refusal(config: TrainConfig, settings: AcrossSettings, **more) -> str:
    given = replace(config, test=settings, **more)
    with pytest.raises(InputError) as error:
        train(given)
    assert not config.out.exists()
    return str(error.value)


@pytest.mark.parametrize(
    "given", [{"properties": ("measured",)}, {"keep_shared": True}]
)
def test_settings_without_a_store(given):
    (name,) = given
    with pytest.raises(InputError) as error:
        AcrossSettings(**given)
    assert str(error.value) == (
        f"`test.{name}` needs `test.dataset`, the store to test on"
    )


def test_a_file_that_is_not_there(config, tmp_path):
    said = refusal(config, AcrossSettings(tmp_path / "no.h5"))
    assert said.startswith(f"{tmp_path / 'no.h5'}: no such")


def test_a_property_under_another_name(config, other):
    assert refusal(config, AcrossSettings(other)) == (
        f"{other}: no property `density`; it has: kind, measured"
    )


def test_too_few_properties(config, other):
    kind = Target("class", task="classification")
    said = refusal(config, across(other), target=None, targets=[DENSITY, kind])
    assert said == (
        "`test.properties` names 1 but there are 2 targets; name one for each target, "
        "in their order"
    )


def test_another_graph_and_the_command_that_mends_it(config, tmp_path):
    graph = GraphSettings(5.0, 4, "nearest")
    path = write_store(tmp_path / "n.h5", labelled(6, 60), graph)
    said = refusal(config, AcrossSettings(path))
    assert said == (
        f"`test.dataset` {path} holds another graph (`nearest` within 5 Å, 4 "
        f"neighbours) than {config.dataset} (`shells` within 7 Å, 6 neighbours); build "
        f"it again with `crysdistill build {path} -o {tmp_path / 'n-shells.h5'} "
        "--graph shells --cutoff 7 --max-neighbors 6`"
    )
    build([path], tmp_path / "n-shells.h5", graph=GraphSettings(7.0, 6), workers=1,
          symmetry=None, progress=False)  # fmt: skip
    train(replace(config, test=AcrossSettings(tmp_path / "n-shells.h5")))
    assert results(config.out)["test_set"]["crystals"] == 6


def test_a_label_that_cannot_be_learned(config, tmp_path):
    crystals = labelled(3, 60)
    crystals[1] = replace(crystals[1], properties={"density": -1.0})
    path = write_store(tmp_path / "n.h5", crystals)
    target = Target("density", transform="log10")
    said = refusal(config, AcrossSettings(path), target=target)
    assert said == ("random-61: density is -1.0 but `log10` needs positive values")


def test_a_store_whose_crystals_all_train(config, dataset):
    split = SplitSettings(train=30, val=10, test=0)
    assert refusal(config, AcrossSettings(dataset), split=split) == (
        f"all 40 labelled crystals of {dataset} are also in the training or "
        "validation set; take fewer to train on, or set `test.keep_shared=true` to "
        "test on them nevertheless"
    )


def test_no_label_is_left(config, tmp_path):
    crystals = [replace(c, properties={"density": 1.0, "x": 1.0}) for c in labelled(2)]
    crystals += [replace(c, properties={"x": 1.0}) for c in labelled(3, 60)]
    path = write_store(tmp_path / "n.h5", crystals)
    store = Store.open(path)
    assert np.isnan(store.property("density")).sum() == 3
    kind = Target("class", task="classification")
    settings = AcrossSettings(path, ("density", "x"))
    split = SplitSettings(train=30, val=10, test=0)
    said = refusal(config, settings, target=None, targets=[DENSITY, kind], split=split)
    assert said == (
        f"{path}: no crystal to test on has a label `density`; give another "
        "`test.dataset`"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            (0.0, 1.0, 2.0),
            "`class` has class 2, which no training crystal has; give a "
            "`test.dataset` with the same classes",
        ),
        (
            (1.0, 1.0, 1.0),
            "all crystals to test on have `class` 1; give a `test.dataset` with both "
            "classes",
        ),
    ],
)
def test_classes_that_cannot_be_judged(values, message, config, tmp_path):
    crystals = [
        replace(crystal, properties={"class": value})
        for crystal, value in zip(labelled(3, 60), values, strict=True)
    ]
    path = write_store(tmp_path / "n.h5", crystals)
    target = Target("class", task="classification")
    split = SplitSettings(train=24, val=8, test=8, stratify=True)
    said = refusal(config, AcrossSettings(path), target=target, split=split)
    assert said == f"{path}: {message}"


def test_a_changed_store_is_not_resumed(config, other, tmp_path):
    path = write_store(tmp_path / "a.h5", labelled(6, 60))
    train(replace(config, test=AcrossSettings(path)))
    (config.out / "results.json").unlink()
    path.unlink()
    write_store(path, labelled(7, 60))
    with pytest.raises(InputError, match=r"test\.dataset: .*a\.h5 has changed since"):
        train(replace(config, test=AcrossSettings(path), resume=True))
