"""Crystal systems: labels, contrastive losses against plain loops, retrieval."""

from __future__ import annotations

import math

import pytest
import torch

from crysdistill.objectives import CrystalSystem
from crysdistill.objectives.contrastive import LOSSES
from crysdistill.objectives.nearest import NearestIsAlike
from crysdistill.ranks import rank
from crysdistill.structures.symmetry import crystal_system
from tests.together import joined_call, together
from tests.toy_batches import (
    batch_of,
    embed,
    embedded,
    gradients,
    toy,
    with_space_groups,
)

GROUPS = [225, 221, 2, 14, 11, 0, 229, 1, 194]  # cubic x 3, two pairs, one unknown
TOYS = with_space_groups([toy(row, 2) for row in range(len(GROUPS))], GROUPS)


def crystal_systems(space_groups: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(crystal_system(space_groups.numpy()))


def test_labels_are_crystal_systems():
    systems = CrystalSystem(8).systems
    assert torch.equal(systems, crystal_systems(torch.arange(231)))
    assert systems[[0, 1, 3, 225]].tolist() == [-1, 0, 1, 6]


def plain_nt_xent(z, labels, temperature):
    z = z / z.square().sum(dim=1, keepdim=True).sqrt()
    terms = []
    known = [k for k, label in enumerate(labels) if label >= 0]
    for a in known:
        for p in known:
            if p == a or labels[p] != labels[a]:
                continue
            top = torch.exp(z[a] @ z[p] / temperature)
            rest = sum(
                torch.exp(z[a] @ z[n] / temperature)
                for n in known
                if labels[n] != labels[a]
            )
            terms.append(-torch.log(top / (top + rest)))
    return sum(terms) / len(terms)


def plain_supcon(z, labels, temperature):
    z = z / z.square().sum(dim=1, keepdim=True).sqrt()
    terms = []
    known = [k for k, label in enumerate(labels) if label >= 0]
    for a in known:
        positives = [p for p in known if p != a and labels[p] == labels[a]]
        if not positives:
            continue
        below = sum(torch.exp(z[a] @ z[k] / temperature) for k in known if k != a)
        terms.append(
            sum(
                -torch.log(torch.exp(z[a] @ z[p] / temperature) / below)
                for p in positives
            )
            / len(positives)
        )
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_contrastive_losses_against_plain_loops(loss, projection, temperature):
    torch.manual_seed(1)
    objective = CrystalSystem(
        8, loss=loss, projection=projection, temperature=temperature
    ).double()
    batch = batch_of(TOYS)
    seen = embed(batch)
    z = seen.crystals
    if projection:
        one, _, two = objective.projection
        z = (z @ one.weight.T + one.bias).clamp(min=0) @ two.weight.T + two.bias
    labels = crystal_systems(batch.space_groups).tolist()
    plain = {"nt-xent": plain_nt_xent, "supcon": plain_supcon}[loss]
    expected = plain(z, labels, temperature)
    ours = objective((seen,), batch, 0)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = (seen.crystals, *objective.parameters())
    for a, b in zip(
        gradients(ours, *wanted), gradients(expected, *wanted), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_nt_xent_known_answer():
    """Two equal cubic embeddings, a triclinic one at a right angle, T = 1."""
    objective = CrystalSystem(2, **CrystalSystem.PUBLISHED, temperature=1.0)
    batch = batch_of(with_space_groups(TOYS[:3], [225, 221, 2]))
    crystals = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    loss = objective((embedded(batch, torch.zeros(6, 2), crystals),), batch, 0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_the_published_form_has_no_head_and_that_temperature():
    published = CrystalSystem(8, **CrystalSystem.PUBLISHED)
    assert published.temperature == 0.07
    assert not list(published.parameters())
    assert CrystalSystem(8).projection is not None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "groups",
    [
        [225, 221, 225, 229],  # no negatives
        [225, 1, 14, 194],  # no positives
        [0, 0, 0, 0],
        [225, 0, 0, 0],
    ],
)
def test_batches_without_pairs_are_finite_and_connected(loss, groups):
    objective = CrystalSystem(8, loss=loss)
    batch = batch_of(with_space_groups(TOYS[:4], groups))
    seen = embed(batch, dtype=torch.float32)
    value = objective((seen,), batch, 0)
    value.backward()
    assert seen.crystals.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in objective.parameters())
    if loss == "nt-xent" or groups[1] != 221:
        assert value == 0
    else:
        assert value.isfinite()


@pytest.mark.parametrize("loss", LOSSES)
def test_large_scores_do_not_overflow(loss):
    """At T = 0.001, the exponential of a cosine would reach exp(1000)."""
    objective = CrystalSystem(8, loss=loss, projection=False, temperature=0.001)
    batch = batch_of(TOYS)
    seen = embed(batch, dtype=torch.float32)
    value = objective((seen,), batch, 0)
    value.backward()
    assert 0 < value < 1e4
    assert seen.crystals.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_anchors_of_one_rank_among_those_of_all(loss):
    """The sums of two ranks that share embeddings equal those of one rank."""
    z = embed(batch_of(TOYS)).crystals
    labels = crystal_systems(torch.tensor(GROUPS))
    total, terms = LOSSES[loss](z, labels, z, labels, 0, 0.07)
    parts = [
        LOSSES[loss](z[part], labels[part], z, labels, part.start, 0.07)
        for part in (slice(0, 4), slice(4, 9))
    ]
    assert sum(p[0] for p in parts).item() == pytest.approx(total.item())
    assert sum(p[1] for p in parts) == terms


def test_half_precision_regions_compute_cosines_in_full():
    objective = CrystalSystem(8, **CrystalSystem.PUBLISHED)
    batch = batch_of(TOYS)
    seen = embed(batch, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective((seen,), batch, 0)
    assert mixed == objective((seen,), batch, 0)


# ------------------------------------------------------------------- retrieval


def test_retrieval_of_known_neighbours():
    """On a circle: 0, 1 and 2 degrees cubic, 90 cubic, 91 triclinic, 45 unknown."""
    angle = torch.deg2rad(torch.tensor([0.0, 1.0, 2.5, 90.0, 91.0, 45.0]))
    x = torch.stack((angle.cos(), angle.sin()), dim=1)
    groups = [225, 225, 225, 225, 1, 0]
    toys = with_space_groups([toy(row, 1) for row in range(6)], groups)
    objective = CrystalSystem(2)
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        batch = batch_of(toys[part])
        crystals = x[part] * torch.tensor([[3.0]])  # the length has no effect
        atoms = torch.zeros(batch.num_nodes, 2)
        objective.update((embedded(batch, atoms, crystals),), batch, 0)
    assert objective.compute() == {
        "system_retrieval": pytest.approx(3 / 5),
        # 4 x 3 of 5 x 4 ordered pairs are both cubic
        "system_retrieval_chance": pytest.approx(12 / 20),
    }


def test_retrieval_in_chunks_against_plain():
    torch.manual_seed(0)
    x, labels = torch.randn(2500, 4), torch.randint(-1, 7, (2500,))
    metric = NearestIsAlike(4)
    metric.update(x[:1000], labels[:1000])
    metric.update(x[1000:], labels[1000:])
    known = labels >= 0
    u = x[known] / x[known].norm(dim=1, keepdim=True)
    nearest = (u @ u.T - 9 * torch.eye(len(u))).argmax(dim=1)
    right = (labels[known][nearest] == labels[known]).double().mean()
    assert metric.compute()[0].item() == pytest.approx(right.item())


def test_neighbouring_large_labels_are_told_apart():
    """Row numbers in the hundreds of millions exceed float32."""
    metric = NearestIsAlike(2)
    metric.update(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 1, 2, 2]) + 2**29)
    precision, chance = metric.compute()
    assert precision.item() == 0.5
    assert chance.item() == pytest.approx(1 / 6)


def test_retrieval_over_two_processes():
    """Real gloo processes with uneven shares, one of them empty."""
    batch = batch_of(TOYS)
    alone = NearestIsAlike(8)
    alone.update(embed(batch).crystals, crystal_systems(batch.space_groups))
    expected = [v.item() for v in alone.compute()]
    for found in together(2, joined_call, _retrieve_shares):
        assert found == [pytest.approx(expected)] * 2, found


def _retrieve_shares() -> list[list[float]]:
    batch = batch_of(TOYS)
    crystals = embed(batch).crystals
    labels = crystal_systems(batch.space_groups)
    found = []
    for shares in ([3, 6], [9, 0]):
        metric = NearestIsAlike(8)
        mine = slice(shares[0], None) if rank() else slice(shares[0])
        if shares[rank()]:
            metric.update(crystals[mine], labels[mine])
        found.append([v.item() for v in metric.compute()])
    return found
