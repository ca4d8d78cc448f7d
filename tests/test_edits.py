"""Edits of batches: against plain loops, and against graphs of new crystals."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pytest
import torch

from crysdistill.errors import BadStructure, InputError
from crysdistill.graphs.batch import (
    CrystalBatch,
    GraphSettings,
    distances,
    edge_vectors,
    make_batch,
    replace,
)
from crysdistill.graphs.edits import (
    drop_edges,
    move_atoms,
    rebuild,
    repeat_cell,
    strain,
)
from crysdistill.graphs.neighbors import find_neighbors
from crysdistill.graphs.search import _search, search
from crysdistill.structures.crystal import Crystal
from tests.conftest import random_crystal
from tests.toy_batches import check_batch

MODES = ("shells", "nearest", "radius", "cgcnn")


def some(mode: str = "shells", cutoff: float = 5.0) -> CrystalBatch:
    crystals = [random_crystal(seed, atoms) for seed, atoms in enumerate((3, 1, 7, 2))]
    return make_batch(crystals, GraphSettings(cutoff, 8, mode))


def lists(batch: CrystalBatch) -> list[list[tuple[int, tuple[int, ...]]]]:
    """The neighbours of each atom, with their lattice translations."""
    found = [[] for _ in range(batch.num_nodes)]
    for (j, i), shift in zip(
        batch.edge_index.T.tolist(), batch.edge_shift.tolist(), strict=True
    ):
        found[i].append((j, tuple(shift)))
    return found


def test_check_batch_finds_what_is_wrong():
    batch = some()
    check_batch(batch)
    wrong = {
        "edge_index": batch.edge_index.flip(1),
        "edge_shift": batch.edge_shift[1:],
        "neighbor_ptr": batch.neighbor_ptr.roll(1),
        "ptr": batch.ptr[1:],
        "atomic_numbers": batch.atomic_numbers[1:],
        "batch": batch.batch.flip(0),
    }
    for name, tensor in wrong.items():
        with pytest.raises((AssertionError, ValueError)):
            check_batch(replace(batch, **{name: tensor}))


# -------------------------------------------------------------- the same graph


@pytest.mark.parametrize("mode", MODES)
def test_drop_edges_against_lists(mode):
    batch = some(mode)
    dropped = torch.rand(batch.num_edges, generator=torch.manual_seed(0)) < 0.3
    seen = drop_edges(batch, dropped)
    check_batch(seen)
    kept = iter((~dropped).tolist())
    assert lists(seen) == [[edge for edge in own if next(kept)] for own in lists(batch)]
    torch.testing.assert_close(distances(seen), distances(batch)[~dropped])
    if mode == "cgcnn":
        assert torch.equal(seen.padding, batch.padding[~dropped])


def test_drop_edges_may_leave_an_atom_without():
    """`drop_edges` drops all it is told to; views keep one edge for each atom."""
    batch = some()
    none = drop_edges(batch, torch.ones(batch.num_edges, dtype=torch.bool))
    assert none.num_edges == 0
    assert none.neighbor_ptr.tolist() == [0] * (batch.num_nodes + 1)


@pytest.mark.parametrize("mode", MODES)
def test_moved_atoms_have_the_distances_of_their_places(mode):
    batch = some(mode)
    by = 0.3 * torch.randn(batch.num_nodes, 3, generator=torch.manual_seed(0))
    seen = move_atoms(batch, by)
    check_batch(seen)
    neighbour, centre = batch.edge_index
    expected = edge_vectors(batch) + by[neighbour] - by[centre]
    torch.testing.assert_close(edge_vectors(seen), expected, atol=1e-5, rtol=0)
    assert torch.equal(seen.edge_index, batch.edge_index)


@pytest.mark.parametrize("mode", MODES)
def test_strained_vectors(mode):
    batch = some(mode)
    by = 0.05 * torch.randn(batch.num_graphs, 3, 3, generator=torch.manual_seed(0))
    seen = strain(batch, by)
    check_batch(seen)
    for e, v in enumerate(edge_vectors(batch)):
        crystal = batch.batch[batch.edge_index[1, e]]
        expected = v @ (torch.eye(3) + by[crystal])
        torch.testing.assert_close(edge_vectors(seen)[e], expected, atol=1e-5, rtol=0)


def test_a_hydrostatic_strain_scales_all_distances():
    batch = some()
    seen = strain(batch, 0.02 * torch.eye(3).expand(batch.num_graphs, 3, 3))
    torch.testing.assert_close(distances(seen), 1.02 * distances(batch))


# ----------------------------------------------------------------- larger cells


def repeated(crystal: Crystal, times: tuple[int, int, int]) -> Crystal:
    """A supercell, copy by copy; the last axis varies fastest."""
    places = list(itertools.product(*map(range, times)))
    frac = np.concatenate([(crystal.frac_coords + place) / times for place in places])
    return Crystal(
        crystal.material_id,
        np.tile(crystal.atomic_numbers, len(places)),
        frac,
        crystal.cell * np.array(times)[:, None],
    )


TIMES = [(2, 1, 1), (1, 1, 1), (1, 3, 2), (2, 2, 4)]


@pytest.mark.parametrize("mode", ["shells", "radius"])
def test_a_repeated_cell_has_the_graph_of_a_search_in_it(mode, crystals):
    settings = GraphSettings(5.5, 10, mode)
    small = [random_crystal(0, 5), crystals[2], crystals[7], random_crystal(3, 1)]
    seen = repeat_cell(make_batch(small, settings), torch.tensor(TIMES))
    check_batch(seen, settings)
    large = [repeated(c, times) for c, times in zip(small, TIMES, strict=True)]
    expected = make_batch(large, settings)
    assert list(map(set, lists(seen))) == list(map(set, lists(expected)))
    for name in ("atomic_numbers", "ptr", "batch", "neighbor_ptr"):
        assert torch.equal(seen[name], expected[name]), name
    torch.testing.assert_close(seen.frac_coords, expected.frac_coords)
    torch.testing.assert_close(seen.cell, expected.cell)


@pytest.mark.parametrize("mode", MODES)
def test_every_copy_hears_at_the_distances_of_its_original(mode):
    batch = some(mode)
    seen = repeat_cell(batch, torch.tensor(TIMES))
    check_batch(seen)
    lengths, numbers = distances(batch), batch.atomic_numbers[batch.edge_index[0]]
    for atom, original in enumerate(seen.copy_of.tolist()):
        own = slice(*seen.neighbor_ptr[atom : atom + 2].tolist())
        its = slice(*batch.neighbor_ptr[original : original + 2].tolist())
        torch.testing.assert_close(
            distances(seen)[own], lengths[its], atol=2e-5, rtol=0
        )
        heard = seen.atomic_numbers[seen.edge_index[0, own]]
        assert torch.equal(heard, numbers[its])
        assert torch.equal(
            seen.copy_of[seen.edge_index[0, own]], batch.edge_index[0, its]
        )


def test_copies_of_copies_know_the_first():
    batch = replace(some(), masked_atoms=torch.arange(13) % 2 == 0)
    twice = repeat_cell(batch, torch.tensor([[2, 1, 1]] * 4))
    twice = repeat_cell(twice, torch.tensor([[1, 1, 3]] * 4))
    check_batch(twice)
    assert torch.bincount(twice.copy_of).tolist() == [6] * 13
    assert torch.equal(twice.atomic_numbers, batch.atomic_numbers[twice.copy_of])
    assert torch.equal(twice.masked_atoms, batch.masked_atoms[twice.copy_of])
    once = repeat_cell(batch, torch.tensor([[2, 1, 3]] * 4))
    assert torch.equal(distances(once).sort().values, distances(twice).sort().values)


# ----------------------------------------------------------------------- rebuilt graphs


def found_one_by_one(crystals, settings):
    graphs = [find_neighbors(c.frac_coords, c.cell, settings) for c in crystals]
    starts = np.cumsum([0, *(len(c.frac_coords) for c in crystals)])
    return (
        np.concatenate([g.neighbor + s for g, s in zip(graphs, starts, strict=False)]),
        np.concatenate([g.shifts for g in graphs]),
        np.concatenate([g.counts for g in graphs]),
    )


def searched(crystals, settings):
    return search(
        np.concatenate([c.frac_coords for c in crystals]),
        np.stack([c.cell for c in crystals]),
        np.cumsum([0, *(len(c.frac_coords) for c in crystals)]),
        settings,
    )


SETTINGS = (
    GraphSettings(),
    GraphSettings(4.0, 3),
    GraphSettings(mode="nearest"),
    GraphSettings(7.0, 40, "nearest"),
    GraphSettings(5.0, mode="radius"),
    GraphSettings(11.0, mode="radius"),  # more than the first buffer holds
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_search_finds_what_one_search_for_each_crystal_finds(settings, crystals):
    """The same edges in the same order, even for equal distances."""
    several = [random_crystal(seed, 1 + 3 * seed) for seed in range(8)]
    several = [*crystals, *several] if settings.cutoff > 4 else several[2:]
    for ours, theirs in zip(
        searched(several, settings), found_one_by_one(several, settings), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_the_search_takes_flat_and_skewed_cells():
    """A cell of 2 x 3 x 40 Å, and one with nearly parallel vectors."""
    rng = np.random.default_rng(0)
    flat = Crystal("a", np.ones(5, np.uint8), rng.random((5, 3)), np.diag([2, 3, 40.0]))
    skewed = np.array([[3.0, 0, 0], [2.5, 1.5, 0], [2.5, 1.4, 2.0]])
    skewed = Crystal("b", np.ones(3, np.uint8), rng.random((3, 3)), skewed)
    left_handed = Crystal("c", flat.atomic_numbers, flat.frac_coords, -flat.cell)
    for settings in SETTINGS[::2]:
        several = [flat, skewed, left_handed]
        for ours, theirs in zip(
            searched(several, settings),
            found_one_by_one(several, settings),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_where_the_search_begins_does_not_matter():
    """The start radius may hold too few atoms, or cut a shell, in steps of 0.001 Å."""
    cubic = np.eye(3)[None] * 6.0
    frac = np.array(list(itertools.product((0.0, 0.5), repeat=3)))
    frac += np.random.default_rng(0).uniform(-5e-4, 5e-4, frac.shape)  # 0.003 Å
    ptr, per_plane = np.array([0, 8]), np.full((1, 3), 1 / 6)

    def begun(start: float, wanted: int, whole_shells: bool) -> list:
        start = np.array([start])
        found = _search(frac, cubic, per_plane, ptr, start, 5.5, wanted, whole_shells)
        return [array.tolist() for array in found]

    for wanted, whole_shells in itertools.product((1, 6, 7, 18, 20), (True, False)):
        expected = begun(5.5, wanted, whole_shells)
        for start in (0.1, 3.1, 4.3, *np.arange(2.98, 3.02, 1e-3)):
            assert begun(start, wanted, whole_shells) == expected


@pytest.mark.parametrize("length", [4.0, 2.7, 3.0])
def test_an_edge_as_long_as_the_cutoff_is_one(length):
    cubic = Crystal("x", np.ones(1, np.uint8), np.zeros((1, 3)), np.eye(3) * length)
    settings = GraphSettings(2 * length, mode="radius")
    counts = searched([cubic], settings)[2]
    # 6 at 1, 12 at sqrt 2, 8 at sqrt 3, 6 at 2
    assert counts.tolist() == [32] == found_one_by_one([cubic], settings)[2].tolist()


@pytest.mark.parametrize("mode", ["shells", "nearest", "radius"])
def test_a_rebuilt_batch_is_the_batch_made_from_its_crystals(mode):
    settings = GraphSettings(6.0, 9, mode)
    crystals = [random_crystal(seed, 4 + seed) for seed in range(5)]
    expected = make_batch(crystals, settings)
    other = make_batch(crystals, GraphSettings(4.0, 5, "cgcnn"))
    seen = rebuild(other, settings)
    check_batch(seen, settings)
    assert set(seen.keys()) == set(expected.keys())
    for name, tensor in expected.items():
        if torch.is_tensor(tensor):
            assert seen[name].dtype == tensor.dtype
            assert torch.equal(seen[name], tensor), name
    assert seen.padding_distance == expected.padding_distance
    assert "padding" in other


def test_rebuilding_takes_coordinates_that_are_not_wrapped():
    settings = GraphSettings(6.0, 9)
    batch = make_batch([random_crystal(seed, 5) for seed in range(4)], settings)
    away = torch.randint(-2, 3, (20, 3), generator=torch.manual_seed(0))
    seen = rebuild(replace(batch, frac_coords=batch.frac_coords + away), settings)
    check_batch(seen, settings)
    neighbour, centre = seen.edge_index
    shift = seen.edge_shift + away[neighbour] - away[centre]
    edges = set(map(tuple, torch.cat((seen.edge_index.T, shift), dim=1).tolist()))
    expected = torch.cat((batch.edge_index.T, batch.edge_shift), dim=1).tolist()
    assert edges == set(map(tuple, expected))


def test_rebuilding_names_the_lonely_atom():
    near = Crystal(
        "near", np.array([8, 8], np.uint8), np.array([[0, 0, 0], [0.1, 0, 0]]),
        np.eye(3) * 12,
    )  # fmt: skip
    far = Crystal(
        "far", np.array([8, 8], np.uint8), np.array([[0, 0, 0], [0.4, 0, 0]]),
        np.eye(3) * 12,
    )  # fmt: skip
    batch = make_batch([near, far])
    text = r"far: no neighbour within 3\.0 Å of atom 0; increase `cutoff`"
    with pytest.raises(BadStructure, match=text):
        rebuild(batch, GraphSettings(3.0))
    unnamed = replace(batch, material_ids=None, rows=torch.tensor([4, 17]))
    with pytest.raises(BadStructure, match=r"row 17: no neighbour within 3\.0 Å"):
        rebuild(unnamed, GraphSettings(3.0))
    kept = rebuild(batch, GraphSettings(3.0), lonely="keep")
    check_batch(kept)
    # The near pair has edges to itself only; the far pair keeps its edges within 8 Å.
    assert lists(kept)[:2] == [[(1, (0, 0, 0))], [(0, (0, 0, 0))]]
    assert lists(kept)[2:] == lists(batch)[2:]


def test_a_crystal_that_keeps_its_edges_loses_fake_ones():
    far = random_crystal(0, 1)
    batch = make_batch([far, far], GraphSettings(6.0, 30, "cgcnn"))
    kept = rebuild(batch, GraphSettings(2.0), lonely="keep")
    check_batch(kept)
    assert "padding" not in kept
    assert kept.num_edges == (~batch.padding).sum() < batch.num_edges


def test_a_graph_of_mode_cgcnn_is_not_rebuilt():
    with pytest.raises(InputError, match=r"a graph of mode cgcnn cannot be found anew"):
        rebuild(some(), GraphSettings(mode="cgcnn"))


def test_the_search_on_real_crystals(shared_data):
    crystals = []
    with gzip.open(shared_data / "mp36k" / "structures.jsonl.gz", "rt") as file:
        for line in itertools.islice(file, 0, None, 60):
            entry = json.loads(line)
            # Rounded as in a store. Between lengths of six decimals, the last bit of
            # a float64 would decide ties after rounding to five.
            frac = np.array(entry["frac"], np.float32).astype(np.float64)
            cell = np.array(entry["lattice"], np.float32).astype(np.float64)
            numbers = np.ones(len(frac), np.uint8)
            crystals.append(Crystal(entry["id"], numbers, frac - np.floor(frac), cell))
    assert len(crystals) > 500
    for settings in (GraphSettings(9.5), GraphSettings(9.5, mode="nearest")):
        for ours, theirs in zip(
            searched(crystals, settings),
            found_one_by_one(crystals, settings),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
