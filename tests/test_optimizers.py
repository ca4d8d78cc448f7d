"""Schedules in runs of any length."""

from __future__ import annotations

import warnings

import pytest
import torch

from crysdistill.training.optimizers import make_optimizer
from crysdistill.training.settings import OptimizerSettings


def rates(schedule: str, steps: int) -> list[float]:
    weight = torch.nn.Parameter(torch.zeros(1))
    settings = OptimizerSettings(lr=0.5, schedule=schedule, milestones=(1, 2))
    made = make_optimizer([([weight], 0.5)], settings, steps, max(1, steps // 4))
    found = []
    for _ in range(steps):
        found.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made["lr_scheduler"]["scheduler"].step()
    return found


@pytest.mark.parametrize("steps", [*range(1, 32), 100])
def test_onecycle_rises_to_the_rate_and_falls(steps):
    found = rates("onecycle", steps)
    assert all(0 < rate <= 0.5 + 1e-12 for rate in found)
    if steps < 3:
        assert found == [0.5] * steps
        return
    top = found.index(max(found))
    assert found[top] == pytest.approx(0.5, rel=0.02 if steps > 20 else 1e-6)
    assert 1 <= top <= max(1, round(0.1 * steps))
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_the_other_schedules():
    assert rates("constant", 8) == [0.5] * 8
    milestones = [0.5, 0.5, 0.05, 0.05, 0.005, 0.005, 0.005, 0.005]
    assert rates("milestones", 8) == pytest.approx(milestones)
    cosine = rates("cosine", 8)
    assert cosine[0] == 0.5
    assert cosine[4] == pytest.approx(0.25)
