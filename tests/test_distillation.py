"""Losses between a student and its teacher, against plain implementations."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, make_batch
from crysdistill.ranks import rank, world_size
from crysdistill.transfer import balance, relations
from crysdistill.transfer import distillation as module
from crysdistill.transfer.distillation import (
    DISTILLATION_LOSSES,
    Distillation,
    agreement,
    atom_loss,
)
from tests.conftest import random_crystal
from tests.together import joined_call, together
from tests.toy_stores import SMALL_GRAPH


def some_batch(*seeds: int) -> CrystalBatch:
    return make_batch([random_crystal(s, atoms=1 + s) for s in seeds], SMALL_GRAPH)


@pytest.fixture
def batch() -> CrystalBatch:
    return some_batch(0, 1, 4)  # of 1, 2 and 5 atoms


def parameters(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def draw(rows: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=source)


# -------------------------------------------------------------------- as published


def test_the_published_loss_is_two_minus_two_cosines(batch):
    student, teacher = draw(8, seed=1), draw(8, seed=2)
    per_atom = 2 * (1 - F.cosine_similarity(student, teacher, dim=1)) / 8
    per_crystal = torch.stack([per_atom[batch.batch == b].mean() for b in range(3)])
    torch.testing.assert_close(atom_loss(student, teacher, batch), per_crystal.mean())


def test_the_published_loss_sees_directions_and_weighs_crystals_alike(batch):
    atoms, scale = draw(8), torch.rand(8, 1) + 0.1
    assert float(atom_loss(atoms * scale, atoms, batch)) == pytest.approx(0, abs=1e-12)
    # If one of three crystals is opposite, its loss is 4 / F for any number of atoms.
    for b in range(3):
        sign = torch.where(batch.batch == b, -1.0, 1.0).unsqueeze(1)
        loss = atom_loss(atoms * sign, atoms, batch)
        assert float(loss) == pytest.approx(4 / 8 / 3, rel=1e-5)


# -------------------------------------------------------------------- standardised


def standardised(level: str, mean: torch.Tensor, var: torch.Tensor) -> Distillation:
    found = Distillation(8, 8, loss=f"standardized_{level}", projector=False)
    found.standardize(mean, var)
    return found


def test_standardised_atoms_equal_a_plain_second_implementation(batch):
    student, teacher = draw(8, seed=1).requires_grad_(), 5 + 3 * draw(8, seed=2)
    mean, var = teacher.mean(0), teacher.var(0, unbiased=False)
    loss = standardised("atoms", mean, var)(student, teacher, batch)
    loss.backward()
    s, t = student.detach().double().numpy(), teacher.double().numpy()
    total, slope = 0.0, np.zeros((8, 8))
    for start, end in zip(batch.ptr[:-1].tolist(), batch.ptr[1:].tolist(), strict=True):
        for atom in range(start, end):
            for k in range(8):
                wanted = (t[atom, k] - float(mean[k])) / np.sqrt(float(var[k]))
                share = 1 / (8 * (end - start) * 3)  # width, atoms, crystals
                total += share * (s[atom, k] - wanted) ** 2
                slope[atom, k] = 2 * share * (s[atom, k] - wanted)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), slope, rtol=1e-4, atol=1e-7)


def test_standardised_crystals_equal_a_plain_second_implementation(batch):
    student, teacher = draw(3, seed=1), 5 + 3 * draw(3, seed=2)
    mean, var = draw(1, seed=3)[0], draw(1, seed=4)[0].square() + 0.1
    loss = standardised("crystals", mean, var)(student, teacher, batch)
    total = [
        (float(s) - (float(t) - float(m)) / float(v) ** 0.5) ** 2
        for x, y in zip(student, teacher, strict=True)
        for s, t, m, v in zip(x, y, mean, var, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(total) / 24, rel=1e-5)


def test_the_scale_of_the_teacher_does_not_matter(batch):
    """A student that learned nothing has loss 1; a perfect one has loss 0."""
    teacher = 1e3 + 1e-2 * draw(3, seed=2).double()
    mean, var = teacher.mean(0), teacher.var(0, unbiased=False)
    loss = standardised("crystals", mean, var)
    ignorant = loss(torch.zeros(3, 8), teacher.float(), batch)
    assert ignorant.item() == pytest.approx(1.0, rel=0.02)  # float32 near 1000
    assert loss((teacher - mean) / var.sqrt(), teacher, batch).item() < 1e-3


def test_a_number_that_is_always_the_same_teaches_nothing(batch):
    teacher = draw(3)
    teacher[:, 2] = 7.0
    loss = standardised("crystals", teacher.mean(0), teacher.var(0, unbiased=False))
    student = torch.zeros(3, 8)
    assert torch.isfinite(loss(student, teacher, batch))
    student[:, 2] = 0.5
    more = loss(student, teacher, batch) - loss(torch.zeros(3, 8), teacher, batch)
    assert more.item() == pytest.approx(0.25 / 8, rel=1e-4)


def test_statistics_are_no_part_of_what_is_saved(batch):
    loss = standardised("atoms", torch.zeros(8), torch.ones(8))
    assert not loss.state_dict()
    with pytest.raises(RuntimeError, match="call `standardize` before"):
        Distillation(8, 8, loss="standardized_atoms")(draw(8), draw(8), batch)


DIRECT = [name for name, loss in DISTILLATION_LOSSES.items() if not loss.relational]
RELATIONS = [name for name in DISTILLATION_LOSSES if name not in DIRECT]


@pytest.mark.parametrize("name", DIRECT)
def test_ranks_share_the_loss_of_the_whole_batch(name, monkeypatch):
    seeds = (0, 1, 4, 2)
    whole, parts = some_batch(*seeds), [some_batch(*seeds[:3]), some_batch(seeds[3])]
    atoms = DISTILLATION_LOSSES[name].level == "atoms"
    count = whole.num_nodes if atoms else 4
    student, teacher = draw(count, seed=1), draw(count, seed=2)
    loss = Distillation(8, 8, loss=name)
    loss.standardize(torch.full((8,), 0.2), torch.full((8,), 3.0))
    expected = loss(student, teacher, whole)
    monkeypatch.setattr(
        module, "sum_over_ranks", lambda x: torch.full_like(x, len(seeds))
    )
    sizes = [b.num_nodes if atoms else b.num_graphs for b in parts]
    shares = [
        loss(s, t, b)
        for s, t, b in zip(
            student.split(sizes), teacher.split(sizes), parts, strict=True
        )
    ]
    torch.testing.assert_close(sum(shares), expected)


# -------------------------------------------------------------------------- relations


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def over_constant(
    pairs: list[tuple[float, float]], weights: list[float] | None = None
) -> float:
    """The loss of (student, teacher) pairs, relative to a constant student."""
    w = np.array(weights or [1.0] * len(pairs))
    mean = sum(w * [t for _, t in pairs]) / sum(w)
    wrong = sum(w * [huber(s, t) for s, t in pairs])
    constant = sum(w * [huber(mean, t) for _, t in pairs])
    return wrong / (constant + 1e-3 * sum(w))


def test_relations_of_crystals_equal_a_plain_second_implementation(batch):
    batch = some_batch(0, 1, 4, 2, 3)
    student, teacher = draw(5, 6, seed=1), draw(5, 9, seed=2)
    found = relations.crystal_relations(student, teacher, batch)
    s, t = student.double().numpy(), teacher.double().numpy()

    def distances(x: np.ndarray) -> dict[tuple[int, int], float]:
        far = {
            p: float(np.linalg.norm(x[p[0]] - x[p[1]]))
            for p in permutations(range(5), 2)
        }
        mean = np.mean(list(far.values()))
        return {pair: d / mean for pair, d in far.items()}

    def cosines(x: np.ndarray) -> dict[tuple[int, int, int], float]:
        found = {}
        for i, j, k in permutations(range(5), 3):  # the angle is at atom j
            a, b = x[i] - x[j], x[k] - x[j]
            found[i, j, k] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        return found

    parts = [
        over_constant([(mine[key], theirs[key]) for key in mine])
        for mine, theirs in ((distances(s), distances(t)), (cosines(s), cosines(t)))
    ]
    assert found.item() == pytest.approx((parts[0] + 2 * parts[1]) / 3, rel=1e-4)


def test_relations_of_atoms_equal_a_plain_second_implementation(batch):
    student, teacher = draw(8, 6, seed=1), draw(8, 9, seed=2)
    found = relations.atom_relations(student, teacher, batch)
    ptr, lists, weights = batch.ptr.tolist(), [], []
    for x in (student.double().numpy(), teacher.double().numpy()):
        far, weights = [], []
        for first, end in pairwise(ptr):
            inside = list(combinations(range(first, end), 2))
            far += [float(np.linalg.norm(x[i] - x[j])) for i, j in inside]
            weights += [1 / max(1, len(inside))] * len(inside)  # equal crystals
        lists.append(np.array(far) / np.average(far, weights=weights))
    assert len(weights) == 1 + 10  # of 1, 2 and 5 atoms
    pairs = list(zip(lists[0].tolist(), lists[1].tolist(), strict=True))
    assert found.item() == pytest.approx(over_constant(pairs, weights), rel=1e-4)


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_do_not_see_scale_place_or_turns(name, batch):
    """They need no projector, even between different widths."""
    loss = Distillation(8, 12, loss=name)
    assert parameters(loss) == 0
    loss.standardize(torch.zeros(12), torch.ones(12))
    rows = 8 if loss.level == "atoms" else 3
    student = draw(rows, seed=1)
    turn, _ = torch.linalg.qr(draw(12, 12, seed=3))
    teacher = torch.cat((student, torch.zeros(rows, 4)), dim=1)  # zero-padded
    assert loss(student, teacher, batch).item() == pytest.approx(0, abs=1e-6)
    assert loss(40 * student + 3, teacher @ turn, batch).item() == pytest.approx(
        0, abs=1e-5
    )
    other = draw(rows, 12, seed=5)
    assert loss(student, other, batch).item() > 0.05


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_are_on_one_scale_with_the_others(name):
    """A student with equal values for all pairs has a loss near 1."""
    batch = some_batch(*[4] * 12)
    loss = Distillation(64, 64, loss=name)
    loss.standardize(torch.zeros(64), torch.ones(64))
    rows = batch.num_nodes if loss.level == "atoms" else 12
    student = torch.eye(64)[torch.arange(rows) % 64]  # all distances are equal
    teacher = draw(rows, 2, seed=2) @ draw(2, 64, seed=3)
    assert 0.7 < loss(student, teacher, batch).item() < 1.4


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("seeds", [(0,), (0, 0), (4, 4)])
def test_relations_of_few_or_equal_ones_are_no_reason_to_move(name, seeds):
    batch = some_batch(*seeds)
    loss = Distillation(8, 8, loss=name)
    loss.standardize(torch.zeros(8), torch.ones(8))
    rows = batch.num_nodes if loss.level == "atoms" else len(seeds)
    student = torch.ones(rows, 8, requires_grad=True)
    value = loss(student, torch.ones(rows, 8), batch)
    value.backward()
    assert value.item() == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_have_the_slopes_of_their_values(name):
    batch = some_batch(1, 4, 2)
    loss = {
        "relations_atoms": relations.atom_relations,
        "relations_crystals": relations.crystal_relations,
    }[name]
    rows = batch.num_nodes if "atoms" in name else 3
    student, teacher = draw(rows, 4, seed=1).requires_grad_(), draw(rows, 4, seed=2)
    (slope,) = torch.autograd.grad(loss(student, teacher, batch), student)
    step = draw(rows, 4, seed=9)
    ahead, behind = (loss(student + x * step, teacher, batch) for x in (2e-2, -2e-2))
    numeric = (ahead - behind).item() / 4e-2
    assert (slope * step).sum().item() == pytest.approx(numeric, rel=2e-2, abs=1e-3)


def _relate(name: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Value and gradient of this rank's share of five crystals."""
    seeds = (1, 4, 2, 0, 3)
    shares = {1: [5], 2: [3, 2], 3: [2, 0, 3]}[world_size()]
    first = sum(shares[: rank()])
    mine = range(first, first + shares[rank()])
    whole = some_batch(*seeds)
    atoms = "atoms" in name
    owner = whole.batch if atoms else torch.arange(5)
    chosen = torch.tensor([int(b) in mine for b in owner])
    student, teacher = draw(len(owner), 6, seed=1), draw(len(owner), 9, seed=2)
    student = student[chosen].requires_grad_()
    # A rank without crystals has an empty batch.
    batch = take(whole, list(mine))
    loss = relations.atom_relations if atoms else relations.crystal_relations
    value = loss(student, teacher[chosen], batch)
    value.backward()
    return value.detach(), student.grad, list(mine)


def take(whole: CrystalBatch, mine: list[int]) -> CrystalBatch:
    """The part of a batch that the relations need."""
    counts = whole.ptr.diff()[mine]
    return CrystalBatch(
        ptr=torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))),
        batch=torch.repeat_interleave(torch.arange(len(mine)), counts),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RELATIONS)
def test_relations_go_across_ranks(name):
    """Values add up and gradients agree, even if one rank has no crystals."""
    [(value, slope, _)] = together(1, _relate, name)
    for ranks in (2, 3):
        found = together(ranks, joined_call, _relate, name)
        torch.testing.assert_close(sum(v for v, _, _ in found), value)
        torch.testing.assert_close(torch.cat([g for _, g, _ in found]), slope)


# ------------------------------------------------------------- with the property's loss


def test_a_fading_teacher_is_silent_at_the_end():
    two, ten = torch.tensor(2.0), torch.tensor(10.0)
    fading = Distillation(8, 8, 0.5, weighting="fading")
    for done, total in ((0.0, 6.0), (0.5, 4.0), (1.0, 2.0)):
        assert float(fading.total(two, ten, done)) == pytest.approx(total)


def test_balanced_losses_need_no_common_scale():
    """Scaling one loss by 1,000 does not change the direction of a step."""
    x = torch.tensor([0.3, -1.2], requires_grad=True)
    balanced = Distillation(8, 8, 0.3, weighting="balanced")

    def slope(scale: float) -> tuple[float, torch.Tensor]:
        mine, theirs = (x - 1).square().sum(), scale * (x + 2).square().sum()
        total = balanced.total(mine, theirs)
        return total.item(), torch.autograd.grad(total, x)[0]

    a, b = ((x.detach() - 1).square().sum(), (x.detach() + 2).square().sum())
    value, direction = slope(1.0)
    assert value == pytest.approx(float(a**0.7 * b**0.3), rel=1e-5)
    other = F.normalize(slope(1e-3)[1], dim=0)
    torch.testing.assert_close(other, F.normalize(direction, dim=0))
    nothing = balanced.total(0 * x.sum(), (x + 2).square().sum())
    assert torch.isfinite(torch.autograd.grad(nothing, x)[0]).all()


def test_balanced_losses_with_one_of_them_alone():
    two, ten = torch.tensor(2.0), torch.tensor(10.0)
    for alpha, total in ((0.0, 2.0), (1.0, 10.0)):  # exactly
        alone = Distillation(8, 8, alpha, weighting="balanced")
        assert float(alone.total(two, ten)) == total


def test_ranks_share_balanced_losses(monkeypatch):
    balanced = Distillation(8, 8, 0.3, weighting="balanced")
    whole = balanced.total(torch.tensor(3.0), torch.tensor(0.5))
    monkeypatch.setattr(balance, "sum_over_ranks", lambda x: torch.tensor([3.0, 0.5]))
    shares = [
        balanced.total(torch.tensor(a), torch.tensor(b))
        for a, b in ((1.0, 0.5), (2.0, 0.0))
    ]
    torch.testing.assert_close(sum(shares), whole)


# ---------------------------------------------------------------------------- agreement


def test_agreement_is_the_share_of_variance_and_the_cosine():
    teacher = draw(50, seed=2).double() + 3
    student = teacher + 0.5 * draw(50, seed=1)
    found = agreement(student.float(), teacher.float())
    error = np.square((student - teacher).numpy()).sum()
    about = np.square((teacher - teacher.mean(0)).numpy()).sum()
    assert found["r2"] == pytest.approx(1 - error / about, rel=1e-4)
    cosines = F.cosine_similarity(student, teacher, dim=1)
    assert found["cosine"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    mean = teacher.mean(0).expand(50, 8)
    assert agreement(mean, teacher)["r2"] == pytest.approx(0)
    assert agreement(teacher, teacher)["r2"] == 1
    assert agreement(mean, mean)["r2"] == 0  # there was nothing to learn
    assert set(agreement(teacher[:, :1], teacher[:, :1])) == {"r2"}


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_what_is_compared_is_what_the_loss_is_about(name, batch):
    """A student that equals the teacher has loss 0 and R2 1."""
    loss = Distillation(8, 8, loss=name, projector=False)
    loss.standardize(torch.zeros(8), torch.ones(8))
    rows = 8 if loss.level == "atoms" else 3
    same, other = draw(rows, seed=1), draw(rows, seed=2)
    assert agreement(*loss.compared(same, same, batch))["r2"] == pytest.approx(1)
    assert loss(same, same, batch).item() == pytest.approx(0, abs=1e-6)
    assert agreement(*loss.compared(other, same, batch))["r2"] < 0.9


# ---------------------------------------------------------------- projector and weights


def test_alpha_weighs_the_embedding_loss():
    two, ten = torch.tensor(2.0), torch.tensor(10.0)
    for alpha, total in ((0.0, 2.0), (0.25, 4.0), (1.0, 10.0)):
        assert float(Distillation(8, 8, alpha).total(two, ten)) == total


def test_the_projector_is_there_where_it_is_needed_or_wanted(batch):
    assert parameters(Distillation(8, 8)) == 0
    assert parameters(Distillation(8, 8, projector=True)) == 8 * 8 + 8
    # Standardised targets can be negative; embeddings after a softplus cannot.
    assert parameters(Distillation(8, 8, loss="standardized_crystals")) == 8 * 8 + 8
    distillation = Distillation(8, 12)
    assert parameters(distillation) == 8 * 12 + 12
    student, teacher = draw(8), draw(8, 12, seed=2)
    loss = distillation(student, teacher, batch)
    expected = atom_loss(distillation.projector(student), teacher, batch)
    torch.testing.assert_close(loss, expected)


def test_the_widths_are_those_of_the_level():
    between = Distillation.between
    atoms = between((8, 6), (12, 5), alpha=0.3)
    assert (atoms.level, atoms.standardizes, atoms.alpha) == ("atoms", False, 0.3)
    assert parameters(atoms) == 8 * 12 + 12
    crystals = between((8, 6), (None, 5), loss="standardized_crystals")
    assert (crystals.level, crystals.standardizes) == ("crystals", True)
    assert parameters(crystals) == 6 * 5 + 5
    with pytest.raises(
        InputError,
        match="`loss` is standardized_crystals, which compares crystals, but the "
        "teacher does not answer for crystals; choose published or standardized_atoms",
    ):
        between((8, 6), (12, None), loss="standardized_crystals")
    text = r"choose standardized_crystals or relations_crystals$"
    with pytest.raises(InputError, match=text):
        between((8, 6), (None, 5))


def test_wrong_distillations_are_refused(batch):
    with pytest.raises(InputError, match=r"`alpha` is 1.5 but must be in \[0, 1\]"):
        Distillation(8, 8, alpha=1.5)
    with pytest.raises(
        InputError, match="unknown `weighting` 'fade'; choose one of fixed, fading"
    ):
        Distillation(8, 8, weighting="fade")
    with pytest.raises(InputError, match=r"'publishd'; .* did you mean `published`"):
        Distillation(8, 8, loss="publishd")
    with pytest.raises(
        InputError,
        match="gives 65 numbers for atoms but the student has 64; set `projector=true`",
    ):
        Distillation(64, 65, projector=False)
    text = r"embeddings are \(7, 8\) but this batch needs \(8, 8\)"
    with pytest.raises(InputError, match=text):
        Distillation(8, 8)(draw(8), draw(7), batch)
