"""Families of targets: known answers, plain loops, and invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pymatgen.analysis.bond_valence import calculate_bv_sum
from pymatgen.core import Element, Lattice, Structure

from crysdistill.graphs.batch import GraphSettings, distances, edge_vectors, make_batch
from crysdistill.objectives.fingerprint import fingerprints
from crysdistill.objectives.targets import FAMILIES
from crysdistill.objectives.targets.angular import ORDERS, SHELLS, harmonics
from crysdistill.objectives.targets.coordination import REACHES, bond_valence_table
from crysdistill.objectives.targets.crystal import COMPOSITION
from crysdistill.objectives.targets.elements import (
    PROPERTIES,
    property_table,
    standard_table,
)
from crysdistill.objectives.targets.orbitals import OCCUPATIONS
from crysdistill.objectives.targets.surroundings import Surroundings
from tests.conftest import agree, crystal, from_structure, random_crystal, structures

RANDOM = [random_crystal(seed, 3 + seed, (1, 8, 17, 26, 72)) for seed in range(3)]

MADE = {name: kind() for name, kind in FAMILIES.items()}


def compute(name: str, batch) -> torch.Tensor:
    return MADE[name].compute(Surroundings(batch))


def columns(name: str, batch) -> dict[str, torch.Tensor]:
    """The targets of a family by the names of its columns."""
    found = compute(name, batch)
    names = [column.name for column in MADE[name].columns]
    assert found.shape[1] == len(names) == len(set(names))
    return dict(zip(names, found.T, strict=True))


def batch_of(*names: str):
    return make_batch([from_structure(name, structures()[name]) for name in names])


def neighbours(batch) -> list[list[tuple[int, float, np.ndarray]]]:
    """The neighbours of each atom: atomic number, distance and vector."""
    found = [[] for _ in range(batch.num_nodes)]
    vectors, lengths = edge_vectors(batch).double().numpy(), distances(batch).tolist()
    for e, (j, i) in enumerate(batch.edge_index.T.tolist()):
        found[i].append((int(batch.atomic_numbers[j]), lengths[e], vectors[e]))
    return found


# ------------------------------------------------------------------- the elements


def test_numbers_of_elements():
    names = ("electronegativity", "d_electrons", "unpaired_electrons", "log_mass")
    iron = property_table(names)[26]
    agree(iron, [1.83, 6, 4, math.log(55.845)])
    p, d, f = property_table(["p_electrons", "d_electrons", "f_electrons"])[[31, 72]].T
    assert p.tolist() == [1, 0]  # gallium, hafnium
    assert d.tolist() == [10, 2]
    assert f.tolist() == [0, 14]
    table = property_table(tuple(PROPERTIES))
    assert table.shape == (101, len(PROPERTIES))
    assert table[0].isnan().all()
    unknown = table[1:].isnan().sum(dim=0)
    assert dict(zip(PROPERTIES, unknown.tolist(), strict=True)) == {
        **dict.fromkeys(PROPERTIES, 0),
        "electronegativity": 3,  # He, Ne, Ar
        "covalent_radius": 4,  # from Bk on
    }
    standard = standard_table(["melting_point"])[1:]
    agree(torch.stack((standard.mean(), standard.square().mean())), [0, 1])


# ---------------------------------------------------------- every family by plain loops


def test_radial_is_the_fingerprint_and_more():
    batch = make_batch(RANDOM)
    family, found = MADE["radial"], compute("radial", batch)
    narrow = fingerprints(batch, family.narrow, family.narrow_weights)
    wide = fingerprints(batch, family.wide, family.wide_weights)
    agree(found[:, :60], narrow.sqrt())
    agree(found[:, 60:], wide / (1 + wide.abs()).sqrt())


def test_harmonics_add_up_to_legendre_polynomials():
    directions = torch.randn(20, 3, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    cosines = (directions @ directions.T).numpy()
    parts = harmonics(directions).split([2 * order + 1 for order in ORDERS], dim=1)
    for order, part in zip(ORDERS, parts, strict=True):
        expected = np.polynomial.legendre.legval(cosines, [0] * order + [1])
        agree(part @ part.T, expected, 1e-10)


def test_angular_equals_sums_over_pairs():
    batch = make_batch(RANDOM)
    found = columns("angular", batch)
    electronegativity = standard_table(["electronegativity"])[:, 0].tolist()
    for order in ORDERS:
        for middle, width in SHELLS:
            for weight in ("count", "electronegativity"):
                expected = []
                for own in neighbours(batch):
                    total = 0.0
                    for z1, d1, v1 in own:
                        for z2, d2, v2 in own:
                            w = [
                                1.0 if weight == "count" else electronegativity[z]
                                for z in (z1, z2)
                            ]
                            g = [
                                math.exp(-(((d - middle) / width) ** 2))
                                for d in (d1, d2)
                            ]
                            p = np.polynomial.legendre.legval(
                                v1 @ v2 / d1 / d2, [0] * order + [1]
                            )
                            total += w[0] * w[1] * g[0] * g[1] * p
                    expected.append(math.sqrt(max(total, 0)))
                name = f"{weight}, l = {order}, at {middle} Å"
                agree(found[name], expected, 2e-3)


# Steinhardt's order parameters of the first shell, doi:10.1103/PhysRevB.28.784.
@pytest.mark.parametrize(
    ("lattice", "neighbours_", "q4"),
    [("sc", 6, 0.76376), ("fcc", 12, 0.19094), ("diamond", 4, 0.50918)],
)
def test_angular_of_textbook_lattices(lattice, neighbours_, q4):
    if lattice == "sc":
        structure = Structure(Lattice.cubic(3.0), ["Po"], [[0, 0, 0]])
    elif lattice == "fcc":
        structure = Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(3 * 2**0.5), ["Cu"], [[0, 0, 0]]
        )
    else:
        structure = Structure.from_spacegroup(
            "Fd-3m", Lattice.cubic(3 * 4 / 3**0.5), ["C"], [[0, 0, 0]]
        )
    graph = GraphSettings(cutoff=3.1, max_neighbors=12)
    found = columns("angular", make_batch([from_structure(lattice, structure)], graph))
    for order in ORDERS:
        q = {4: q4, 3: 0.7454 if lattice == "diamond" else 0.0}.get(order, 0.0)
        moment = found[f"count, l = {order}, at 3.0 Å"]
        agree(moment, np.full(len(moment), neighbours_ * q), 3e-3)


def effective(own: list) -> tuple[list[float], float]:
    """Hoppe's weights of an atom's neighbours, and the nearest distance."""
    lengths = [d for _, d, _ in own]
    least = min(lengths)
    first = [math.exp(1 - (d / least) ** 6) for d in lengths]
    mean = sum(w * d for w, d in zip(first, lengths, strict=True)) / sum(first)
    return [math.exp(1 - (d / mean) ** 6) for d in lengths], least


def test_coordination_equals_plain_loops():
    batch = make_batch(RANDOM)
    radius, x = property_table(["covalent_radius", "electronegativity"]).T.tolist()
    unit = bond_valence_table().tolist()
    rows = []
    for z, own in zip(batch.atomic_numbers.tolist(), neighbours(batch), strict=True):
        weights, least = effective(own)
        number = sum(weights)
        mean = sum(w * d for w, (_, d, _) in zip(weights, own, strict=True)) / number
        relative = [d / (radius[z] + radius[zj]) for zj, d, _ in own]
        valence = [math.exp((unit[zj][z] - d) / 0.31) for zj, d, _ in own]
        apart = [x[zj] - x[z] for zj, _, _ in own]
        over = zip(weights, own, strict=True)
        spread = math.sqrt(sum(w * (d - mean) ** 2 for w, (_, d, _) in over) / number)
        signed = sum(v * np.sign(a) for v, a in zip(valence, apart, strict=True))
        total = sum(valence)
        rows.append(
            [
                *(
                    sum(1 / (1 + math.exp((r - c) / 0.05)) for r in relative)
                    for c in REACHES
                ),
                *(number, least, min(relative), mean, spread),
                sum(w * a for w, a in zip(weights, apart, strict=True)) / number,
                sum(w * abs(a) for w, a in zip(weights, apart, strict=True)) / number,
                total / math.sqrt(1 + total),
                signed / math.sqrt(1 + abs(signed)),
            ]
        )  # fmt: skip
    agree(compute("coordination", batch), rows, 1e-3)


@pytest.mark.parametrize(
    ("name", "element", "number"),
    [("NaCl", 0, 6), ("fcc-Cu", 0, 12), ("diamond", 0, 4), ("TiO2", 0, 6)],
)
def test_coordination_numbers_of_textbook_structures(name, element, number):
    found = columns("coordination", batch_of(name))
    assert found["effective coordination number"][element] == pytest.approx(
        number, abs=0.1
    )
    assert found["nearest distance"][element] == pytest.approx(
        {"NaCl": 2.82, "fcc-Cu": 2.5527, "diamond": 1.5446, "TiO2": 1.949}[name],
        abs=2e-3,
    )


def test_bond_valences_of_rock_salt():
    """The values of pymatgen, from the six nearest neighbours."""
    salt = structures()["NaCl"]
    graph = GraphSettings(cutoff=3.0, max_neighbors=6)
    found = columns("coordination", make_batch([from_structure("NaCl", salt)], graph))
    signed = found["compressed signed bond valence sum"].tolist()
    for row in (0, 4):
        expected = calculate_bv_sum(salt[row], salt.get_neighbors(salt[row], 3.0))
        assert abs(expected) == pytest.approx(0.84, abs=0.01)
        assert signed[row] == pytest.approx(
            expected / math.sqrt(1 + abs(expected)), abs=1e-3
        )


def test_orbitals_of_rock_salt_and_loops():
    found = columns("orbitals", batch_of("NaCl"))
    sodium, chlorine = 0, 4
    # Sodium's neighbours are chlorine, 3s2 3p5; chlorine's are sodium, 3s1.
    number = math.sqrt(6)
    assert found["s2 neighbours"][sodium] == pytest.approx(number, abs=0.02)
    assert found["p5 neighbours"][sodium] == pytest.approx(number, abs=0.02)
    assert found["s1 neighbours"][chlorine] == pytest.approx(number, abs=0.02)
    assert found["d1 neighbours"].max() == 0
    batch = make_batch(RANDOM)
    rows = np.zeros((batch.num_nodes, len(OCCUPATIONS)))
    for i, own in enumerate(neighbours(batch)):
        weights, _ = effective(own)
        for w, (z, _, _) in zip(weights, own, strict=True):
            text = Element.from_Z(z).electronic_structure.split("]")[-1].strip(".")
            for shell in text.split("."):
                rows[i, OCCUPATIONS.index(shell[1:])] += w
    agree(compute("orbitals", batch), np.sqrt(rows), 1e-3)


def test_densities_equal_sums_over_pairs():
    batch = make_batch(RANDOM)
    found = columns("densities", batch)
    radius = standard_table(["covalent_radius"])[:, 0].tolist()
    for order in (0, 1, 2):
        for middle in (1.5, 3.5):
            expected = [
                sum(
                    radius[z1] * radius[z2] * (v1 @ v2) ** order
                    * math.exp(-((d1 - middle) ** 2) - (d2 - middle) ** 2)
                    for z1, d1, v1 in own
                    for z2, d2, v2 in own
                )
                for own in neighbours(batch)
            ]  # fmt: skip
            name = f"covalent_radius, l = {order}, at {middle} Å"
            agree(found[name], np.sqrt(np.maximum(expected, 0)), 2e-3)


def test_charges_of_salts():
    found = columns("charges", batch_of("NaCl", "CsCl", "fcc-Cu"))
    sodium, chlorine, copper = found["charge"][[0, 4, -1]].tolist()
    assert 0.2 < sodium < 1
    assert chlorine == pytest.approx(-sodium, abs=1e-4)
    assert copper == pytest.approx(0, abs=1e-6)
    assert found["mean charge of bonded neighbours"][0] == pytest.approx(
        chlorine, abs=0.01
    )
    assert found["screened potential of the neighbours"][0] < 0


def test_charges_equal_plain_loops():
    batch = make_batch(RANDOM[:1])
    energy = property_table(["ionization_energy", "electron_affinity"]).double()
    z = batch.atomic_numbers.tolist()
    middle = [float(energy[k].mean()) for k in z]
    slope = [float(energy[k, 0] - energy[k, 1]) for k in z]
    edges: list[list[int]] = [[] for _ in z]
    for j, i in batch.edge_index.T.tolist():
        edges[i].append(j)
    weights = [effective(own)[0] for own in neighbours(batch)]
    charge = [0.0] * len(z)
    for turn in range(4):
        pull = [m + s * q for m, s, q in zip(middle, slope, charge, strict=True)]
        for i in range(len(z)):
            for j, w in zip(edges[i], weights[i], strict=True):
                giver = i if pull[j] > pull[i] else j
                moved = w / sum(weights[i]) * (pull[j] - pull[i]) / slope[giver]
                charge[i] += 0.5 ** (turn + 1) * moved
    expected = np.array(charge) - np.mean(charge)
    agree(columns("charges", batch)["charge"], expected, 1e-4)


def test_facts_of_textbook_crystals():
    found = columns("crystal", batch_of("NaCl", "fcc-Cu", "hcp-Mg"))
    agree(found["density"], [2.164, 8.97, 1.736], 6e-3)
    agree(found["volume per atom"][:2], [5.64**3 / 8, 3.61**3 / 4], 1e-3)
    assert found["elements"].tolist() == [2, 1, 1]
    agree(found["entropy of mixing"], [math.log(2), 0, 0])
    agree(found["anisotropy of bonds"], [0, 0, 0.01], 0.02)
    agree(found["nearest distance per edge of an atom's cube"][1], 2 ** (1 / 6))
    x = property_table(["electronegativity"])[[11, 17], 0].tolist()
    for name, value in (
        ("mean", sum(x) / 2),
        ("mean deviation of", (x[1] - x[0]) / 2),
        ("least", x[0]),
        ("largest", x[1]),
    ):
        assert found[f"{name} electronegativity"][0] == pytest.approx(value, abs=1e-4)


def test_composition_equals_plain_loops():
    batch = make_batch(RANDOM)
    table = property_table(COMPOSITION).double().numpy()
    rows = []
    for given in RANDOM:
        values = table[given.atomic_numbers]
        mean = values.mean(0)
        off = np.abs(values - mean).mean(0)
        rows.append(np.concatenate((mean, off, values.min(0), values.max(0))))
    agree(compute("crystal", batch)[:, -4 * len(COMPOSITION) :], rows, 1e-3)


def test_anisotropy_of_layers_and_chains():
    layer = crystal("layer", np.diag([2.5, 2.5, 9.0]), ["C"], [[0, 0, 0]])
    chain = crystal("chain", np.diag([9.0, 9.0, 2.5]), ["C"], [[0, 0, 0]])
    graph = GraphSettings(cutoff=2.6, max_neighbors=4)
    found = columns("crystal", make_batch([layer, chain], graph))
    agree(found["anisotropy of bonds"], [0.5, 1.0])
    agree(found["asymmetry of bonds"], [-0.125, 1.0])


# -------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_those_of_the_crystal(name):
    """They do not depend on orientation, origin, order of atoms or cell."""
    given = random_crystal(4, 5)
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    order = rng.permutation(5)
    moved = (given.frac_coords + rng.random(3))[order]
    other = replace(
        given,
        cell=given.cell @ turn,
        frac_coords=moved - np.floor(moved),
        atomic_numbers=given.atomic_numbers[order],
    )
    found = [compute(name, make_batch([c])) for c in (given, other)]
    atoms = MADE[name].level == "atoms"
    torch.testing.assert_close(
        found[1], found[0][order] if atoms else found[0], atol=2e-3, rtol=2e-3
    )
    double = replace(
        given,
        cell=given.cell * np.array([[2.0], [1.0], [1.0]]),
        frac_coords=np.concatenate(
            [(given.frac_coords + shift) / [2, 1, 1] for shift in ([0] * 3, [1, 0, 0])]
        ),
        atomic_numbers=np.tile(given.atomic_numbers, 2),
    )
    twice = compute(name, make_batch([double]))
    expected = found[0].repeat(2, 1) if atoms else found[0]
    torch.testing.assert_close(twice, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["NaCl", "fcc-Cu", "SrTiO3"])
def test_crystals_are_the_same_in_primitive_cells(name):
    whole = structures()[name]
    both = [from_structure(name, s) for s in (whole, whole.get_primitive_structure())]
    found = compute("crystal", make_batch(both))
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_fake_edges_say_nothing(name):
    # The published graph pads atoms with 2 neighbours or fewer to 12.
    few = [crystal("few", np.diag([3.0, 9.0, 9.0]), ["Si"], [[0, 0, 0]])]
    padded, plain = (
        make_batch(few, GraphSettings(cutoff=4.0, mode=mode))
        for mode in ("cgcnn", "nearest")
    )
    assert padded.num_edges == 12
    assert plain.num_edges == 2
    assert torch.equal(compute(name, padded), compute(name, plain))


def test_any_device_adds_as_the_compiled_loop_does():
    batch = make_batch(RANDOM)
    x, y = torch.rand(batch.num_edges, 3), torch.rand(batch.num_edges, 5)
    expected = np.zeros((batch.num_nodes, 3, 5))
    for e, i in enumerate(batch.edge_index[1].tolist()):
        expected[i] += np.outer(x[e], y[e])
    agree(Surroundings(batch).sum_of_products(x, y), expected, 1e-5)
