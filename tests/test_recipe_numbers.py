"""The recipes: numbers that they compute besides training, by known answers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from crysdistill.corpus.build import build
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.structures.elements import symbols
from crysdistill.training.settings import SplitSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.weights import load_predictor
from finetune import learning_curve, metal_or_semiconductor, site_energies
from tests.conftest import from_structure, structures
from tests.toy_runs import training_config
from tests.toy_stores import labelled

# ------------------------------------------------------------------ site energies


@pytest.fixture
def perovskites(tmp_path) -> Store:
    """SrTiO3, the same with reordered and shifted atoms, and two others."""
    strontium = from_structure("SrTiO3", structures()["SrTiO3"])
    order = [3, 1, 4, 0, 2]
    moved = replace(
        strontium,
        material_id="moved",
        atomic_numbers=strontium.atomic_numbers[order],
        frac_coords=(strontium.frac_coords[order] + [0.3, 0.1, 0.7]) % 1,
    )
    # Without oxygen there are no anions; a halfway atom has no nearest site.
    salt = from_structure("NaCl", structures()["NaCl"])
    frac = np.array(
        [[0.0, 0, 0], [0.5] * 3, [0.25] * 3, [0.75] * 3, [0.25, 0.75, 0.25]]
    )
    between = replace(strontium, material_id="between", frac_coords=frac)
    crystals = [strontium, moved, salt, between]
    path = tmp_path / "p.h5"
    build(crystals, path, symmetry=None, workers=1, progress=False)
    return Store.open(path)


def test_a_has_the_farther_anions_and_b_the_nearer(perovskites):
    sites = site_energies.find_sites(perovskites)
    names = [perovskites.material_ids[row] for row in sites.rows]
    assert names == ["SrTiO3", "moved"]
    assert sites.left_out == 2
    for row, a, b in zip(sites.rows, sites.a, sites.b, strict=True):
        numbers = perovskites.crystal(row).atomic_numbers
        assert (symbols()[numbers[a]], symbols()[numbers[b]]) == ("Sr", "Ti")


def test_a_store_without_perovskites(dataset):
    with pytest.raises(InputError) as error:
        site_energies.find_sites(Store.open(dataset))
    assert str(error.value) == (
        f"{dataset}: no cell of A, B and three of O, N, S, F; give a store of "
        "perovskites"
    )


def test_contributions_add_up_to_the_prediction(config, dataset):
    head = site_energies.HEADS["linear pooling"]
    weights = train(replace(config, head=head))
    store = Store.open(dataset)
    each = site_energies.contributions(weights, store)
    sums = np.add.reduceat(each, store.atom_offsets[:-1])
    whole = load_predictor(weights).predict(store.batch(range(len(store)))).numpy()
    np.testing.assert_allclose(sums, whole, rtol=1e-4, atol=1e-6)


def test_means_of_elements(perovskites):
    sites = site_energies.find_sites(perovskites)
    energies = np.arange(len(perovskites.atomic_numbers), dtype=float)
    found = site_energies.by_element(perovskites, sites, energies)
    assert list(zip(found["site"], found["element"], strict=True)) == [
        ("A", "Sr"),
        ("B", "Ti"),
    ]
    starts = perovskites.atom_offsets[sites.rows]
    expected = [(starts + sites.a).mean(), (starts + sites.b).mean()]
    assert found["mean"].tolist() == pytest.approx(expected)
    assert found["crystals"].tolist() == [2, 2]


def test_both_tables_are_drawn(perovskites, tmp_path):
    sites = site_energies.find_sites(perovskites)
    energies = np.arange(len(perovskites.atomic_numbers), dtype=float)
    found = site_energies.by_element(perovskites, sites, energies)
    site_energies.draw(found, tmp_path / "s.svg")
    assert (tmp_path / "s.svg").stat().st_size > 10_000


# --------------------------------------------------------- metal or semiconductor


def test_areas_and_accuracies():
    predicted = pd.DataFrame(
        {
            "metal": [True, True, True, True, False, False],
            "probability": [0.9, 0.8, 0.7, 0.2, 0.6, 0.1],
        }
    )
    found = metal_or_semiconductor.numbers(predicted)
    assert found["AUC"] == pytest.approx(7 / 8)  # one of 8 pairs is in the wrong order
    assert found["metals"] == pytest.approx(3 / 4)
    assert found["semiconductors"] == pytest.approx(1 / 2)
    assert found["all"] == pytest.approx(4 / 6)
    assert found["share_of_metals"] == pytest.approx(4 / 6)


@pytest.mark.parametrize(("gap", "expected"), [(0.0, 0.0), (1e-4, 1.0), (2.5, 1.0)])
def test_the_class_of_a_gap(gap, expected):
    crystal = labelled(1, gap=gap)[0]
    found = metal_or_semiconductor.classified(crystal, "gap")
    assert found.properties == {"semiconductor": expected}


def test_a_store_with_classes(tmp_path):
    crystals = [labelled(1, n, gap=float(n % 3))[0] for n in range(9)]
    crystals.append(labelled(1, 9)[0])  # without a gap
    path = tmp_path / "gaps.h5"
    build(crystals, path, symmetry=None, workers=1, progress=False)
    made = metal_or_semiconductor.with_classes(path, "gap", None, tmp_path)
    store = Store.open(made)
    classes = dict(
        zip(store.material_ids, store.property("semiconductor"), strict=True)
    )
    assert classes == {f"random-{n}": float(n % 3 > 0) for n in range(9)}
    assert store.graph == Store.open(path).graph
    few = metal_or_semiconductor.with_classes(path, "gap", 4, tmp_path)
    assert len(Store.open(few)) == 4


# ------------------------------------------------------------------ learning curve


def test_the_exponent_of_a_power_law():
    labels = np.repeat([100, 200, 400, 800], 2)
    found = learning_curve.fit_curve(
        pd.DataFrame({"labels": labels, "test": 3.0 * labels**-0.4})
    )
    assert found.exponent == pytest.approx(0.4)
    assert found.factor == pytest.approx(3.0)
    assert found.spread == pytest.approx(0, abs=1e-6)
    assert found(1600) == pytest.approx(3.0 * 1600**-0.4)


def test_two_points_have_no_interval():
    found = learning_curve.fit_curve(
        pd.DataFrame({"labels": [10, 100], "test": [1.0, 0.1]})
    )
    assert found.exponent == pytest.approx(1)
    assert np.isnan(found.spread)


@pytest.fixture
def base(dataset, tmp_path) -> TrainConfig:
    config = training_config(dataset, tmp_path / "run")
    return replace(config, split=SplitSettings())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((20, 20), "`--labels` has one number but a curve needs at least two"),
        ((1, 20), "`--labels` has 1 but must be at least 2"),
        (
            (10, 1000),
            "`--labels` has 1,000, which with validation and test crystals needs 1,254 "
            "labels, but {} has 40; give fewer",
        ),
    ],
)
def test_numbers_of_labels_that_cannot_be(labels, message, base, tmp_path):
    with pytest.raises(InputError) as error:
        learning_curve.run(base, labels, [0], tmp_path)
    assert str(error.value) == message.format(base.dataset)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_not_repeated(base, tmp_path):
    """Only missing runs start; the other numbers come from the folders."""
    learning_curve.run(base, (16, 8), [0], tmp_path)
    for n, error in ((8, 0.4), (16, 0.2)):
        folder = tmp_path / "runs" / f"scratch-{n}-3-epochs-0"
        (folder / "results.json").write_text(json.dumps({"test": error}))
    found = learning_curve.run(base, (16, 8), [0], tmp_path)
    assert found["test"].tolist() == [0.4, 0.2]
    assert pd.read_csv(tmp_path / "results.csv").equals(found)
