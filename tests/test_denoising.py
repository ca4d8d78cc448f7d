"""The denoising objective: known moves, plain loops, both ends of a bond."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, distances, make_batch
from crysdistill.graphs.edits import move_atoms
from crysdistill.graphs.randomness import per_bond_uniform
from crysdistill.objectives import Chain, Denoising, MaskedAtoms, MovedAtoms
from tests.conftest import crystal, from_structure, random_crystal, structures
from tests.toy_batches import embed, gradients


def made(width: int = 8, **settings) -> Denoising:
    torch.manual_seed(0)
    return Denoising(width, width, **settings)


def crystals_of(count: int, mode: str = "shells", atoms: int = 5):
    most = 40 if mode == "cgcnn" else 6  # `cgcnn` pads with fake edges
    graph = GraphSettings(cutoff=4.0, max_neighbors=most, mode=mode)
    batch = make_batch([random_crystal(k, atoms) for k in range(count)], graph)
    batch.rows = torch.arange(count)
    return batch


def test_changes_of_a_known_move():
    """One of two atoms moves by 0.1 Å along the only bond."""
    cell = [[20, 0, 0], [0, 20, 0], [0, 0, 20]]
    pair = crystal("pair", cell, ["Na", "Cl"], [[0, 0, 0], [0.1, 0, 0]])
    batch = make_batch([pair], GraphSettings(cutoff=3.0))
    moved = move_atoms(batch, torch.tensor([[-0.1, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    objective = made(sigma=0.05)
    lengths, changes, levels = objective.wanted(embed(moved), batch)
    torch.testing.assert_close(lengths, torch.tensor([2.1, 2.1]))
    torch.testing.assert_close(changes, torch.tensor([2.0, 2.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(levels, torch.tensor([2.0]), atol=1e-4, rtol=0)


def test_an_atom_that_moves_with_its_images_changes_nothing():
    batch = make_batch(
        [from_structure("Cu", structures()["fcc-Cu"].get_primitive_structure())]
    )
    view = made().views[0](batch, 0)
    assert not torch.equal(view.frac_coords, batch.frac_coords)
    _, changes, levels = made().wanted(embed(view), batch)
    assert changes.abs().max() < 1e-3
    assert levels.abs().max() < 1e-3


@pytest.mark.parametrize("mode", ["shells", "cgcnn"])
def test_loss_against_plain_loops(mode):
    objective = made(bonds=0.5, longest=5.0)
    batch = crystals_of(3, mode)
    view = objective.views[0](batch, 2)
    seen = embed(view, dtype=torch.float32)
    before, after = distances(batch).tolist(), distances(view).tolist()
    fake = batch.padding.tolist() if mode == "cgcnn" else [False] * len(before)
    assert any(fake) == (mode == "cgcnn")
    draws = per_bond_uniform(batch, 2, "denoising bonds").tolist()
    wrong, squares = [], [[] for _ in range(3)]
    for e, (j, i) in enumerate(batch.edge_index.T.tolist()):
        if fake[e]:
            continue
        change = (after[e] - before[e]) / 0.05
        squares[int(batch.batch[i])].append(change**2)
        if draws[e] >= 0.5:
            continue
        grid = [math.exp(-(((after[e] - 0.2 * k) / 0.2) ** 2)) for k in range(26)]
        x = objective.of_atoms(seen.atoms[i] + seen.atoms[j])
        x = F.silu(x + objective.of_lengths(torch.tensor(grid)))
        said = objective.change[1](x)[0]
        wrong.append((said - change / math.sqrt(2 / 3)) ** 2)
    assert 10 < len(wrong) < sum(map(len, squares))
    level = []
    for k, own in enumerate(squares):
        wanted = math.sqrt(sum(own) / len(own))
        wanted = (wanted - math.sqrt(1 / 2)) / math.sqrt(1 / 6)
        level.append((objective.level(seen.crystals[k])[0] - wanted) ** 2)
    plain = (sum(wrong) / len(wrong) + sum(level) / 3) / 2
    ours = objective((seen,), batch, 2)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-4)
    wanted = (seen.atoms, seen.crystals, *objective.parameters())
    for a, b in zip(gradients(ours, *wanted), gradients(plain, *wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_about_one_for_whoever_knows_nothing():
    """In large crystals, where few atoms are neighbours of their own images."""
    batch = crystals_of(150, atoms=12)
    objective = made(bonds=1.0)
    view = objective.views[0](batch, 0)
    _, changes, levels = objective.wanted(embed(view), batch)
    assert (changes / math.sqrt(2 / 3)).square().mean().item() == pytest.approx(
        1, abs=0.2
    )
    levels = (levels - math.sqrt(1 / 2)) / math.sqrt(1 / 6)
    assert levels.mean().item() == pytest.approx(0, abs=0.2)
    assert levels.var().item() == pytest.approx(1, abs=0.2)


def test_a_bond_is_judged_alike_from_both_ends():
    objective = made(bonds=0.6)
    batch = crystals_of(2)
    seen = embed(objective.views[0](batch, 0), dtype=torch.float32)
    (said, wanted), _ = objective._compare(seen, batch, 0)
    asked = per_bond_uniform(batch, 0, "denoising bonds") < 0.6
    edges = zip(batch.edge_index.T.tolist(), batch.edge_shift.tolist(), strict=True)
    listed = [(j, i, *shift) for (j, i), shift in edges]
    listed = [edge for edge, kept in zip(listed, asked.tolist(), strict=True) if kept]
    found = 0
    for k, (j, i, a, b, c) in enumerate(listed):
        if (i, j, -a, -b, -c) in listed:
            back = listed.index((i, j, -a, -b, -c))
            assert said[k].item() == pytest.approx(said[back].item(), abs=1e-4)
            assert wanted[k].item() == pytest.approx(wanted[back].item(), abs=1e-3)
            found += 1
    assert found > 10


def test_a_step_in_half_precision_measures_in_full():
    objective = made()
    batch = crystals_of(2)
    seen = embed(objective.views[0](batch, 0), dtype=torch.float32)
    plain = objective.wanted(seen, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective.wanted(seen, batch)
        assert objective((seen,), batch, 0).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_numbers_of_perfect_answers():
    objective = made(bonds=0.5)
    batch = crystals_of(4)
    seen = embed(objective.views[0](batch, 0), dtype=torch.float32)
    found = [(wanted, wanted) for _, wanted in objective._compare(seen, batch, 0)]
    objective._compare = lambda *_: found
    objective.update((seen,), batch, 0)
    numbers = objective.compute()
    assert numbers["denoising_bond_r2"] == pytest.approx(1, abs=1e-3)
    assert numbers["denoising_level_r2"] == pytest.approx(1, abs=1e-3)
    assert numbers["denoising_bond_r2_chance"] == 0


def test_elements_may_be_hidden_too():
    assert made().views == (MovedAtoms(0.05, drawn=True),)
    both = (MaskedAtoms(0.2), MovedAtoms(0.03, drawn=True))
    assert made(sigma=0.03, mask_fraction=0.2).views == (Chain(both),)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sigma": 0.0}, "`sigma` is 0.0 but must be above 0 and at most 1 Å"),
        ({"bonds": 0.0}, "`bonds` is 0.0 but must be above 0 and at most 1"),
        ({"bonds": 1.5}, "`bonds` is 1.5 but must be above 0 and at most 1"),
        ({"longest": -1.0}, "`longest` is -1.0 but must be positive"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        made(**settings)
