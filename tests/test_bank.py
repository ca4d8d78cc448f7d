"""The objective `bank`: scale, loss and numbers, on one rank and on two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import make_batch
from crysdistill.objectives import Bank, Clean, MaskedAtoms, make_objective
from crysdistill.objectives.bank import _scale
from crysdistill.objectives.targets import FAMILIES
from crysdistill.objectives.targets.surroundings import Surroundings
from crysdistill.ranks import rank, sum_over_ranks
from crysdistill.schema import documentation
from crysdistill.store.store import Store
from tests.conftest import agree, crystal, from_structure, random_crystal, structures
from tests.together import joined_call, together
from tests.toy_batches import embedded
from tests.toy_stores import labelled, write_store

RANDOM = [random_crystal(seed, 3 + seed, (1, 8, 17, 26, 72)) for seed in range(3)]


# ------------------------------------------------------------------- the objective


def made(width: int = 8, **settings) -> Bank:
    torch.manual_seed(0)
    return Bank(width, width, **settings)


class Says(torch.nn.Module):
    """A decoder that returns a fixed answer."""

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
    # The three elements have no f electrons, so those targets are left out.
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
    """Not by their numbers of columns; checked with plain loops."""
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
    """Neon has no electronegativity, so it and its neighbours lack that target."""
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
    # On average, the loss of a share equals that of all columns.
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
    for name, kind in FAMILIES.items():
        family = kind()
        assert family.name == name
        assert "Source" in FAMILIES[name].__doc__


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"families": {}}, "`families` is empty; name at least one"),
        (
            {"families": {"radail": 1.0}},
            "unknown family 'radail'; choose one of radial, angular, coordination, "
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
