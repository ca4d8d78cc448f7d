"""What all objectives share; element reconstruction; space groups."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, make_batch
from crysdistill.objectives import (
    CRYSGNN,
    OBJECTIVES,
    Clean,
    DroppedEdges,
    Embedded,
    MaskedAtoms,
    NodeFeatures,
    Objective,
    SpaceGroup,
    make_objective,
)
from crysdistill.objectives.objective import balanced_weights
from crysdistill.structures.elements import cgcnn92
from tests.conftest import crystal, random_crystal
from tests.toy_batches import (
    batch_of,
    embed,
    embedded,
    gradients,
    reordered,
    toy,
    with_space_groups,
)
from tests.toy_stores import open_store

TOYS = [toy(row, atoms) for row, atoms in ((7, 5), (3, 1), (12, 40), (0, 2), (5, 12))]


LABEL_FREE = [n for n in OBJECTIVES if n not in ("properties", "teacher")]
COMPARING = [
    *("space_group", "crystal_system", "surrogate"),  # no labels here
    *("barlow", "vicreg", "simsiam", "infomax"),  # compare crystals of a batch
]


def made(name: str, width: int = 8, **settings) -> Objective:
    return make_objective(name, CGCNN(width=width, convolutions=1), **settings)


def shown(objective: Objective, batch: CrystalBatch, seed: int) -> tuple[Embedded, ...]:
    """The input of an objective for a batch, with random embeddings."""
    return tuple(
        embed(view(batch, seed), dtype=torch.float32) for view in objective.views
    )


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


# --------------------------------------------------------------------- shared behaviour


def test_parameter_counts_of_crysgnn():
    four = {name: made(name, 64, published=True) for name in CRYSGNN}
    assert {name: parameters(module) for name, module in four.items()} == {
        "node_features": 5_980,
        "connectivity": 24_582 + 42,
        "space_group": 14_950,
        "crystal_system": 0,
    }
    encoder = CGCNN(convolutions=5, bias=False, normalize=True)
    assert parameters(encoder, *four.values()) == 162_162


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", LABEL_FREE)
def test_numbers_are_no_part_of_the_weights(name, published):
    objective = made(name, published=published)
    assert set(objective.state_dict()) == {n for n, _ in objective.named_parameters()}
    batch = batch_of(with_space_groups(TOYS, [1, 2, 225, 229, 225]))
    seen = shown(objective, batch, 0)
    objective.update(seen, batch, 0)
    numbers = objective.compute()
    chances = {key for key in numbers if key.endswith("_chance")}
    assert {f"{key}_chance" for key in set(numbers) - chances} == chances
    assert all(type(v) is float for v in numbers.values())
    assert all(within(name, v) for name, v in numbers.items())
    assert set(objective.state_dict()) == {n for n, _ in objective.named_parameters()}
    objective.reset()
    objective.update(seen, batch, 0)
    assert objective.compute() == pytest.approx(numbers, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", LABEL_FREE)
def test_a_batch_with_nothing_to_say_gives_a_connected_zero(name, published):
    """One crystal of unknown symmetry: no label to classify, no pair to contrast."""
    objective = made(name, published=published)
    batch = batch_of([toy(1, 3)])
    seen = shown(objective, batch, 0)
    loss = objective(seen, batch, 0)
    loss.backward()
    assert loss.isfinite()
    if name in COMPARING:
        assert loss == 0
        assert all((view.crystals.grad == 0).all() for view in seen)
    else:
        assert (seen[0].atoms.grad != 0).any()
    for parameter in objective.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    objective.update(seen, batch, 0)
    numbers = objective.compute()
    assert all(math.isnan(v) or within(name, v) for name, v in numbers.items())


def within(name: str, value: float) -> bool:
    """Return whether a number is possible.

    An R2 has no lower bound, and is NaN for constant targets.
    """
    if name.endswith("_r2"):
        return math.isnan(value) or value <= 1
    return 0 <= value <= 1


def picked(objective, whole, part, batch, order, seed) -> tuple[Embedded, ...]:
    """The embeddings of some crystals, moved from one batch to another."""
    return tuple(
        embedded(
            view(part, seed),
            torch.cat([seen.atoms[batch.ptr[k] : batch.ptr[k + 1]] for k in order]),
            seen.crystals[order],
        )
        for view, seen in zip(objective.views, whole, strict=True)
    )


@pytest.mark.parametrize("name", LABEL_FREE)
def test_numbers_add_up_over_batches(name):
    toys = with_space_groups(TOYS, [225, 0, 2, 221, 14])
    objective = made(name)
    batch = batch_of(toys)
    whole = shown(objective, batch, 0)
    objective.update(whole, batch, 0)
    expected = objective.compute()
    objective.reset()
    for k in range(len(toys)):
        part = batch_of([toys[k]])
        objective.update(picked(objective, whole, part, batch, [k], 0), part, 0)
    assert not all(map(math.isnan, expected.values()))
    assert objective.compute() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", LABEL_FREE)
def test_the_loss_does_not_depend_on_the_order_of_crystals(name, published):
    toys = with_space_groups(TOYS, [225, 221, 2, 14, 11])
    objective = made(name, published=published)
    order = [2, 4, 0, 3, 1]
    forward, shuffled = batch_of(toys), batch_of([toys[k] for k in order])
    seen = shown(objective, forward, 5)
    again = picked(objective, seen, shuffled, forward, order, 5)
    losses = objective(seen, forward, 5), objective(again, shuffled, 5)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


@pytest.mark.parametrize("name", LABEL_FREE)
def test_the_loss_does_not_depend_on_the_order_of_atoms(name):
    """Views and embeddings follow their atoms; the settings avoid random pairs."""
    everything = {"denoising": {"bonds": 1.0}, "connectivity": {"pairs": "all"}}
    objective = made(name, **everything.get(name, {}))
    batch = batch_of(with_space_groups(TOYS, [225, 221, 2, 14, 11]))
    batch.frac_coords = 3 * torch.rand(batch.num_nodes, 3)
    seen = shown(objective, batch, 5)
    inside = torch.cat([a + torch.randperm(b - a) for a, b in pairwise(batch.ptr)])
    again = tuple(
        embedded(reordered(one.batch, inside), one.atoms[inside], one.crystals)
        for one in seen
    )
    losses = objective(seen, batch, 5), objective(again, reordered(batch, inside), 5)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)


@pytest.mark.parametrize("published", [False, True])
def test_all_objectives_on_a_real_graph_and_encoder(published):
    """Losses go down together when the encoder is trained on four crystals."""
    torch.manual_seed(0)
    crystals = [random_crystal(seed, 4 + 3 * seed) for seed in range(4)]
    mode = "cgcnn" if published else "shells"
    batch = make_batch(crystals, GraphSettings(cutoff=5.0, mode=mode))
    batch.space_groups = torch.tensor([225, 225, 14, 11])
    encoder = CGCNN(width=16, convolutions=2, normalize=True)
    # The four crystals have four different formulas.
    settings = {"surrogate": {"classes": "space_group"}}
    every = torch.nn.ModuleList(
        make_objective(name, encoder, published=published, **settings.get(name, {}))
        for name in LABEL_FREE
    )
    optimizer = torch.optim.Adam([*encoder.parameters(), *every.parameters()], 0.01)
    history = []
    for _ in range(30):
        losses = []
        for objective in every:
            views = [view(batch, 0) for view in objective.views]
            seen = tuple(Embedded(view, encoder(view)) for view in views)
            losses.append(objective(seen, batch, 0))
        history.append(torch.stack(losses).detach())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    assert (history[-1] < history[0]).all()


# -------------------------------------------------------------------- views and columns


def test_the_default_pretraining_costs_one_pass():
    for published, view in ((False, MaskedAtoms(0.15)), (True, Clean())):
        four = [made(name, published=published) for name in CRYSGNN]
        assert {v for objective in four for v in objective.views} == {view}


def test_an_objective_sees_what_it_asked_for_whoever_is_beside_it():
    asked = [
        made("node_features", published=True),
        made("fingerprint"),
        made("connectivity", mask_fraction=0.3),
        made("space_group", mask_fraction=0.0),
    ]
    assert [objective.views for objective in asked] == [
        (Clean(),),
        (MaskedAtoms(0.15),),
        (MaskedAtoms(0.3),),
        (Clean(),),
    ]


def test_widths_and_elements_are_those_of_the_encoder():
    encoder = CGCNN(width=8, convolutions=1, elements="onehot")
    encoder.crystal_width = 12
    elements = make_objective("node_features", encoder)
    assert elements.decoder.weight.shape == (101, 8)
    other = make_objective("node_features", encoder, elements="cgcnn92")
    assert other.decoder.weight.shape == (92, 8)
    encoder.elements = None
    assert make_objective("node_features", encoder).decoder.out_features == 92
    assert make_objective("connectivity", encoder).bilinear.in1_features == 8
    assert make_objective("space_group", encoder).decoder.in_features == 12
    assert make_objective("crystal_system", encoder).projection[0].in_features == 12
    with pytest.raises(InputError, match=r"unknown key `objectives.space_group.cryst"):
        make_objective("space_group", encoder, crystal_width=12)


class Agreement(Objective):
    """Two views of a crystal should agree, and their sum should be `b` - `a`."""

    name = "agreement"
    views = (MaskedAtoms(0.3), DroppedEdges(0.4))
    columns = ("b", "a")

    def forward(self, seen, batch, seed):
        masked, dropped = seen
        assert "masked_atoms" in masked.batch
        assert dropped.batch.num_edges < batch.num_edges == masked.batch.num_edges
        b, a = self.labels(batch).unbind(1)
        apart = (masked.crystals - dropped.crystals).square().mean()
        return apart + (masked.crystals + dropped.crystals).sum(1).sub(b - a).mean()

    def update(self, seen, batch, seed):
        return

    def compute(self):
        return {}


def test_an_objective_may_see_two_views_and_read_labels():
    batch = batch_of(TOYS)
    batch.targets = torch.arange(15.0).view(5, 3)
    objective = Agreement()
    objective.place(["a", "other", "b"])
    assert torch.equal(objective.labels(batch), batch.targets[:, [2, 0]])
    seen = shown(objective, batch, 3)
    one, two = (embedded.crystals for embedded in seen)
    expected = (one - two).square().mean() + ((one + two).sum(1) - 2).mean()
    assert objective(seen, batch, 3).item() == pytest.approx(expected.item())


def test_an_objective_reads_no_labels_unless_it_says_so():
    batch = batch_of(TOYS)
    batch.targets = torch.ones(5, 3)
    for name in LABEL_FREE:
        objective = made(name)
        objective.place(["a", "other", "b"])
        assert objective.labels(batch).shape == (5, 0)


def test_space_groups_are_counted_in_a_store(tmp_path):
    corner, both = [[0, 0, 0]], [[0, 0, 0], [0.5, 0.5, 0.5]]
    crystals = [
        crystal("Po", 3.35 * np.eye(3), ["Po"], corner),  # Pm-3m
        crystal("Fe", 2.87 * np.eye(3), ["Fe", "Fe"], both),  # Im-3m
        crystal("CsCl", 4.12 * np.eye(3), ["Cs", "Cl"], both),  # Pm-3m
    ]
    store = open_store(tmp_path / "corpus.h5", crystals, symmetry="fast")
    objective = SpaceGroup(8, balance=1.0)
    weights = torch.ones(230)
    objective.prepare(store, np.array([1, 2]))
    assert torch.equal(objective.class_weights, weights)
    objective.prepare(store, np.array([0, 1, 2]))
    weights[221 - 1] = 0.5
    assert torch.equal(objective.class_weights, weights)


def test_make_objective_names_the_mend():
    assert isinstance(made("node_features", mask_fraction=0.5), NodeFeatures)
    with pytest.raises(InputError, match="did you mean `space_group`"):
        made("space_groups")
    with pytest.raises(
        InputError,
        match=r"`objectives.space_group.balanse`.*did you mean `balance`",
    ):
        made("space_group", balanse=1.0)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        *(
            (name, {"mask_fraction": 2.0}, "`mask_fraction` is 2.0 but must be between")
            for name in LABEL_FREE
        ),
        ("node_features", {"elements": "cgcn92"}, "did you mean `cgcnn92`"),
        ("connectivity", {"pairs": "every"}, "`pairs` is 'every' but must be one of"),
        ("connectivity", {"weights": "publishd"}, "did you mean `published`"),
        ("space_group", {"balance": -1.0}, "`balance` is -1.0 but must be between"),
        ("crystal_system", {"loss": "ntxent"}, "did you mean `nt-xent`"),
        ("crystal_system", {"temperature": 0.0}, "`temperature` is 0.0 but must be"),
    ],
)
def test_a_setting_out_of_range(name, settings, text):
    with pytest.raises(InputError, match=text):
        made(name, **settings)


# ------------------------------------------------------------- node features


def plain_bce(objective, atoms, numbers):
    """Loop over every bit of every requested atom."""
    table = torch.from_numpy(cgcnn92()).double()
    terms = []
    for h, z in zip(atoms, numbers.tolist(), strict=True):
        for bit in range(92):
            p = torch.sigmoid(
                objective.decoder.weight[bit] @ h + objective.decoder.bias[bit]
            )
            terms.append(-torch.log(p if table[z, bit] else 1 - p))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("published", [False, True])
def test_node_features_against_plain_loops(published):
    objective = made("node_features", published=published).double()
    batch = batch_of([toy(1, 3), toy(2, 5)])
    seen = embed(objective.views[0](batch, 2))
    atoms, numbers = seen.atoms, batch.atomic_numbers
    if published:
        atoms = atoms / atoms.square().sum(dim=1, keepdim=True).sqrt()
    else:
        asked = seen.batch.masked_atoms
        assert 2 <= asked.sum() < 8
        atoms, numbers = atoms[asked], numbers[asked]
    plain = plain_bce(objective, atoms, numbers)
    loss = objective((seen,), batch, 2)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    wanted = (seen.atoms, *objective.parameters())
    for ours, theirs in zip(
        gradients(loss, *wanted), gradients(plain, *wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_node_feature_numbers_of_a_perfect_and_a_constant_decoder():
    # La and Ce share a row, so answering La for Ce is right.
    batch = batch_of([toy(1, 4)])
    batch.atomic_numbers = torch.tensor([57, 58, 57, 8])
    table = torch.from_numpy(cgcnn92())
    objective = NodeFeatures(92, mask_fraction=0.0)
    objective.decoder.weight.data = torch.eye(92)
    objective.decoder.bias.data.zero_()

    def numbers(logits: torch.Tensor) -> dict[str, float]:
        objective.reset()
        objective.update((embedded(batch, logits, torch.zeros(1, 92)),), batch, 0)
        return objective.compute()

    perfect = numbers(20 * table[batch.atomic_numbers] - 10)
    assert perfect["feature_accuracy"] == 1
    assert perfect["element_accuracy"] == 1
    # Three of four atoms have the commonest row, so bits that differ between the two
    # rows have a majority of 3/4.
    differ = (table[57] != table[8]).sum().item()
    assert perfect["element_accuracy_chance"] == 0.75
    assert perfect["feature_accuracy_chance"] == pytest.approx(1 - differ / 92 / 4)
    lanthanum = numbers((20 * table[57] - 10).expand(4, 92))
    assert lanthanum["element_accuracy"] == lanthanum["element_accuracy_chance"]
    assert lanthanum["feature_accuracy"] == pytest.approx(
        lanthanum["feature_accuracy_chance"]
    )


def test_element_accuracy_picks_the_likeliest_row():
    objective = NodeFeatures(92, mask_fraction=0.0)
    objective.decoder.weight.data = torch.eye(92)
    objective.decoder.bias.data.zero_()
    batch = batch_of([toy(1, 50)])
    logits = torch.randn(50, 92)
    table = torch.from_numpy(cgcnn92())
    likelihood = torch.stack(
        [
            -F.binary_cross_entropy_with_logits(
                logits, row.expand(50, 92), reduction="none"
            ).sum(dim=1)
            for row in table[1:]
        ],
        dim=1,
    )
    likely = likelihood.argmax(dim=1) + 1
    batch.atomic_numbers = torch.where(torch.arange(50) < 20, likely, likely % 100 + 1)
    right = (table[likely] == table[batch.atomic_numbers]).all(dim=1).float().mean()
    objective.update((embedded(batch, logits, torch.zeros(1, 92)),), batch, 0)
    assert objective.compute()["element_accuracy"] == pytest.approx(right.item())


# --------------------------------------------------------------- space groups


class Groups:
    """A store with only space groups, at two tolerances."""

    def __init__(self, groups: list[int]) -> None:
        self.space_groups = np.array([[g, 1] for g in groups], np.uint8)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_space_group_against_plain_loops(balance):
    groups = [225, 0, 2, 221, 225]
    objective = SpaceGroup(8, balance=balance).double()
    counts = {2: 4, 221: 1, 225: 100}
    found = [group for group, count in counts.items() for _ in range(count)]
    # Only training rows and the first tolerance count.
    store = Groups([0] * 7 + found + [221] * 9)
    objective.prepare(store, np.arange(len(found) + 7))
    batch = batch_of(with_space_groups(TOYS, groups))
    seen = embed(batch)
    total, weights = 0.0, 0.0
    for k, group in enumerate(groups):
        if not group:
            continue
        z = objective.decoder.weight @ seen.crystals[k] + objective.decoder.bias
        nll = torch.log(torch.exp(z).sum()) - z[group - 1]
        weight = counts[group] ** -balance
        total, weights = total + weight * nll, weights + weight
    plain = total / weights
    loss = objective((seen,), batch, 0)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    wanted = (seen.crystals, *objective.parameters())
    for ours, theirs in zip(
        gradients(loss, *wanted), gradients(plain, *wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_published_space_group_is_plain_cross_entropy():
    objective = SpaceGroup(8, **SpaceGroup.PUBLISHED)
    objective.prepare(Groups([1, 2, 2, 230, 14]), np.arange(5))
    batch = batch_of(with_space_groups(TOYS, [225, 1, 2, 230, 14]))
    seen = embed(batch, dtype=torch.float32)
    logits = objective.decoder(seen.crystals)
    plain = F.cross_entropy(logits, batch.space_groups - 1)
    assert objective((seen,), batch, 0).item() == pytest.approx(plain.item())


def test_balanced_weights():
    weights = balanced_weights(torch.tensor([0, 1, 4, 100]), 0.5)
    assert torch.allclose(weights, torch.tensor([1.0, 1.0, 0.5, 0.1]))
    assert (balanced_weights(torch.tensor([0, 1, 4]), 0.0) == 1).all()


def test_space_group_numbers():
    """Known logits: right at the first guess, within five guesses, and wrong."""
    objective = SpaceGroup(230)
    objective.decoder.weight.data = torch.eye(230)
    objective.decoder.bias.data = torch.linspace(0, -1e-3, 230)  # ties go to group 1
    toys = [toy(row, 1) for row in range(5)]
    batch = batch_of(with_space_groups(toys, [10, 20, 30, 0, 10]))
    crystals = torch.zeros(5, 230)
    crystals[0, 9] = crystals[1, 49] = crystals[4, 49] = 3.0
    crystals[1, 19] = 1.0
    objective.update((embedded(batch, torch.zeros(5, 230), crystals),), batch, 0)
    assert objective.compute() == {
        "space_group_top1": 0.25,
        "space_group_top1_chance": 0.5,
        "space_group_top5": 0.5,
        "space_group_top5_chance": 1.0,
    }
