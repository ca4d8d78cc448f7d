"""The surrogate objective: classes derived from a crystal, and their contrast."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import make_batch
from crysdistill.objectives import Supercell, Surrogate
from crysdistill.objectives.contrastive import LOSSES
from crysdistill.objectives.surrogate import stoichiometries
from tests.conftest import from_structure, structures
from tests.toy_batches import Toy, batch_of, embed, toy, with_space_groups


def formula(row: int, **counts: int) -> Toy:
    numbers = [int(z[1:]) for z, count in counts.items() for _ in range(count)]
    return Toy(row, numbers, [[0] for _ in numbers])


def test_a_formula_without_its_elements():
    batch = batch_of(
        [
            formula(0, z11=1, z17=1),  # NaCl
            formula(1, z55=4, z53=4),  # Cs4I4
            formula(2, z20=1, z9=2),  # CaF2
            formula(3, z12=4, z14=2),  # Mg4Si2
            formula(4, z13=2, z12=1, z8=4),  # spinel
            formula(5, z8=8, z12=2, z13=4),  # spinel, doubled and reordered
            formula(6, z29=5),  # an element
            formula(7, z26=1),
        ]
    )
    found = stoichiometries(batch)
    assert (found >= 0).all()
    assert (found < 1 << 24).all()
    assert (found[0::2] == found[1::2]).all()
    assert len(set(found.tolist())) == 4


def test_different_formulas_have_different_numbers():
    """All reduced formulas with up to four elements and eight atoms of each."""
    counts = [
        found
        for size in range(1, 5)
        for found in combinations_with_replacement(range(1, 9), size)
        if math.gcd(*found) == 1
    ]
    toys = [
        formula(row, **{f"z{k + 1}": n for k, n in enumerate(found)})
        for row, found in enumerate(counts)
    ]
    assert len(toys) > 400
    assert len(set(stoichiometries(batch_of(toys)).tolist())) == len(toys)


def test_a_larger_cell_is_of_the_same_class():
    names = ("fcc-Cu", "NaCl", "SrTiO3", "TiO2")
    batch = make_batch([from_structure(name, structures()[name]) for name in names])
    batch.space_groups = torch.tensor([225, 225, 221, 136])
    batch.rows = torch.arange(4)
    for classes in ("stoichiometry", "anion", "space_group"):
        objective = Surrogate(8, classes=classes)
        found = objective.classes(batch)
        assert torch.equal(objective.classes(Supercell(3)(batch, 0)), found)
    anions = Surrogate(8, classes="anion").classes(batch)
    assert anions.tolist() == [11, 17, 16, 16]


def test_unknown_space_groups_are_of_no_class():
    toys = with_space_groups([toy(row, 2) for row in range(3)], [0, 1, 230])
    found = Surrogate(8, classes="space_group").classes(batch_of(toys))
    assert found.tolist() == [-1, 0, 229]


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_that_of_the_classes_over_equal_scores(loss):
    toys = [formula(k, z11=1 + k % 2, z17=1, z8=k % 3) for k in range(8)]
    batch = batch_of(toys)
    torch.manual_seed(0)
    objective = Surrogate(8, classes="stoichiometry", loss=loss, projection=False)
    seen = embed(batch, dtype=torch.float32)
    labels = objective.classes(batch)
    assert 1 < len(set(labels.tolist())) < 8
    z = seen.crystals
    total, terms = LOSSES[loss](z, labels, z, labels, 0, 0.07)
    expected = total / terms / math.log(7)
    assert objective((seen,), batch, 0).item() == pytest.approx(expected.item())


def test_one_where_all_crystals_look_alike():
    batch = batch_of([formula(k, z11=1 + k % 2, z17=1) for k in range(8)])
    objective = Surrogate(8, classes="stoichiometry")
    seen = embed(batch, dtype=torch.float32)
    seen.crystals.data[:] = 1.0
    assert objective((seen,), batch, 0).item() == pytest.approx(1.0, rel=1e-4)


def test_retrieval_beside_its_chance():
    batch = batch_of([formula(k, z11=1 + k % 2, z17=1) for k in range(4)])
    objective = Surrogate(2, classes="stoichiometry", mask_fraction=0.0)
    seen = embed(batch, 2, dtype=torch.float32)
    seen.crystals.data[:] = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    objective.update((seen,), batch, 0)
    assert objective.compute() == {
        "surrogate_retrieval": 1.0,
        "surrogate_retrieval_chance": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"classes": "anions"}, "`classes` is 'anions' .* did you mean `anion`"),
        ({"loss": "supcom"}, "`loss` is 'supcom' .* did you mean `supcon`"),
        ({"temperature": 0.0}, "`temperature` is 0.0 but must be positive"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        Surrogate(8, **settings)
