"""Views: what they draw, hide, move and repeat; their batches stay consistent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import (
    GraphSettings,
    assemble,
    distances,
    make_batch,
    replace,
)
from crysdistill.graphs.edits import rebuild
from crysdistill.graphs.randomness import (
    per_atom_integers,
    per_atom_normal,
    per_atom_uniform,
    per_bond_uniform,
    per_crystal_uniform,
)
from crysdistill.objectives import (
    Chain,
    Clean,
    DroppedEdges,
    MaskedAtoms,
    MovedAtoms,
    Rebuilt,
    Strained,
    Supercell,
)
from crysdistill.structures.crystal import Crystal
from tests.conftest import random_crystal
from tests.toy_batches import batch_of, check_batch, toy

TOYS = [toy(row, atoms) for row, atoms in ((7, 5), (3, 1), (12, 40), (0, 2), (5, 12))]
GRAPH = GraphSettings(cutoff=6.0, max_neighbors=8)
CRYSTALS = [random_crystal(seed, 1 + seed) for seed in range(6)]

EVERY = (
    Clean(),
    MaskedAtoms(0.3),
    DroppedEdges(0.4),
    MovedAtoms(0.05),
    MovedAtoms(0.1, drawn=True),
    Strained(0.05),
    Supercell(),
    Supercell(3, axis=1),
    Rebuilt(GRAPH),
    Chain((Supercell(), MovedAtoms(0.3), Strained(0.1), Rebuilt(GRAPH))),
    Chain((MaskedAtoms(0.3), DroppedEdges(0.5), Supercell(), MovedAtoms()), name="b"),
)
"""Views of every kind."""


def rows_of(crystals, rows, settings=GRAPH):
    """A batch of crystals with these row numbers of a store."""
    batch = make_batch([crystals[row] for row in rows], settings)
    return replace(batch, rows=torch.tensor(rows))


# ------------------------------------------------------------------- the draws


def test_draws_belong_to_the_atom_and_not_to_the_batch():
    whole = per_atom_integers(batch_of(TOYS), 11, "test").split([5, 1, 40, 2, 12])
    for order in ([4, 2, 0, 1, 3], [2], [3, 1]):
        parts = [TOYS[k] for k in order]
        again = per_atom_integers(batch_of(parts), 11, "test")
        assert torch.equal(again, torch.cat([whole[k] for k in order]))


def test_draws_depend_on_seed_stream_row_and_atom():
    batch = batch_of([toy(1, 1000), toy(2, 1000)])
    one = per_atom_uniform(batch, 0, "masks")
    assert one.unique().numel() > 1990  # atoms and rows differ
    for other in (
        per_atom_uniform(batch, 1, "masks"),
        per_atom_uniform(batch, 0, "pairs"),
    ):
        assert (one == other).sum() < 3
        assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 0.1
    # The hash does not depend only on the sum of seed and row.
    shifted = batch_of([toy(2, 1000), toy(3, 1000)])
    assert (per_atom_uniform(shifted, -1, "masks") == one).sum() < 3


def test_draws_are_uniform_and_take_any_seed():
    batch = batch_of([toy(row, 100) for row in range(200)])
    for seed in (0, -5, 2**63, 10**30):
        u = per_atom_uniform(batch, seed, "x").double()
        assert 0 <= u.min() < u.max() < 1
        # 20,000 draws: the standard error of a tenth is 0.0021
        tenths = torch.histc(u.float(), 10, 0, 1) / len(u)
        assert (tenths - 0.1).abs().max() < 0.01
        assert u.mean() == pytest.approx(0.5, abs=0.01)
    assert per_atom_integers(batch, 3, "x").min() >= 0


def test_the_hash_is_splitmix64():
    """The first outputs of SplitMix64 seeded with 0 are known numbers."""
    from crysdistill.graphs import randomness

    state = torch.tensor([1, 2, 3]) * randomness._GAMMA
    words = [int(w) % 2**64 for w in randomness._mix(state)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


# ------------------------------------------------------------------- the views


def test_masked_atoms_hides_elements_and_says_which():
    batch = batch_of(TOYS)
    before = batch.atomic_numbers.clone()
    view = MaskedAtoms()(batch, 4)
    assert torch.equal(batch.atomic_numbers, before)
    assert "masked_atoms" not in batch
    hidden = view.masked_atoms
    assert (view.atomic_numbers[hidden] == 0).all()
    assert torch.equal(view.atomic_numbers[~hidden], before[~hidden])
    assert view.num_graphs == batch.num_graphs


def test_masked_atoms_hides_one_in_every_crystal_and_the_fraction_of_many():
    batch = batch_of([toy(row, 1 + row % 3) for row in range(60)])
    hidden = MaskedAtoms(1e-9)(batch, 0).masked_atoms
    per_crystal = torch.zeros(60).index_add(0, batch.batch, hidden.float())
    assert (per_crystal == 1).all()
    large = batch_of([toy(row, 200) for row in range(50)])
    share = MaskedAtoms(0.15)(large, 0).masked_atoms.float().mean()
    assert share == pytest.approx(0.15, abs=0.015)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_masked_atoms_never_hides_a_whole_crystal_of_several_atoms(fraction):
    """Not even if two views hide atoms, one after the other."""
    batch = batch_of([toy(row, 1 + row % 4) for row in range(80)])
    sizes = batch.ptr.diff()
    twice = Chain((MaskedAtoms(fraction), MaskedAtoms(fraction, name="again")))
    for view in (MaskedAtoms(fraction), twice):
        seen = view(batch, 0)
        assert torch.equal(seen.masked_atoms, seen.atomic_numbers == 0)
        hidden = torch.zeros(80).index_add(0, batch.batch, seen.masked_atoms.float())
        assert (hidden >= 1).all()
        assert (hidden[sizes > 1] < sizes[sizes > 1]).all()
        if fraction == 1.0:
            assert torch.equal(hidden, (sizes - 1).clamp(min=1).float())


def test_the_same_crystal_is_masked_alike_in_every_batch():
    alone = [MaskedAtoms(0.3)(batch_of([t]), 9).masked_atoms for t in TOYS]
    together = MaskedAtoms(0.3)(batch_of(TOYS[::-1]), 9).masked_atoms
    assert torch.equal(together, torch.cat(alone[::-1]))
    other_seed = MaskedAtoms(0.3)(batch_of(TOYS[::-1]), 10).masked_atoms
    assert not torch.equal(together, other_seed)


def test_equal_views_are_one_key():
    assert {Clean(), Clean(), MaskedAtoms(0.2), MaskedAtoms(0.2)} == {
        Clean(),
        MaskedAtoms(0.2),
    }
    assert MaskedAtoms(0.2, name="a") != MaskedAtoms(0.2)
    assert Chain([Clean(), MaskedAtoms(0.2)]) == Chain((Clean(), MaskedAtoms(0.2)))
    assert len(set(EVERY)) == len(EVERY)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match=r"`fraction` is .* above 0 and at most 1"):
        MaskedAtoms(fraction)


def test_draws_of_a_crystal_belong_to_its_row():
    rows = torch.arange(400)
    draws = per_crystal_uniform(rows, 50, 3, "dropout")
    order = torch.randperm(400)
    again = per_crystal_uniform(rows[order][:7], 50, 3, "dropout")
    assert torch.equal(again, draws[order][:7])
    assert draws.unique().numel() > 19_900
    # 20,000 draws: the standard error of a tenth is 0.0021
    tenths = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert (tenths - 0.1).abs().max() < 0.01
    assert not torch.equal(draws, per_crystal_uniform(rows, 50, 4, "dropout"))


def test_normal_draws_are_normal_and_belong_to_their_atom():
    batch = batch_of([toy(row, 100) for row in range(100)])
    z = per_atom_normal(batch, 3, 5, "moves").double()
    # 30,000 draws: standard errors of mean, variance and fourth moment
    assert z.mean() == pytest.approx(0, abs=4 * 0.006)
    assert z.var() == pytest.approx(1, abs=4 * 0.0082)
    assert (z**4).mean() == pytest.approx(3, abs=4 * 0.057)
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.04
    assert z.unique().numel() > 0.99 * z.numel()
    part = per_atom_normal(batch_of([toy(row, 100) for row in (40, 2)]), 3, 5, "moves")
    assert torch.equal(part.double(), torch.cat((z[4000:4100], z[200:300])))


def test_the_two_directions_of_a_bond_have_one_number():
    batch = rows_of(CRYSTALS, [3, 0, 5, 1], GraphSettings(cutoff=5.0, mode="radius"))
    draw = per_bond_uniform(batch, 2, "bonds").tolist()
    bonds = {}
    for (j, i), shift, u in zip(
        batch.edge_index.T.tolist(), batch.edge_shift.tolist(), draw, strict=True
    ):
        bonds[j, i, tuple(shift)] = u
    for (j, i, (a, b, c)), u in bonds.items():
        assert bonds[i, j, (-a, -b, -c)] == u
    assert len(set(bonds.values())) == len(bonds) / 2
    assert np.mean(draw) == pytest.approx(0.5, abs=0.05)
    # In another graph and batch, the same bonds get the same numbers.
    small = rows_of(CRYSTALS, [5], GraphSettings(max_neighbors=4))
    first = int(batch.ptr[2])
    for (j, i), shift, u in zip(
        small.edge_index.T.tolist(),
        small.edge_shift.tolist(),
        per_bond_uniform(small, 2, "bonds").tolist(),
        strict=True,
    ):
        assert bonds[first + j, first + i, tuple(shift)] == u


# ---------------------------------------------------------------------------- all views


@pytest.mark.parametrize("view", EVERY)
def test_a_view_stays_in_line_and_leaves_the_batch_alone(view):
    batch = rows_of(CRYSTALS, [4, 0, 5, 2])
    before = {name: t.clone() for name, t in batch.items() if torch.is_tensor(t)}
    for seed in range(3):
        seen = view(batch, seed)
        check_batch(seen)
        assert torch.equal(seen.rows, batch.rows)
        assert seen.num_graphs == batch.num_graphs
    assert {name for name, t in batch.items() if torch.is_tensor(t)} == before.keys()
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def crystal_of(batch, k):
    """All data of the k-th crystal of a batch, with atoms numbered from 0."""
    atoms = slice(int(batch.ptr[k]), int(batch.ptr[k + 1]))
    first, end = batch.neighbor_ptr[[atoms.start, atoms.stop]].tolist()
    found = {
        "numbers": batch.atomic_numbers[atoms],
        "cell": batch.cell[k],
        "edges": batch.edge_index[:, first:end] - atoms.start,
        "shift": batch.edge_shift[first:end],
    }
    if "masked_atoms" in batch:
        found["masked"] = batch.masked_atoms[atoms]
    if "copy_of" in batch:
        found["copy_of"] = batch.copy_of[atoms] - batch.copy_of[atoms.start]
    return found, batch.frac_coords[atoms]


@pytest.mark.parametrize("view", EVERY)
def test_a_crystal_is_seen_alike_in_every_batch(view):
    whole = view(rows_of(CRYSTALS, [0, 1, 2, 3, 4, 5]), 8)
    for rows in ([5, 3, 0], [4], [2, 1]):
        part = view(rows_of(CRYSTALS, rows), 8)
        for k, row in enumerate(rows):
            (one, frac), (other, same) = crystal_of(part, k), crystal_of(whole, row)
            assert one.keys() == other.keys()
            for name in one:
                assert torch.equal(one[name], other[name]), name
            torch.testing.assert_close(frac, same, atol=1e-6, rtol=0)


@pytest.mark.parametrize("view", EVERY)
def test_a_rank_without_crystals_has_views_too(view):
    none = torch.empty(0, dtype=torch.int64)
    batch = assemble(
        none,
        torch.empty(0, 3),
        torch.empty(0, 3, 3),
        none,
        none,
        torch.empty(0, 3, dtype=torch.int8),
        none,
        GRAPH,
        rows=none,
        space_groups=none,
    )
    seen = view(batch, 0)
    assert seen.num_graphs == seen.num_nodes == seen.num_edges == 0
    assert seen.neighbor_ptr.tolist() == seen.ptr.tolist() == [0]
    assert seen.edge_shift.dtype == torch.int8


def differ(one, other):
    return any(
        one[name].shape != other[name].shape or not torch.equal(one[name], other[name])
        for name in ("atomic_numbers", "frac_coords", "cell", "edge_index")
    )


@pytest.mark.parametrize(
    "view",
    [
        MaskedAtoms(0.3),
        DroppedEdges(0.3),
        MovedAtoms(0.1),
        Strained(0.1),
        Supercell(),
        Chain((MaskedAtoms(0.3), MovedAtoms())),
        Chain((MaskedAtoms(0.3), MovedAtoms()), name="a"),
    ],
)
def test_draws_differ_by_name_and_seed_and_are_shared_by_equal_views(view):
    batch = rows_of(CRYSTALS, [0, 1, 2, 3, 4, 5])
    one = view(batch, 3)
    equal = view.called(str(view.name))
    assert equal == view
    assert not differ(one, equal(batch, 3))
    assert view.called("other") != view
    assert differ(one, view.called("other")(batch, 3))
    assert differ(one, view(batch, 4))


def test_kinds_of_views_draw_apart():
    """Otherwise the hidden atoms would be those that move little."""
    views = [MaskedAtoms(), DroppedEdges(), MovedAtoms(), Strained(), Supercell()]
    assert len({view.called("a").stream for view in views}) == len(views)


# ---------------------------------------------------------------------------- each view


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_dropped_edges_leaves_out_bonds_in_both_directions(fraction):
    batch = rows_of(CRYSTALS * 8, list(range(48)), GraphSettings(6.0, mode="radius"))
    seen = DroppedEdges(fraction)(batch, 0)
    if fraction < 1:
        # 8,000 bonds: the standard error of the share is below 0.005
        assert 1 - seen.num_edges / batch.num_edges == pytest.approx(0.2, abs=0.02)
    edges = {
        (j, i, tuple(shift))
        for (j, i), shift in zip(
            seen.edge_index.T.tolist(), seen.edge_shift.tolist(), strict=True
        )
    }
    assert all((i, j, (-a, -b, -c)) in edges for j, i, (a, b, c) in edges)


@pytest.mark.parametrize("mode", ["shells", "nearest", "radius", "cgcnn"])
def test_dropped_edges_leaves_every_atom_a_real_one(mode):
    batch = rows_of(CRYSTALS, list(range(6)), GraphSettings(5.0, 12, mode))
    seen = DroppedEdges(1.0)(batch, 1)
    check_batch(seen)
    real = torch.ones(seen.num_edges, dtype=torch.bool)
    if mode == "cgcnn":
        assert seen.padding.sum() == batch.padding.sum() > 0
        real = ~seen.padding
    left = torch.bincount(seen.edge_index[1, real], minlength=seen.num_nodes)
    assert (left >= 1).all()
    assert left.float().mean() < 3


def moves(view, batch, seed=0):
    """The displacements of atoms, (N, 3) Å."""
    steps = view(batch, seed).frac_coords - batch.frac_coords
    return torch.einsum("na,nab->nb", steps, batch.cell[batch.batch])


def test_moved_atoms_have_the_sigma_that_was_asked_for():
    batch = rows_of([random_crystal(k, 8) for k in range(400)], list(range(400)))
    by = moves(MovedAtoms(0.1), batch)
    # 9,600 draws: the standard error of the deviation is 0.0007
    assert by.std() == pytest.approx(0.1, abs=0.003)
    assert by.mean() == pytest.approx(0.0, abs=0.004)
    drawn = moves(MovedAtoms(0.1, drawn=True), batch).view(400, 24)
    # for sigma uniform in (0, s), <sigma^2> = s^2 / 3
    assert drawn.square().mean().sqrt() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    own = drawn.square().mean(1).sqrt()
    assert own.min() < 0.01
    assert own.max() > 0.09
    assert torch.allclose(MovedAtoms(0.1)(batch, 0).cell, batch.cell)


def test_strains_are_symmetric_uniform_and_leave_coordinates():
    batch = rows_of([random_crystal(k, 1) for k in range(300)], list(range(300)))
    seen = Strained(0.05)(batch, 0)
    e = torch.linalg.inv(batch.cell) @ seen.cell - torch.eye(3)
    torch.testing.assert_close(e, e.mT, atol=1e-5, rtol=0)
    assert e.abs().max() <= 0.05 + 1e-5
    for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        # 300 draws: the standard error of the mean is 0.0017
        assert e[:, a, b].mean().abs() < 0.007
        assert e[:, a, b].std() == pytest.approx(0.05 / 3**0.5, rel=0.1)
    upper = e[:, *np.triu_indices(3)]
    assert torch.corrcoef(upper.T).fill_diagonal_(0).abs().max() < 0.2
    assert seen.frac_coords is batch.frac_coords
    assert seen.edge_index is batch.edge_index
    assert (
        torch.linalg.det(Strained(0.3)(batch, 1).cell / batch.cell.norm()) != 0
    ).all()


def test_no_strain_turns_a_cell_inside_out():
    batch = rows_of([random_crystal(k, 1) for k in range(300)], list(range(300)))
    before = torch.linalg.det(batch.cell)
    after = torch.linalg.det(Strained(0.3)(batch, 0).cell)
    assert (after * before > 0).all()


def test_supercells_are_longer_along_one_axis():
    batch = rows_of([random_crystal(k, 2) for k in range(300)], list(range(300)))
    seen = Supercell(3)(batch, 0)
    longer = (seen.cell.norm(dim=2) / batch.cell.norm(dim=2)).round().long()
    assert sorted({tuple(row) for row in longer.tolist()}) == [
        (1, 1, 3),
        (1, 3, 1),
        (3, 1, 1),
    ]
    # 300 draws: the standard deviation of a count is 8
    assert ((longer == 3).sum(0) - 100).abs().max() < 35
    fixed = Supercell(2, axis=1)(batch, 0)
    torch.testing.assert_close(fixed.cell[:, 1], 2 * batch.cell[:, 1])
    assert torch.equal(fixed.cell[:, [0, 2]], batch.cell[:, [0, 2]])
    assert fixed.num_nodes == 2 * batch.num_nodes


def test_masks_of_a_supercell_before_and_after():
    batch = rows_of(CRYSTALS, list(range(6)))
    before = Chain((MaskedAtoms(0.4), Supercell()))(batch, 0)
    hidden = MaskedAtoms(0.4)(batch, 0).masked_atoms
    assert torch.equal(before.masked_atoms, hidden[before.copy_of])
    after = Chain((Supercell(), MaskedAtoms(0.4)))(batch, 0)
    assert not torch.equal(after.masked_atoms, before.masked_atoms)


def test_a_chain_that_moves_much_ends_with_the_graph_of_what_it_shows():
    batch = rows_of(CRYSTALS, list(range(6)))
    far = Chain((MovedAtoms(0.4), Strained(0.2), Rebuilt(GRAPH)))(batch, 2)
    check_batch(far, GRAPH)
    assert not torch.equal(far.edge_index, batch.edge_index)
    again = rebuild(far, GRAPH)
    assert torch.equal(again.edge_index, far.edge_index)
    torch.testing.assert_close(distances(again), distances(far))


def test_a_crystal_that_would_fall_apart_keeps_its_edges():
    """Iron chains at 2.4 Å, strained beyond the cutoff; the other crystals follow."""
    chain = Crystal(
        "chain", np.array([26], np.uint8), np.zeros((1, 3)), np.eye(3) * 2.4
    )
    settings = GraphSettings(cutoff=2.41, mode="radius")
    close = Crystal(
        "close", np.array([1, 1], np.uint8), np.array([[0, 0, 0], [0.1, 0, 0]]),
        np.diag([10.0, 2.3, 2.3]),
    )  # fmt: skip
    batch = make_batch([close, chain, close], settings)
    stretched = replace(
        batch, cell=batch.cell * torch.tensor([1, 1.1, 1])[:, None, None]
    )
    seen = Rebuilt(settings)(stretched, 0)
    check_batch(seen)
    assert torch.equal(
        crystal_of(seen, 1)[0]["edges"], crystal_of(batch, 1)[0]["edges"]
    )
    # Hydrogen's neighbours: its images along two axes, and its partner, which nears.
    nearer = replace(stretched, frac_coords=stretched.frac_coords * 0.5)
    assert Rebuilt(GraphSettings(1.2, mode="radius"))(nearer, 0).num_edges == 2 + 6 + 2


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (DroppedEdges, {"fraction": 1.1}, "`fraction` is 1.1 but must be above 0"),
        (
            MovedAtoms,
            {"sigma": 0.0},
            "`sigma` is 0.0 but must be above 0 and at most 1",
        ),
        (MovedAtoms, {"sigma": 2.0}, "at most 1 Å"),
        (
            Strained,
            {"largest": 0.5},
            "`largest` is 0.5 but must be above 0 and at most",
        ),
        (Supercell, {"copies": 1}, "`copies` is 1 but must be between 2 and 8"),
        (Supercell, {"axis": 3}, "`axis` is 3 but must be 0, 1, 2 or None"),
        (
            Rebuilt,
            {"graph": GraphSettings(mode="cgcnn")},
            "use mode shells, nearest or",
        ),
        (Chain, {"views": ()}, "`views` is empty; name at least one"),
        (
            Chain,
            {"views": (MaskedAtoms(0.1), Clean(), MaskedAtoms(0.2))},
            "two views MaskedAtoms of a chain would draw alike; give one another",
        ),
    ],
)
def test_a_setting_out_of_range(kind, settings, text):
    with pytest.raises(InputError, match=text):
        kind(**settings)
