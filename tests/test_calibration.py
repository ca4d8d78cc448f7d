"""Predicted uncertainties: their sources, and their calibration in the report."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel as Constant
from sklearn.gaussian_process.kernels import RationalQuadratic, WhiteKernel

from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.studies.run_files import judged_predictions
from crysdistill.studies.sections.calibration import calibrated
from crysdistill.studies.statistics import calibration, check_results
from crysdistill.studies.study import StudyConfig, study
from crysdistill.studies.tables import result_groups
from crysdistill.training.fit import FitConfig, fit
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.readouts import GaussianProcess
from crysdistill.transfer.spread import Watched, disagreement, fit_factor
from crysdistill.transfer.stack import Stack
from crysdistill.transfer.weights import load_predictor
from tests.toy_stores import labelled, write_store
from tests.toy_studies import BASE, results

RNG = np.random.default_rng(0)


class TestStatistics:
    def test_a_normal_sample_with_the_right_sd_has_the_right_coverage(self):
        sd = RNG.uniform(0.5, 2, 20_000)
        found = calibration(RNG.normal(0, sd), sd)
        assert found.coverage == pytest.approx((0.5, 0.8, 0.9, 0.95), abs=0.01)
        assert found.width == pytest.approx(2 * 1.959964 * sd.mean())
        assert found.crystals == 20_000

    def test_half_the_sd_covers_what_the_normal_says(self):
        found = calibration(RNG.normal(0, 2, 20_000), np.ones(20_000))
        right = 2 * stats.norm.cdf(stats.norm.ppf(0.95) / 2) - 1
        assert found.coverage[2] == pytest.approx(right, abs=0.01)
        assert math.isnan(found.correlation)  # all sds are equal

    def test_correlation_ranks_the_errors(self):
        errors = np.array([0.1, -0.2, 0.3, -9.0])
        assert calibration(errors, np.array([1, 2, 3, 4])).correlation == 1
        assert calibration(errors, np.array([4, 3, 2, 1])).correlation == -1

    def test_bad_input(self):
        with pytest.raises(InputError, match="there is no prediction to calibrate"):
            calibration(np.zeros(0), np.zeros(0))
        with pytest.raises(InputError, match="an `sd` is -1 but must not be negative"):
            calibration(np.zeros(2), np.array([1, -1]))
        with pytest.raises(InputError, match="a level is 95 but must be between 0"):
            calibration(np.zeros(2), np.ones(2), [95])


class TestSpread:
    def test_factor_makes_one_deviation_cover_its_share(self):
        sd = torch.rand(20_000) + 0.5
        errors = 2.5 * sd * torch.randn(20_000)
        assert fit_factor(sd, errors) == pytest.approx(2.5, rel=0.05)
        assert fit_factor(sd[:9], errors[:9]) is None
        errors[:-9] = torch.nan
        assert fit_factor(sd, errors) is None

    def test_disagreement_of_equal_members_is_their_standard_deviation(self):
        answers = torch.randn(4, 5, 2)
        found = disagreement(answers, torch.full((4,), 0.25))
        torch.testing.assert_close(found, answers.std(dim=0))

    def test_deviations_of_a_gaussian_process_are_those_of_scikit_learn(self):
        x = torch.from_numpy(RNG.normal(size=(40, 3))).float()
        y = torch.sin(x[:, 0]) + 0.1 * torch.from_numpy(RNG.normal(size=40)).float()
        process = GaussianProcess.fit(x, y, 0)
        a, length, s, noise = process.scales.tolist()
        kernel = Constant(a) * RationalQuadratic(length, s) + WhiteKernel(noise)
        other = GaussianProcessRegressor(kernel, alpha=1e-10, optimizer=None)
        other.fit(x.numpy(), y.numpy())
        asked = torch.from_numpy(RNG.normal(size=(7, 3))).float()
        mean, sd = other.predict(asked.numpy(), return_std=True)
        assert process(asked)[:, 0].tolist() == pytest.approx(mean, abs=1e-4)
        assert process.deviation(asked)[:, 0].tolist() == pytest.approx(sd, rel=1e-4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("dataset") / "d.h5", labelled(60))


@pytest.fixture(scope="module")
def ensemble(dataset, tmp_path_factory):
    """A study of an ensemble and of single networks."""
    base = {"dataset": dataset, **BASE, "split": {"train": 20, "val": 12, "test": 12}}
    config = StudyConfig(
        base={**base, "trainer": {"epochs": 1, "batch_size": 8, "accelerator": "cpu"}},
        out=tmp_path_factory.mktemp("ensemble"),
        axes={"arm": ["scratch"], "repeats": [1, 3], "labels": [20], "seed": [0]},
        controls=False,
        workers=1,
    )
    return config.out, study(config, progress=False)


def test_ensembles_write_how_far_their_networks_disagree(ensemble):
    out, table = ensemble
    one, three = (out / run for run in table["run"])
    assert list(pd.read_csv(one / "predictions.csv")) == [
        "material_id", "truth", "prediction",
    ]  # fmt: skip
    found = pd.read_csv(three / "predictions.csv")
    members = [
        pd.read_csv(three / f"network-{k}" / "predictions.csv")["prediction"]
        for k in range(3)
    ]
    assert found["prediction"].to_numpy() == pytest.approx(np.mean(members, axis=0))
    assert found["sd"].to_numpy() == pytest.approx(np.std(members, axis=0, ddof=1))
    assert set(results(three)["sd_factor"]) == {"density"}
    assert results(three)["sd_factor"]["density"] > 0
    assert "sd_factor" not in results(one)


def test_the_report_reads_them(ensemble):
    out, table = ensemble
    table = check_results(table.assign(run=[str(out / run) for run in table["run"]]))
    predictions = judged_predictions(table)
    section = calibrated(predictions, result_groups(table))
    shown = section.exhibits[0].shown
    factor = results(out / table["run"].iloc[1])["sd_factor"]["density"]
    assert len(shown) == 2
    assert shown.iloc[1, 0].endswith(f", scaled by {factor:.2g}")
    assert shown["Predictions"].tolist() == ["12", "12"]


def test_a_gaussian_process_alone_is_as_sure_as_it_says(dataset, tmp_path):
    config = FitConfig(
        dataset=dataset, out=tmp_path / "fit", weights=[], **_fit_settings()
    )
    predictor = load_predictor(fit(config))
    store = Store.open(dataset)
    members = getattr(predictor, "members", [predictor])
    single = next(one for one in members if isinstance(one, FrozenPredictor))
    watched = Watched(single)
    output = watched.answer(store.batch(np.arange(5)))
    torch.testing.assert_close(output, single.answer(store.batch(np.arange(5))))
    x = single.scaled(store.batch(np.arange(5)))
    sd = single.readouts[0].deviation(x) * single.outputs.normalizers[0].std
    torch.testing.assert_close(watched.sd(), sd)


def test_unlike_members_are_not_sure(dataset, tmp_path):
    """The spread of a network and a Gaussian process says little about doubt."""
    torch.manual_seed(0)
    config = FitConfig(
        dataset=dataset, out=tmp_path / "fit", weights=[], **_fit_settings()
    )
    fit(config)
    network = load_predictor(tmp_path / "fit" / "scratch-0" / "weights.safetensors")
    store = Store.open(dataset)
    batches = [store.batch(np.arange(30), network.outputs.names)]
    known = FrozenPredictor.read(None, batches)
    frozen = FrozenPredictor.fit(None, known, network.outputs, network.graph)
    alike = Watched(Stack([network] * 3))
    mixed = Watched(Stack([network, network, frozen]))
    for watched in (alike, mixed):
        watched.answer(store.batch(np.arange(5)))
    assert alike.sd().shape == (5, 1)
    assert mixed.sd() is None


def _fit_settings():
    from crysdistill.configs import read_settings

    base = {**BASE, "trainer": {"epochs": 1, "batch_size": 8, "accelerator": "cpu"}}
    config = read_settings({"dataset": "x", **base}, FitConfig)
    names = ("target", "encoder", "head", "split", "trainer")
    return {name: getattr(config, name) for name in names}


def invented(arms, task="gap"):
    """Return results and predictions of arms with given true and predicted spread."""
    rng = np.random.default_rng(1)
    rows, predictions = [], []
    for arm, (spread, sd, factor) in arms.items():
        errors = rng.normal(0, spread, 2000)
        row = {"arm": arm, "target": task, "unit": "eV", "metric": "mae"}
        rows.append({**row, "labels": 100, "seed": 0, "value": np.abs(errors).mean()})
        part = {"arm": arm, "target": task, "seed": 0, "labels": 100, "truth": 0.0}
        part |= {"prediction": errors, "sd": sd, "sd_factor": factor}
        predictions.append(pd.DataFrame(part).assign(material_id=range(2000)))
    return pd.DataFrame(rows), pd.concat(predictions)


def test_coverage_is_said_in_words():
    arms = {
        "right": (1.0, 1.0, np.nan),
        "bold": (1.0, 0.5, 2.0),
        "shy": (1.0, 3.0, np.nan),
        "silent": (1.0, np.nan, np.nan),
    }
    table, predictions = invented(arms)
    section = calibrated(predictions, result_groups(table))
    assert sorted(section.said) == [
        "The 90 % intervals of bold hold 60 % of the test crystals: they are too "
        "narrow.",
        "The 90 % intervals of right hold 90 % of the test crystals: as they should, "
        "within 5 points.",
        "The 90 % intervals of shy hold 100 % of the test crystals: they are too wide.",
    ]
    rows = section.exhibits[0].shown.set_index("Arm")
    assert "silent" not in rows.index
    assert rows.loc["bold, scaled by 2", "Within 90\u00a0%"] in ("89 %", "90 %", "91 %")
    assert rows.loc["right", "Width of 95\u00a0%"] == "3.92 eV"
    assert [picture.name for picture in section.pictures] == ["calibration-gap"]


def test_nothing_without_deviations():
    table, predictions = invented({"silent": (1.0, np.nan, np.nan)})
    groups = result_groups(table)
    assert calibrated(predictions, groups) is None
    assert calibrated(predictions.drop(columns="sd"), groups) is None
    classes = replace(groups[0], metric="auc")
    assert calibrated(predictions.assign(sd=0.1), [classes]) is None
