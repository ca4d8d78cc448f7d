"""Neighbours: known coordination, a brute-force search, invariances, padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pymatgen.core import Structure

from crysdistill.errors import BadStructure, InputError
from crysdistill.graphs.neighbors import GraphSettings, find_neighbors
from tests.conftest import from_structure, random_crystal, structures


def brute_force(frac, cell, cutoff):
    """All (centre, neighbour, image, distance) within the cutoff, by three loops."""
    found = []
    images = list(itertools.product(range(-4, 5), repeat=3))
    for i, j, image in itertools.product(range(len(frac)), range(len(frac)), images):
        distance = np.linalg.norm((frac[j] + image - frac[i]) @ cell)
        if 1e-8 < distance <= cutoff:
            found.append((i, j, image, distance))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_nearest_equals_brute_force(seed):
    c = random_crystal(seed)
    g = find_neighbors(c.frac_coords, c.cell, GraphSettings(6.0, 12, "nearest"))
    every = brute_force(c.frac_coords, c.cell, 6.0)
    start = 0
    for i, count in enumerate(g.counts):
        nearest = sorted((d, j, image) for k, j, image, d in every if k == i)[:12]
        ours = slice(start, start + count)
        np.testing.assert_allclose(
            g.distances[ours], [d for d, _, _ in nearest], atol=1e-9
        )
        assert g.neighbor[ours].tolist() == [j for _, j, _ in nearest]
        assert g.shifts[ours].tolist() == [list(image) for _, _, image in nearest]
        start += count


@pytest.mark.parametrize("seed", range(4))
def test_radius_keeps_all_that_brute_force_finds(seed):
    c = random_crystal(seed)
    g = find_neighbors(c.frac_coords, c.cell, GraphSettings(7.0, mode="radius"))
    every = sorted(
        (i, round(d, 5), j, image)  # an atom and its images come in pairs
        for i, j, image, d in brute_force(c.frac_coords, c.cell, 7.0)
    )
    np.testing.assert_allclose(g.distances, [d for _, d, _, _ in every], atol=1e-5)
    assert g.neighbor.tolist() == [j for _, _, j, _ in every]
    assert g.shifts.tolist() == [list(image) for *_, image in every]
    centres = np.repeat(np.arange(len(c.frac_coords)), g.counts)
    assert centres.tolist() == [i for i, *_ in every]


@pytest.mark.parametrize(
    ("name", "cutoff", "count"),
    [("fcc-Cu", 4.0, 18), ("bcc-Fe", 2.6, 8), ("NaCl", 4.0, 18), ("diamond", 3.0, 28)],
)
def test_shells_within_a_radius(name, cutoff, count):
    """12 + 6; 8; 6 + 12; 4 + 12 + 12."""
    c = from_structure(name, structures()[name])
    g = find_neighbors(c.frac_coords, c.cell, GraphSettings(cutoff, mode="radius"))
    assert set(g.counts.tolist()) == {count}


def test_mode_radius_does_not_count_neighbours():
    assert GraphSettings(5.0, 99, "radius") == GraphSettings(5.0, 1, "radius")


# All atoms up to the end of the shell with the twelfth neighbour.
SHELLS = {
    "fcc-Cu": 12,
    "bcc-Fe": 14,  # 8 + 6
    "NaCl": 18,  # 6 + 12
    "CsCl": 14,  # 8 + 6
    "diamond": 16,  # 4 + 12
    "hcp-Mg": 12,  # 6 + 6
}


@pytest.mark.parametrize(("name", "count"), SHELLS.items())
def test_whole_shells_of_textbook_structures(name, count):
    c = from_structure(name, structures()[name])
    g = find_neighbors(c.frac_coords, c.cell, GraphSettings())
    assert set(g.counts.tolist()) == {count}


def signature(structure: Structure, settings: GraphSettings) -> list:
    """For each atom, its element and its neighbours' elements and distances."""
    c = from_structure("x", structure)
    g = find_neighbors(c.frac_coords, c.cell, settings)
    centre = np.repeat(np.arange(len(g.counts)), g.counts)
    rows = []
    for i, z in enumerate(c.atomic_numbers):
        own = centre == i
        around = zip(c.atomic_numbers[g.neighbor[own]], g.distances[own], strict=True)
        rows.append((int(z), tuple(sorted((int(n), round(d, 4)) for n, d in around))))
    return sorted(set(rows))


@pytest.mark.parametrize("name", structures())
def test_shells_do_not_depend_on_the_description_of_the_crystal(name):
    structure, settings = structures()[name], GraphSettings()
    reference = signature(structure, settings)
    shuffled = Structure.from_sites(list(reversed(structure.sites)))
    moved = structure.copy()
    moved.translate_sites(list(range(len(moved))), [0.13, 0.29, 0.41])
    supercell = structure.copy()
    supercell.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, 2]])
    for other in (shuffled, moved, supercell, structure.get_primitive_structure()):
        assert signature(other, settings) == reference


def test_cgcnn_mode_is_the_published_choice():
    for structure in structures().values():
        c = from_structure("x", structure)
        g = find_neighbors(c.frac_coords, c.cell, GraphSettings(mode="cgcnn"))
        published = [
            [n.index for n in sorted(around, key=lambda n: n.nn_distance)[:12]]
            for around in structure.get_all_neighbors(8.0)
        ]
        assert g.neighbor.tolist() == list(itertools.chain(*published))


def test_sparse_crystal_keeps_what_the_cutoff_holds():
    c = random_crystal(0, atoms=1)
    cell = np.diag([5.0, 7.5, 20.0])
    g = find_neighbors(c.frac_coords, cell, GraphSettings())
    assert g.distances.tolist() == pytest.approx([5.0, 5.0, 7.5, 7.5])


def test_no_neighbor_is_refused():
    c = random_crystal(0, atoms=1)
    with pytest.raises(
        BadStructure, match=r"no neighbour within 2\.0 Å of atom 0; increase `cutoff`"
    ):
        find_neighbors(c.frac_coords, np.eye(3) * 9, GraphSettings(cutoff=2.0))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cutoff": -1.0}, r"`cutoff` is -1\.0 but must be positive"),
        ({"cutoff": float("nan")}, r"`cutoff` is nan but must be positive"),
        ({"max_neighbors": 0}, r"`max_neighbors` is 0 but must be at least 1"),
        ({"mode": "shell"}, r"`mode` is 'shell' .*did you mean `shells`\?"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        GraphSettings(**settings)
