"""The losses of several objectives combine to their sum or geometric mean."""

from __future__ import annotations

import json
import math

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.training.pretrain import pretrain
from crysdistill.transfer.balance import geometric_mean
from tests.toy_runs import pretraining_config, rows
from tests.toy_stores import labelled, write_store


def test_geometric_mean_of_known_losses():
    losses = torch.tensor([1.0, 8.0, 27.0])
    found = geometric_mean(losses, torch.tensor([1.0, 1.0, 1.0]))
    assert found.item() == pytest.approx(6.0)
    found = geometric_mean(losses, torch.tensor([0.0, 0.5, 0.25]))
    assert found.item() == pytest.approx(8 ** (2 / 3) * 27 ** (1 / 3))


def test_its_slopes_are_those_of_the_formula_and_do_not_depend_on_scales():
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    slopes = []
    for scale in (1.0, 1000.0):
        x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        losses = torch.stack((x.exp(), scale * (1 + x.square())))
        plain = losses[0] ** 0.25 * losses[1] ** 0.75
        ours = geometric_mean(losses, weights)
        assert ours.item() == pytest.approx(plain.item())
        expected, found = (
            torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (plain, ours)
        )
        assert found.item() == pytest.approx(expected.item())
        slopes.append((found / ours).item())
    assert slopes[0] == pytest.approx(slopes[1])


def test_an_objective_with_nothing_to_say_is_left_out():
    x = torch.tensor([4.0, 0.0, 9.0], requires_grad=True)
    found = geometric_mean(x, torch.ones(3))
    assert found.item() == pytest.approx(6.0)
    assert torch.autograd.grad(found, x)[0].isfinite().all()
    nothing = geometric_mean(0 * x, torch.ones(3))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, x)[0] == 0).all()


def test_a_run_with_balanced_losses(dataset, tmp_path):
    names = ("node_features", "fingerprint", "surrogate")
    config = pretraining_config(
        dataset,
        tmp_path / "run",
        objectives={name: {"weight": 2.0} for name in names},
        weighting="balanced",
        held_out=0.15,  # six crystals: one batch gives the epoch's loss
    )
    pretrain(config)
    for row in rows(config.out / "metrics.csv"):
        if row.get("val_loss"):
            parts = [float(row[f"val_{name}"]) for name in names]
            known = [part for part in parts if part > 0]
            expected = math.prod(known) ** (1 / len(known))
            assert float(row["val_loss"]) == pytest.approx(expected, rel=1e-4)
    assert "surrogate_retrieval" in json.dumps(
        json.loads((config.out / "results.json").read_text())["numbers"]
    )


def test_surrogates_that_need_space_groups_say_so(tmp_path):
    store = write_store(tmp_path / "plain.h5", labelled(12), symmetry=None)
    objectives = {"surrogate": {"classes": "space_group"}}
    config = pretraining_config(store, tmp_path / "run", objectives=objectives)
    with pytest.raises(InputError, match=r"no space groups .*objectives.surrogate=fal"):
        pretrain(config)
