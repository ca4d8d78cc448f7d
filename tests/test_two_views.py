"""Two views of a crystal: Barlow twins, VICReg and SimSiam against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import distances
from crysdistill.objectives import (
    Barlow,
    Chain,
    DroppedEdges,
    MaskedAtoms,
    MovedAtoms,
    SimSiam,
    VICReg,
)
from crysdistill.objectives.spread import (
    lacking_variance,
    overlap_of_columns,
    standardized,
)
from tests.toy_batches import batch_of, embed, embedded, gradients, toy

TOYS = [toy(row, 3) for row in (7, 3, 12, 0, 5, 9)]


def columns(z: torch.Tensor) -> list[list[torch.Tensor]]:
    """The numbers of a matrix, column by column."""
    return [[row[k] for row in z] for k in range(z.shape[1])]


def mean(values):
    return sum(values) / len(values)


def plain_standardized(z):
    found = []
    for column in columns(z):
        m = mean(column)
        deviation = torch.sqrt(mean([(v - m) ** 2 for v in column]) + 1e-3)
        found.append(torch.stack([(v - m) / deviation for v in column]))
    return torch.stack(found, dim=1)


def plain_layer_norm(norm, z):
    found = []
    for row in z:
        m = mean(list(row))
        deviation = torch.sqrt(mean([(v - m) ** 2 for v in row]) + 1e-5)
        found.append(norm.weight * (row - m) / deviation + norm.bias)
    return torch.stack(found)


def linear(layer, z):
    y = z @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def plain_barlow(objective, one, two):
    first, _, last = objective.projector
    a, b = (
        columns(plain_standardized(linear(last, linear(first, z).clamp(min=0))))
        for z in (one, two)
    )
    total = 0.0
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            c = mean([u * v for u, v in zip(x, y, strict=True)])
            total = total + ((1 - c) ** 2 if i == j else 0.0051 * c**2)
    return total / len(a)


def plain_vicreg(objective, one, two):
    first, _, last = objective.projector
    a, b = (linear(last, linear(first, z).clamp(min=0)) for z in (one, two))
    pairs = [(u - v) ** 2 for x, y in zip(a, b, strict=True) for u, v in zip(x, y)]  # noqa: B905
    total = 25 * mean(pairs)
    for z in (a, b):
        centred = [[v - mean(column) for v in column] for column in columns(z)]
        for i, x in enumerate(centred):
            for j, y in enumerate(centred):
                c = sum(u * v for u, v in zip(x, y, strict=True)) / (len(x) - 1)
                if i == j:
                    lacking = (1 - torch.sqrt(c + 1e-4)).clamp(min=0)
                    total = total + 25 * lacking / len(centred)
                else:
                    total = total + c**2 / len(centred)
    return total / 50


def plain_simsiam(objective, one, two):
    z, p = [], []
    for view in (one, two):
        first, norm, _, last, _ = objective.projector
        hidden = plain_layer_norm(norm, linear(first, view)).clamp(min=0)
        z.append(plain_standardized(linear(last, hidden)))
        first, norm, _, last = objective.predictor
        hidden = plain_layer_norm(norm, linear(first, z[-1])).clamp(min=0)
        p.append(linear(last, hidden))
    cosines = []
    for said, wanted in ((p[0], z[1].detach()), (p[1], z[0].detach())):
        for x, y in zip(said, wanted, strict=True):
            cosines.append((x @ y) / torch.sqrt((x @ x) * (y @ y)))
    return 1 - mean(cosines)


ALL = {
    "barlow": (Barlow, plain_barlow),
    "vicreg": (VICReg, plain_vicreg),
    "simsiam": (SimSiam, plain_simsiam),
}


def made(name: str, dtype=torch.float64):
    torch.manual_seed(0)
    objective = ALL[name][0](8, projected=6).to(dtype)
    batch = batch_of(TOYS)
    seen = tuple(
        embed(view(batch, 0), seed=k, dtype=dtype)
        for k, view in enumerate(objective.views)
    )
    return objective, batch, seen


@pytest.mark.parametrize("name", ALL)
def test_losses_against_plain_loops(name):
    objective, batch, seen = made(name)
    one, two = (view.crystals for view in seen)
    ours, plain = objective(seen, batch, 0), ALL[name][1](objective, one, two)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-10)
    wanted = (one, two, *objective.parameters())
    for a, b in zip(gradients(ours, *wanted), gradients(plain, *wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_views_does_not_matter(name):
    objective, batch, seen = made(name)
    swapped = objective(seen[::-1], batch, 0)
    assert swapped.item() == pytest.approx(objective(seen, batch, 0).item())


@pytest.mark.parametrize("name", ALL)
def test_about_one_for_whoever_knows_nothing(name):
    """Independent views have a loss of 1, or equal ones for VICReg."""
    torch.manual_seed(0)
    objective = ALL[name][0](16, projected=16)
    one, two = torch.randn(2, 4000, 16).unbind(0)
    if name == "vicreg":
        two = one = torch.ones(4000, 16)
    assert objective.compare(one, two).item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_regions_compute_in_full(name):
    objective, batch, seen = made(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(seen, batch, 0)
    assert mixed == objective(seen, batch, 0)


def test_no_gradient_flows_through_what_simsiam_predicts():
    """With a dead predictor, no gradient remains."""
    objective, batch, seen = made("simsiam")
    objective.predictor.requires_grad_(False)
    objective.predictor[3].weight.zero_()
    found = gradients(objective(seen, batch, 0), *(view.crystals for view in seen))
    assert all((gradient == 0).all() for gradient in found)


# ------------------------------------------------------------------------- the spread


def test_spread_of_known_rows():
    x = torch.tensor([[1.0, 5.0], [-1.0, 5.0], [3.0, 5.0], [-3.0, 5.0]])
    root = math.sqrt(5)
    expected = torch.tensor(
        [[1 / root, 0], [-1 / root, 0], [3 / root, 0], [-3 / root, 0]]
    )
    torch.testing.assert_close(standardized(x), expected, atol=1e-3, rtol=0)
    # The first column varies enough; the second is constant (epsilon is 10^-4).
    assert lacking_variance(x).item() == pytest.approx((1 - 0.01) / 2)
    assert overlap_of_columns(x).item() == 0
    twice = torch.stack((x[:, 0], x[:, 0]), dim=1)
    assert overlap_of_columns(twice).item() == pytest.approx((20 / 3) ** 2)


def test_the_spread_of_one_row_has_finite_slopes():
    x = torch.ones(1, 3, requires_grad=True)
    assert (standardized(x) == 0).all()
    total = standardized(x).sum() + lacking_variance(x) + overlap_of_columns(x)
    assert (torch.autograd.grad(total, x)[0] == 0).all()


# -------------------------------------------------------------------------- the views


def test_two_views_draw_differently_and_three_objectives_share_them():
    objectives = [kind(8) for kind, _ in ALL.values()]
    steps = (MaskedAtoms(0.1), DroppedEdges(0.1), MovedAtoms(0.03))
    views = (Chain(steps, name="one"), Chain(steps, name="two"))
    assert {objective.views for objective in objectives} == {views}
    batch = batch_of([toy(row, 30) for row in range(4)])
    one, two = (view(batch, 0) for view in views)
    assert not torch.equal(one.masked_atoms, two.masked_atoms)
    assert not torch.equal(one.frac_coords, two.frac_coords)
    assert not torch.equal(distances(one)[:50], distances(two)[:50])


def test_any_part_of_the_views_may_be_left_out():
    objective = Barlow(8, mask_fraction=0.0, sigma=0.0)
    assert objective.views[0] == Chain((DroppedEdges(0.1),), name="one")
    objective = Barlow(8, drop_fraction=0.0, sigma=0.0)
    assert objective.views[1] == Chain((MaskedAtoms(0.1),), name="two")


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (Barlow, {"mask_fraction": -0.1}, "`mask_fraction` is -0.1 but must be betwee"),
        (VICReg, {"drop_fraction": 1.5}, "`drop_fraction` is 1.5 but must be between "),
        (SimSiam, {"sigma": 2.0}, "`sigma` is 2.0 but must be between 0 and 1 Å"),
        (
            Barlow,
            {"mask_fraction": 0.0, "drop_fraction": 0.0, "sigma": 0.0},
            "`mask_fraction`, `drop_fraction` and `sigma` are all 0, so both views are "
            "the same; set one",
        ),
        (Barlow, {"redundancy": 0.0}, "`redundancy` is 0.0 but must be positive"),
        (Barlow, {"projected": 1}, "`projected` is 1 but must be at least 2"),
        (VICReg, {"variance": 0.0}, "`variance` is 0.0 but must be positive"),
        (VICReg, {"invariance": -1.0}, "`invariance` is -1.0 but must be positive"),
        (VICReg, {"covariance": 0.0}, "`covariance` is 0.0 but must be positive"),
        (SimSiam, {"hidden": 0}, "`hidden` is 0 but must be at least 2"),
    ],
)
def test_settings_out_of_range(kind, settings, text):
    with pytest.raises(InputError, match=text):
        kind(8, **settings)


def test_retrieval_of_the_other_view():
    """Three crystals at 0, 10 and 90 degrees; the third has views 80 degrees apart."""
    objective = Barlow(2)
    angles = torch.deg2rad(torch.tensor([[0.0, 10.0, 90.0], [1.0, 12.0, 170.0]]))
    x = torch.stack((angles.cos(), angles.sin()), dim=2)  # (2, 3, 2)
    for part in (slice(0, 1), slice(1, 3)):
        batch = batch_of(TOYS[part])
        atoms = torch.zeros(batch.num_nodes, 2)
        seen = tuple(embedded(batch, atoms, x[k, part]) for k in range(2))
        objective.update(seen, batch, 0)
    assert objective.compute() == {
        # The view nearest to 170 degrees is its own at 90; nearest to 90 is that at 12.
        "barlow_retrieval": pytest.approx(5 / 6),
        "barlow_retrieval_chance": pytest.approx(1 / 5),
    }
