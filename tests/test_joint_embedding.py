"""The joint embedding objective: plain loops, stopped gradients, exact numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from crysdistill.errors import InputError
from crysdistill.objectives import Clean, JointEmbedding, MaskedAtoms
from tests.toy_batches import batch_of, embed, embedded, gradients, toy

TOYS = [toy(row, atoms) for row, atoms in ((7, 5), (3, 1), (12, 9), (0, 2))]


def made(width: int = 4, **settings) -> JointEmbedding:
    torch.manual_seed(0)
    return JointEmbedding(width, **settings)


def shown(objective, batch, width: int = 4, dtype=torch.float64):
    return tuple(
        embed(view(batch, 0), width, seed=k, dtype=dtype)
        for k, view in enumerate(objective.views)
    )


def test_loss_against_plain_loops():
    objective = made(variance=0.7, covariance=0.3).double()
    batch = batch_of(TOYS)
    masked, clean = shown(objective, batch)
    n, width = clean.atoms.shape
    standard, lacking = [], []
    for column in clean.atoms.T:
        m = column.sum() / n
        squares = ((column - m) ** 2).sum()
        standard.append((column - m) / torch.sqrt(squares / n + 1e-3))
        lacking.append((1 - torch.sqrt(squares / (n - 1) + 1e-4)).clamp(min=0))
    wrong = []
    for k in masked.batch.masked_atoms.nonzero()[:, 0].tolist():
        first, _, last = objective.predictor
        said = last(F.silu(first(masked.atoms[k])))
        wrong += [(said[d] - standard[d][k].detach()) ** 2 for d in range(width)]
    overlap = 0.0
    for i in range(width):
        for j in range(width):
            if i != j:
                overlap = overlap + ((standard[i] @ standard[j]) / (n - 1)) ** 2
    plain = sum(wrong) / len(wrong)
    plain = plain + 0.7 * sum(lacking) / width + 0.3 * overlap / width
    ours = objective((masked, clean), batch, 0)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-10)
    wanted = (masked.atoms, clean.atoms, *objective.parameters())
    for a, b in zip(gradients(ours, *wanted), gradients(plain, *wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_targets_get_no_gradient():
    """If clean embeddings have enough variance, their gradient is zero."""
    objective = made(covariance=1e-9).double()
    batch = batch_of(TOYS)
    masked, clean = shown(objective, batch)
    wide = embedded(clean.batch, 10 * clean.atoms, clean.crystals)
    loss = objective((masked, wide), batch, 0)
    assert loss > 0.1
    to_masked, to_clean = gradients(loss, masked.atoms, clean.atoms)
    assert to_clean.abs().max() < 1e-8
    hidden = masked.batch.masked_atoms
    assert (to_masked[hidden] != 0).any()
    assert (to_masked[~hidden] == 0).all()


class Says(torch.nn.Module):
    """Returns its input."""

    def forward(self, atoms):
        return atoms


def numbers(objective, said, clean, parts: int) -> dict[str, float]:
    """The metrics when the prediction for each atom is `said`."""
    objective.predictor = Says()
    objective.reset()
    first = 0
    for k in range(parts):
        toys = TOYS[k::parts] if parts > 1 else TOYS
        batch = batch_of(toys)
        own = slice(first, first + batch.num_nodes)
        first = own.stop
        crystals = torch.zeros(len(toys), clean.shape[1])
        view = objective.views[0](batch, 0)
        seen = (
            embedded(view, said[own], crystals),
            embedded(batch, clean[own], crystals),
        )
        objective.update(seen, batch, 0)
    assert first == len(clean)
    return objective.compute()


def test_r2_of_known_answers():
    torch.manual_seed(1)
    objective = made()
    clean = 3 + torch.randn(17, 4) * torch.tensor([1.0, 10.0, 0.1, 0.0])
    hidden = objective.views[0](batch_of(TOYS), 0).masked_atoms
    own = clean[hidden].double()
    standard = (clean - own.mean(0)) / own.std(0, correction=0).clamp(min=1e-3)
    nothing = torch.zeros_like(clean)
    assert numbers(objective, nothing, clean, 1)["joint_embedding_r2"] == 0
    found = numbers(objective, standard.float(), clean, 1)
    assert found["joint_embedding_r2"] == pytest.approx(1, abs=1e-2)
    half = numbers(objective, standard.float() / 2, clean, 1)
    assert half["joint_embedding_r2"] == pytest.approx(0.75, abs=1e-2)
    # The R2 of constant columns is unknown.
    flat = numbers(objective, nothing, torch.ones_like(clean), 1)
    assert math.isnan(flat["joint_embedding_r2"])


def test_effective_rank_of_known_embeddings():
    objective = made()
    axes = torch.cat((torch.eye(4), -torch.eye(4))).repeat(2, 1)
    clean = torch.cat((axes, torch.zeros(1, 4))) + 5
    nothing = torch.zeros_like(clean)
    assert numbers(objective, nothing, clean, 1)[
        "joint_embedding_rank"
    ] == pytest.approx(1)
    line = clean[:, :1] * torch.tensor([1.0, 2.0, -1.0, 0.0])
    found = numbers(objective, nothing, line, 1)
    assert found["joint_embedding_rank"] == pytest.approx(0.25, abs=0.01)
    assert found["joint_embedding_rank_chance"] == 0.25
    flat = numbers(objective, nothing, torch.ones_like(clean), 1)
    assert math.isnan(flat["joint_embedding_rank"])


def test_numbers_do_not_depend_on_how_batches_are_cut():
    torch.manual_seed(2)
    objective = made()
    batch = batch_of(TOYS)
    order = torch.cat([(batch.batch % 2 == k).nonzero()[:, 0] for k in range(2)])
    said, clean = torch.randn(17, 4), torch.randn(17, 4)
    whole = numbers(objective, said, clean, 1)
    assert numbers(objective, said[order], clean[order], 2) == whole


def test_settings():
    assert made().views == (MaskedAtoms(0.15), Clean())
    with pytest.raises(
        InputError, match="`mask_fraction` is 0 but must be positive: th"
    ):
        made(mask_fraction=0.0)
    with pytest.raises(InputError, match=r"`variance` is 0.0 but must be positive"):
        made(variance=0.0)
    with pytest.raises(InputError, match=r"`covariance` is -1.0 but must be positive"):
        made(covariance=-1.0)
