"""The infomax objective: plain loops, drawn atoms, retrieval of an atom's crystal."""

from __future__ import annotations

import math

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.objectives import Clean, Infomax, MaskedAtoms
from crysdistill.objectives.nearest import OwnIsBest
from tests.toy_batches import batch_of, embed, embedded, gradients, toy

TOYS = [toy(row, atoms) for row, atoms in ((7, 5), (3, 1), (12, 9), (0, 2))]


def test_loss_against_plain_loops():
    torch.manual_seed(0)
    objective = Infomax(8, 8, projected=6).double()
    batch = batch_of(TOYS)
    seen = embed(batch)

    def project(net, x):
        hidden = (x @ net[0].weight.T + net[0].bias).clamp(min=0)
        return hidden @ net[2].weight.T + net[2].bias

    atoms = project(objective.of_atoms, seen.atoms)
    crystals = project(objective.of_crystals, seen.crystals)
    own, others = [], []
    for atom, home in zip(atoms, batch.batch.tolist(), strict=True):
        for k, crystal in enumerate(crystals):
            p = torch.sigmoid(atom @ crystal / math.sqrt(6))  # that atom is in crystal
            (own if k == home else others).append(-torch.log(p if k == home else 1 - p))
    plain = sum(own) / len(own) + sum(others) / len(others)
    plain = plain / (2 * math.log(2))
    ours = objective((seen,), batch, 0)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-10)
    wanted = (seen.atoms, seen.crystals, *objective.parameters())
    for a, b in zip(gradients(ours, *wanted), gradients(plain, *wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_one_for_whoever_knows_nothing():
    objective = Infomax(8, 8)
    objective.of_atoms[2].weight.data.zero_()
    objective.of_atoms[2].bias.data.zero_()
    batch = batch_of(TOYS)
    loss = objective((embed(batch, dtype=torch.float32),), batch, 0)
    assert loss.item() == pytest.approx(1.0)


def test_large_scores_do_not_overflow():
    objective = Infomax(8, 8)
    batch = batch_of(TOYS)
    seen = embed(batch, dtype=torch.float32)
    far = embedded(batch, 1e4 * seen.atoms, 1e4 * seen.crystals)
    loss = objective((far,), batch, 0)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, seen.atoms, seen.crystals))


def test_half_precision_regions_compute_scores_in_full():
    objective = Infomax(8, 8)
    batch = batch_of(TOYS)
    seen = embed(batch, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective((seen,), batch, 0).dtype == torch.float32


def test_one_atom_of_each_crystal_is_judged():
    """All atoms match their crystal except in the last one, so draws do not matter."""
    objective = Infomax(4, 4)
    objective.of_atoms = objective.of_crystals = torch.nn.Identity()
    objective.found = OwnIsBest(4)
    for part in (slice(0, 3), slice(3, 4)):
        batch = batch_of(TOYS[part])
        crystals = torch.eye(4)[part]
        atoms = crystals[batch.batch] if part.start == 0 else -torch.eye(4)[[3, 3]]
        objective.update((embedded(batch, atoms, crystals),), batch, 0)
    assert objective.compute() == {
        "infomax_accuracy": 0.75,
        "infomax_accuracy_chance": 0.25,
    }


def test_retrieval_in_chunks_against_plain():
    torch.manual_seed(0)
    rows, partners = torch.randn(2, 2500, 4).unbind(0)
    metric = OwnIsBest(4)
    metric.update(rows[:100], partners[:100])
    metric.update(rows[100:], partners[100:])
    best = (rows @ partners.T).argmax(dim=1)
    right = (best == torch.arange(2500)).double().mean()
    accuracy, chance = metric.compute()
    assert accuracy.item() == pytest.approx(right.item())
    assert chance.item() == 1 / 2500


def test_settings():
    assert Infomax(8, 8).views == (MaskedAtoms(0.15),)
    assert Infomax(8, 8, mask_fraction=0.0).views == (Clean(),)
    with pytest.raises(InputError, match="`projected` is 1 but must be at least 2"):
        Infomax(8, 8, projected=1)
