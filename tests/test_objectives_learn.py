"""Every objective learns: losses fall, and held-out numbers rise."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from crysdistill.demo import alloy_corpus
from crysdistill.encoders import CGCNN
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch
from crysdistill.objectives import Embedded, Objective, make_objective

CRYSTALS = 160
"""The last 32 are held out, and a step has 32."""


@cache
def batches() -> list[CrystalBatch]:
    alloys = alloy_corpus(CRYSTALS, seed=0, max_atoms=6)
    alloys = [alloys[k] for k in np.random.default_rng(0).permutation(CRYSTALS)]
    graph = GraphSettings(cutoff=4.5, max_neighbors=8)
    found = []
    for first in range(0, CRYSTALS, 32):
        batch = make_batch(alloys[first : first + 32], graph)
        batch.rows = torch.arange(first, first + 32)
        found.append(batch)
    return found


def seen(objective: Objective, encoder: CGCNN, batch: CrystalBatch, seed: int):
    views = [view(batch, seed) for view in objective.views]
    return tuple(Embedded(view, encoder(view)) for view in views)


@torch.no_grad()
def judged(objective, encoder, batch) -> tuple[float, dict[str, float]]:
    encoder.eval()
    shown = seen(objective, encoder, batch, 0)
    objective.update(shown, batch, 0)
    numbers = objective.compute()
    objective.reset()
    encoder.train()
    return objective(shown, batch, 0).item(), numbers


@pytest.mark.parametrize(
    ("name", "steps", "settings", "rises"),
    [
        ("barlow", 40, {}, {"retrieval": 0.3}),
        ("vicreg", 40, {}, {"retrieval": 0.3}),
        ("simsiam", 40, {}, {"retrieval": 0.3}),
        ("infomax", 60, {}, {"accuracy": 0.1}),
        ("joint_embedding", 60, {}, {"r2": 0.1, "rank": 0.2}),
        ("surrogate", 60, {"classes": "anion"}, {"retrieval": 0.1}),
        pytest.param(
            *("denoising", 300, {"sigma": 0.1}, {"bond_r2": 0.2, "level_r2": 0.2}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_learns_of_a_few_alloys(name, steps, settings, rises):
    """On unseen crystals, the loss falls and the numbers rise above chance."""
    torch.manual_seed(0)
    encoder = CGCNN(width=24, convolutions=2, cutoff=4.5)
    objective = make_objective(name, encoder, **settings)
    weights = [*encoder.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(weights, 0.005)
    *shown, held_out = batches()
    before, _ = judged(objective, encoder, held_out)
    for step in range(steps):
        batch = shown[step % len(shown)]
        loss = objective(seen(objective, encoder, batch, step), batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after, numbers = judged(objective, encoder, held_out)
    assert after < before
    for number, least in rises.items():
        found = numbers[f"{name}_{number}"]
        assert found > numbers[f"{name}_{number}_chance"] + least
