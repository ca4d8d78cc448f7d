"""Losses between a student and its teacher, beside second, plain implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, make_batch
from crysdistill.transfer import distillation as module
from crysdistill.transfer.distillation import (
    DISTILLATION_LOSSES,
    Distillation,
    atom_loss,
)
from tests.conftest import random_crystal
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
    # Opposite in one of three crystals: 4 / F there, whatever its number of atoms.
    for b in range(3):
        sign = torch.where(batch.batch == b, -1.0, 1.0).unsqueeze(1)
        loss = atom_loss(atoms * sign, atoms, batch)
        assert float(loss) == pytest.approx(4 / 8 / 3, rel=1e-5)


# -------------------------------------------------------------------- standardised


def standardised(level: str, mean: torch.Tensor, var: torch.Tensor) -> Distillation:
    found = Distillation(8, 8, loss=f"standardized_{level}")
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
    """A student that knows nothing has loss 1, one that knows all has 0."""
    teacher = 1e3 + 1e-2 * draw(3, seed=2).double()
    mean, var = teacher.mean(0), teacher.var(0, unbiased=False)
    loss = standardised("crystals", mean, var)
    ignorant = loss(torch.zeros(3, 8), teacher.float(), batch)
    assert ignorant.item() == pytest.approx(1.0, rel=0.02)  # float32 at 1000
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


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
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


# ------------------------------------------------------------------ of a student


def test_alpha_weighs_the_embedding_loss():
    two, ten = torch.tensor(2.0), torch.tensor(10.0)
    for alpha, total in ((0.0, 2.0), (0.25, 4.0), (1.0, 10.0)):
        assert float(Distillation(8, 8, alpha).total(two, ten)) == total


def test_the_projector_is_there_where_it_is_needed_or_wanted(batch):
    assert parameters(Distillation(8, 8)) == 0
    assert parameters(Distillation(8, 8, projector=True)) == 8 * 8 + 8
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
    with pytest.raises(InputError, match=r"choose standardized_crystals$"):
        between((8, 6), (None, 5))


def test_wrong_distillations_are_refused(batch):
    with pytest.raises(InputError, match=r"`alpha` is 1.5 but must be in \[0, 1\]"):
        Distillation(8, 8, alpha=1.5)
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
