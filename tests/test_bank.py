"""The bank of targets: known answers, plain loops, invariances, the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pymatgen.analysis.bond_valence import calculate_bv_sum
from pymatgen.core import Element, Lattice, Structure

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, distances, edge_vectors, make_batch
from crysdistill.objectives import Bank, Clean, MaskedAtoms, make_objective
from crysdistill.objectives.bank import _scale
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
from crysdistill.ranks import rank, sum_over_ranks
from crysdistill.schema import documentation
from crysdistill.store.store import Store
from tests.conftest import crystal, from_structure, random_crystal, structures
from tests.together import joined_call, together
from tests.toy_batches import embedded
from tests.toy_stores import labelled, write_store

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
    """For each atom its neighbours: atomic number, distance and vector."""
    found = [[] for _ in range(batch.num_nodes)]
    vectors, lengths = edge_vectors(batch).double().numpy(), distances(batch).tolist()
    for e, (j, i) in enumerate(batch.edge_index.T.tolist()):
        found[i].append((int(batch.atomic_numbers[j]), lengths[e], vectors[e]))
    return found


def agree(found: torch.Tensor, expected, atol: float = 2e-4) -> None:
    np.testing.assert_allclose(found.double(), expected, atol=atol, rtol=1e-3)


RANDOM = [random_crystal(seed, 3 + seed, (1, 8, 17, 26, 72)) for seed in range(3)]


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


# -------------------------------------------------- every family by a plain program


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
    """As pymatgen has them, of the six nearest neighbours."""
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
    # Neighbours of sodium are chlorine, 3s2 3p5, and of chlorine sodium, 3s1.
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


# -------------------------------------------------------- what must change nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_those_of_the_crystal(name):
    """Not of its orientation, origin, order of atoms or cell."""
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
    # Atoms with 2 neighbours or fewer are filled up to 12 in the published graph.
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


# ------------------------------------------------------------------- the objective


def made(width: int = 8, **settings) -> Bank:
    torch.manual_seed(0)
    return Bank(width, width, **settings)


class Says(torch.nn.Module):
    """A decoder that has its answer ready."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.answer


def seen_of(batch) -> tuple:
    return (
        embedded(
            batch, torch.zeros(batch.num_nodes, 8), torch.zeros(len(batch.rows), 8)
        ),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("bank") / "s.h5"
    write_store(path, labelled(60))
    return Store.open(path)


@pytest.fixture(scope="module")
def prepared(store) -> Bank:
    objective = made()
    objective.prepare(store, np.arange(60))
    return objective


def test_columns_are_standardised_on_the_corpus(store, prepared):
    batch = store.batch(np.arange(60))
    for wanted, known in prepared.wanted(batch).values():
        for column, there in zip(wanted.T, known.T, strict=True):
            own = column[there]
            if not len(own):
                assert (column == 0).all()
            elif own.abs().max() < 6:  # nothing was clipped
                agree(torch.stack((own.mean(), own.std(correction=0))), [0, 1], 1e-3)
    # Three elements: no f electrons anywhere, and no target about them.
    radial = prepared.families["radial"].columns
    dead = [
        c.name for c, d in zip(radial, prepared.deviation, strict=False) if d.isnan()
    ]
    assert all("f_electrons" in name or "1.0 Å" in name for name in dead)


def test_knowing_the_means_gives_about_one(store, prepared):
    batch = store.batch(np.arange(60))
    answers = prepared.wanted(batch)
    objective = made()
    objective.prepare(store, np.arange(60))
    for level, (wanted, _) in answers.items():
        objective.decoders[level] = Says(torch.zeros_like(wanted))
    assert objective(seen_of(batch), batch, 0).item() == pytest.approx(1, abs=0.03)
    objective.update(seen_of(batch), batch, 0)
    for key, value in objective.compute().items():
        assert value == pytest.approx(0, abs=2e-3), key
    objective.reset()
    for level, (wanted, _) in answers.items():
        objective.decoders[level] = Says(wanted)
    assert objective(seen_of(batch), batch, 0) == 0
    objective.update(seen_of(batch), batch, 0)
    numbers = objective.compute()
    assert set(numbers) == {
        f"bank_{name}_r2{end}" for name in FAMILIES for end in ("", "_chance")
    }
    assert all(numbers[f"bank_{name}_r2"] == 1 for name in FAMILIES)
    for level, (wanted, _) in answers.items():
        objective.decoders[level] = Says(wanted + 3)
    objective.reset()
    objective.update(seen_of(batch), batch, 0)
    assert all(objective.compute()[f"bank_{name}_r2"] < -5 for name in FAMILIES)


def test_families_count_by_their_weights():
    """And not by their columns; loss and number by plain loops."""
    batch = make_batch(RANDOM)
    objective = made(families={"charges": 3.0, "crystal": 1.0}, mask_fraction=0.0)
    assert objective.views == (Clean(),)
    assert list(objective.families) == ["charges", "crystal"]
    loss, wrong = 0.0, {}
    for (level, (wanted, known)), weight in zip(
        objective.wanted(batch).items(), (0.75, 0.25), strict=True
    ):
        assert known.all()
        answer = torch.randn(wanted.shape)
        objective.decoders[level] = Says(answer)
        loss += weight * ((answer - wanted) ** 2).mean(0).mean().item()
        spread = ((wanted - wanted.mean(0)) ** 2).sum()
        wrong[level] = 1 - float(((answer - wanted) ** 2).sum() / spread)
    assert objective(seen_of(batch), batch, 0).item() == pytest.approx(loss, rel=1e-5)
    objective.update(seen_of(batch), batch, 0)
    numbers = objective.compute()
    for name, level in (("charges", "atoms"), ("crystal", "crystals")):
        assert numbers[f"bank_{name}_r2"] == pytest.approx(wrong[level], rel=1e-3)


def test_what_is_not_known_is_left_out():
    """Neon has no electronegativity: neither its neighbours' targets nor its own."""
    cell = np.diag([4.0, 4.1, 4.2])
    batch = make_batch(
        [
            crystal("with", cell, ["Ne", "Fe"], [[0, 0, 0], [0.5] * 3]),
            crystal("without", cell, ["Si", "Fe"], [[0, 0, 0], [0.5] * 3]),
        ]
    )
    objective = made(families={"coordination": 1.0})
    wanted, known = objective.wanted(batch)["atoms"]
    names = [column.name for column in objective.families["coordination"].columns]
    number = names.index("mean difference of electronegativity")
    assert known[:, number].tolist() == [False, False, True, True]
    assert known[:, names.index("nearest distance")].all()
    atoms = torch.zeros(4, 8, requires_grad=True)
    seen = (embedded(batch, atoms, torch.zeros(2, 8)),)
    answer = torch.randn(wanted.shape)
    objective.decoders["atoms"] = Says(answer)
    parts = [
        sum(float(a - w) ** 2 for a, w, k in zip(*column, strict=True) if k)
        / int(column[2].sum())
        for column in zip(answer.T, wanted.T, known.T, strict=True)
    ]
    expected = sum(parts) / len(parts)
    assert objective(seen, batch, 0).item() == pytest.approx(expected, rel=1e-5)
    objective = made(families={"coordination": 1.0})
    objective(seen, batch, 0).backward()
    assert atoms.grad.isfinite().all()


def test_targets_end_at_the_clip():
    batch = make_batch(RANDOM)
    highest = [
        max(w.abs().max().item() for w, _ in made(clip=clip).wanted(batch).values())
        for clip in (6.0, 2.0)
    ]
    assert highest == [6.0, 2.0]


def test_a_step_learns_a_random_share_of_columns():
    objective = made(share=0.25)
    drawn = torch.stack([objective._drawn(seed) for seed in range(60)])
    assert torch.equal(drawn[7], objective._drawn(7))
    sizes = [len(family.columns) for family in objective.families.values()]
    first = 0
    for size in sizes:
        own = drawn[:, first : first + size]
        first += size
        assert (own.sum(dim=1) == max(1, round(0.25 * size))).all()
        assert own.any(dim=0).all()
    batch = make_batch(RANDOM)
    losses = {objective(seen_of(batch), batch, seed).item() for seed in range(3)}
    assert len(losses) == 3
    whole = made(share=1.0)
    assert whole._drawn(0).all()
    assert len({whole(seen_of(batch), batch, seed).item() for seed in range(3)}) == 1
    # On average, a share of the columns is as hard as all of them.
    mean = np.mean([objective(seen_of(batch), batch, s).item() for s in range(60)])
    assert mean == pytest.approx(whole(seen_of(batch), batch, 0).item(), rel=0.1)


def test_hides_elements_but_asks_for_the_true_ones():
    objective = made()
    assert objective.views == (MaskedAtoms(0.15),)
    batch = make_batch(RANDOM)
    atoms, crystals = torch.randn(batch.num_nodes, 8), torch.randn(3, 8)
    one, other = (
        objective((embedded(shown, atoms, crystals),), batch, 0)
        for shown in (objective.views[0](batch, 0), batch)
    )
    assert one == other


def test_statistics_are_kept_and_saved(store, prepared):
    again = made()
    assert set(again.state_dict()) == {n for n, _ in again.named_parameters()}
    again.prepare(store, np.arange(60))
    saved = again.state_dict()
    assert {"mean", "deviation"} < set(saved)
    for name in ("mean", "deviation"):
        kept_one = getattr(prepared, name)
        assert torch.equal(saved[name].nan_to_num(), kept_one.nan_to_num())
    family = again.families["charges"]
    scale = _scale(family, store, np.arange(60))
    raw = family.compute(Surroundings(store.batch(np.arange(60)))).double()
    agree(torch.from_numpy(scale["mean"]), raw.mean(dim=0), 1e-5)
    agree(torch.from_numpy(scale["deviation"]), raw.std(dim=0, correction=0), 1e-5)


def test_keys_explain_every_family():
    said = documentation(Bank)["families"]
    assert all(f"`{name}`" in said for name in FAMILIES)
    for name, family in MADE.items():
        assert family.name == name
        assert "Source" in FAMILIES[name].__doc__


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"families": {}}, "`families` is empty; name at least one"),
        (
            {"families": {"radail": 1.0}},
            "unknown family 'radail'; choose of radial, angular, coordination, "
            "orbitals, densities, charges, crystal; did you mean `radial`",
        ),
        (
            {"families": {"radial": 0.0}},
            r"`families\.radial` is 0\.0 but must be positive",
        ),
        ({"share": 0.0}, r"`share` is 0\.0 but must be above 0 and at most 1"),
        ({"clip": -1.0}, r"`clip` is -1\.0 but must be positive"),
        (
            {"mask_fraction": 2.0},
            r"`mask_fraction` is 2\.0 but must be between 0 and 1",
        ),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        make_objective("bank", CGCNN(width=8, convolutions=1), **settings)


def test_a_corpus_that_teaches_nothing(tmp_path):
    copper = from_structure("Cu", structures()["fcc-Cu"])
    same = [replace(copper, material_id=f"Cu-{k}") for k in range(3)]
    write_store(tmp_path / "s.h5", same)
    with pytest.raises(
        InputError,
        match=r"no target of family `charges` varies over the 3 crystals looked at; "
        r"leave it out of `objectives\.bank\.families`",
    ):
        made(families={"charges": 1.0}).prepare(
            Store.open(tmp_path / "s.h5"), np.arange(3)
        )


# ----------------------------------------------------------------- several processes


def _two() -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Loss, numbers and gradients of five crystals, on one rank or dealt to two."""
    crystals = [random_crystal(seed, 2 + seed) for seed in range(5)]
    width = 8
    source = torch.Generator().manual_seed(1)
    atoms = torch.randn(sum(2 + s for s in range(5)), width, generator=source)
    pooled = torch.randn(5, width, generator=source)
    together_ = int(sum_over_ranks(torch.ones(1)))
    own = range(5) if together_ == 1 else ([0, 1, 2], [3, 4])[rank()]
    first = np.cumsum([0, *(2 + s for s in range(5))])
    batch = make_batch([crystals[k] for k in own])
    objective = made(share=0.5)
    seen = (
        embedded(
            batch,
            torch.cat([atoms[first[k] : first[k + 1]] for k in own]),
            pooled[list(own)],
        ),
    )
    loss = objective(seen, batch, 3)
    loss.backward()
    objective.update(seen, batch, 3)
    gradients = [sum_over_ranks(p.grad) for p in objective.parameters()]
    return sum_over_ranks(loss.detach()).item(), objective.compute(), gradients


def test_two_ranks_give_what_one_gives():
    one = joined_call(_two)
    two = together(2, joined_call, _two)
    for loss, numbers, gradients in two:
        assert loss == pytest.approx(one[0], rel=1e-5)
        assert numbers == pytest.approx(one[1], rel=1e-4)
        for found, expected in zip(gradients, one[2], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
