"""What all objectives share; views; reconstructed elements; space groups."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from crysdistill.structures.elements import cgcnn92
from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, make_batch
from crysdistill.objectives import (
    CRYSGNN,
    OBJECTIVES,
    Clean,
    Embedded,
    MaskedAtoms,
    NodeFeatures,
    SpaceGroup,
    make_objective,
)
from crysdistill.graphs.randomness import (
    per_atom_integers,
    per_atom_uniform,
    per_crystal_uniform,
)
from crysdistill.objectives.objective import balanced_weights
from tests.conftest import random_crystal
from tests.toy_batches import batch_of, embed, gradients, toy, with_space_groups

TOYS = [toy(row, atoms) for row, atoms in ((7, 5), (3, 1), (12, 40), (0, 2), (5, 12))]


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


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
    # Seeds and rows do not enter as their sum.
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
    assert MaskedAtoms(1.0)(large, 0).masked_atoms.all()


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
    views = {OBJECTIVES[name](8).view for name in OBJECTIVES}
    assert views == {Clean(), MaskedAtoms(0.15)}
    assert {OBJECTIVES[name].published(8).view for name in CRYSGNN} == {Clean()}


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match=r"`fraction` is .* above 0 and at most 1"):
        MaskedAtoms(fraction)


# ----------------------------------------------------------- what they all share


def test_parameter_counts_of_crysgnn():
    made = {name: OBJECTIVES[name].published(64) for name in CRYSGNN}
    assert {name: parameters(module) for name, module in made.items()} == {
        "node_features": 5_980,
        "connectivity": 24_582 + 42,
        "space_group": 14_950,
        "crystal_system": 0,
    }
    encoder = CGCNN(convolutions=5, bias=False, normalize=True)
    assert parameters(encoder, *made.values()) == 162_162


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_numbers_are_no_part_of_the_weights(name, published):
    objective = make_objective(name, 8, published=published)
    assert set(objective.state_dict()) == {n for n, _ in objective.named_parameters()}
    batch = batch_of(with_space_groups(TOYS, [1, 2, 225, 229, 225]))
    embedded = embed(objective.view(batch, 0), dtype=torch.float32)
    objective.update(embedded, batch, 0)
    numbers = objective.compute()
    chances = {key for key in numbers if key.endswith("_chance")}
    assert {f"{key}_chance" for key in set(numbers) - chances} == chances
    assert all(type(v) is float and 0 <= v <= 1 for v in numbers.values())
    assert set(objective.state_dict()) == {n for n, _ in objective.named_parameters()}
    objective.reset()
    objective.update(embedded, batch, 0)
    assert objective.compute() == numbers


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_with_nothing_to_say_gives_a_connected_zero(name, published):
    """One crystal of unknown symmetry: nothing to classify, no pair of crystals."""
    objective = make_objective(name, 8, published=published)
    batch = batch_of([toy(1, 3)])
    embedded = embed(objective.view(batch, 0), dtype=torch.float32)
    loss = objective(embedded, batch, 0)
    loss.backward()
    assert loss.isfinite()
    if name in ("space_group", "crystal_system"):
        assert loss == 0
        assert (embedded.crystals.grad == 0).all()
    else:
        assert (embedded.atoms.grad != 0).any()
    for parameter in objective.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    objective.update(embedded, batch, 0)
    values = objective.compute().values()
    assert all(math.isnan(v) or 0 <= v <= 1 for v in values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_numbers_add_up_over_batches(name):
    toys = with_space_groups(TOYS, [225, 0, 2, 221, 14])
    objective = make_objective(name, 8)
    batch = batch_of(toys)
    whole = embed(objective.view(batch, 0), dtype=torch.float32)
    objective.update(whole, batch, 0)
    expected = objective.compute()
    objective.reset()
    for k in range(len(toys)):
        part = batch_of([toys[k]])
        atoms = whole.atoms[batch.ptr[k] : batch.ptr[k + 1]]
        view = objective.view(part, 0)
        objective.update(Embedded(view, atoms, whole.crystals[k : k + 1]), part, 0)
    assert objective.compute() == pytest.approx(expected)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_does_not_depend_on_the_order_of_crystals(name, published):
    toys = with_space_groups(TOYS, [225, 221, 2, 14, 11])
    objective = make_objective(name, 8, published=published)
    order = [2, 4, 0, 3, 1]
    losses = []
    forward = batch_of(toys)
    embedded = embed(objective.view(forward, 5), dtype=torch.float32)
    losses.append(objective(embedded, forward, 5))
    shuffled = batch_of([toys[k] for k in order])
    atoms = torch.cat(
        [embedded.atoms[forward.ptr[k] : forward.ptr[k + 1]] for k in order]
    )
    view = objective.view(shuffled, 5)
    losses.append(
        objective(Embedded(view, atoms, embedded.crystals[order]), shuffled, 5)
    )
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


@pytest.mark.parametrize("published", [False, True])
def test_all_objectives_on_a_real_graph_and_encoder(published):
    """Losses go down together when the encoder is trained on four crystals."""
    torch.manual_seed(0)
    crystals = [random_crystal(seed, 4 + 3 * seed) for seed in range(4)]
    mode = "cgcnn" if published else "shells"
    batch = make_batch(crystals, GraphSettings(cutoff=5.0, mode=mode))
    batch.space_groups = torch.tensor([225, 221, 14, 11])
    encoder = CGCNN(width=16, convolutions=2, normalize=True)
    made = torch.nn.ModuleList(
        [make_objective(name, 16, published=published) for name in OBJECTIVES]
    )
    optimizer = torch.optim.Adam([*encoder.parameters(), *made.parameters()], 0.01)
    history = []
    for _ in range(30):
        losses = []
        seen = {}
        for objective in made:
            if objective.view not in seen:
                view = objective.view(batch, 0)
                atoms = encoder(view)
                seen[objective.view] = Embedded(view, atoms, encoder.pool(atoms, view))
            losses.append(objective(seen[objective.view], batch, 0))
        history.append(torch.stack(losses).detach())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    assert (history[-1] < history[0]).all()


def test_make_objective_names_the_mend():
    assert isinstance(
        make_objective("node_features", 8, mask_fraction=0.5), NodeFeatures
    )
    with pytest.raises(InputError, match="did you mean `space_group`"):
        make_objective("space_groups", 8)
    with pytest.raises(
        InputError,
        match=r"`objectives.space_group.balanse`.*did you mean `balance`",
    ):
        make_objective("space_group", 8, balanse=1.0)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("node_features", {"mask_fraction": 2.0}, "`mask_fraction` is 2.0 but must be"),
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
        make_objective(name, 8, **settings)


# ------------------------------------------------------------- node features


def plain_bce(objective, atoms, numbers):
    """Every bit of every atom asked for, one after the other."""
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
    objective = make_objective("node_features", 8, published=published).double()
    batch = batch_of([toy(1, 3), toy(2, 5)])
    embedded = embed(objective.view(batch, 2))
    atoms, numbers = embedded.atoms, batch.atomic_numbers
    if published:
        atoms = atoms / atoms.square().sum(dim=1, keepdim=True).sqrt()
    else:
        asked = embedded.batch.masked_atoms
        assert 2 <= asked.sum() < 8
        atoms, numbers = atoms[asked], numbers[asked]
    plain = plain_bce(objective, atoms, numbers)
    loss = objective(embedded, batch, 2)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    wanted = (embedded.atoms, *objective.parameters())
    for ours, theirs in zip(
        gradients(loss, *wanted), gradients(plain, *wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_node_feature_numbers_of_a_perfect_and_a_constant_decoder():
    # La and Ce share a row: answering La for Ce is right.
    batch = batch_of([toy(1, 4)])
    batch.atomic_numbers = torch.tensor([57, 58, 57, 8])
    table = torch.from_numpy(cgcnn92())
    objective = NodeFeatures(92, mask_fraction=0.0)
    objective.decoder.weight.data = torch.eye(92)
    objective.decoder.bias.data.zero_()

    def numbers(logits: torch.Tensor) -> dict[str, float]:
        objective.reset()
        objective.update(Embedded(batch, logits, torch.zeros(1, 92)), batch, 0)
        return objective.compute()

    perfect = numbers(20 * table[batch.atomic_numbers] - 10)
    assert perfect["feature_accuracy"] == 1
    assert perfect["element_accuracy"] == 1
    # Three of four atoms have the commonest row, and the bits that differ between
    # the two rows have a majority of 3/4.
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
    objective.update(Embedded(batch, logits, torch.zeros(1, 92)), batch, 0)
    assert objective.compute()["element_accuracy"] == pytest.approx(right.item())


# --------------------------------------------------------------- space groups


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_space_group_against_plain_loops(balance):
    groups = [225, 0, 2, 221, 225]
    objective = SpaceGroup(8, balance=balance).double()
    counts = torch.zeros(231)
    counts[[2, 221, 225]] = torch.tensor([4.0, 1.0, 100.0])
    objective.prepare(counts)
    batch = batch_of(with_space_groups(TOYS, groups))
    embedded = embed(batch)
    total, weights = 0.0, 0.0
    for k, group in enumerate(groups):
        if not group:
            continue
        z = objective.decoder.weight @ embedded.crystals[k] + objective.decoder.bias
        nll = torch.log(torch.exp(z).sum()) - z[group - 1]
        weight = counts[group].item() ** -balance
        total, weights = total + weight * nll, weights + weight
    plain = total / weights
    loss = objective(embedded, batch, 0)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    wanted = (embedded.crystals, *objective.parameters())
    for ours, theirs in zip(
        gradients(loss, *wanted), gradients(plain, *wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_published_space_group_is_plain_cross_entropy():
    objective = SpaceGroup.published(8)
    objective.prepare(torch.arange(231))
    batch = batch_of(with_space_groups(TOYS, [225, 1, 2, 230, 14]))
    embedded = embed(batch, dtype=torch.float32)
    logits = objective.decoder(embedded.crystals)
    plain = F.cross_entropy(logits, batch.space_groups - 1)
    assert objective(embedded, batch, 0).item() == pytest.approx(plain.item())


def test_balanced_weights():
    weights = balanced_weights(torch.tensor([0, 1, 4, 100]), 0.5)
    assert torch.allclose(weights, torch.tensor([1.0, 1.0, 0.5, 0.1]))
    assert (balanced_weights(torch.tensor([0, 1, 4]), 0.0) == 1).all()


def test_space_group_numbers():
    """Known logits: the first crystal right, the second among five, the third not."""
    objective = SpaceGroup(230)
    objective.decoder.weight.data = torch.eye(230)
    objective.decoder.bias.data = torch.linspace(0, -1e-3, 230)  # ties go to group 1
    toys = [toy(row, 1) for row in range(5)]
    batch = batch_of(with_space_groups(toys, [10, 20, 30, 0, 10]))
    crystals = torch.zeros(5, 230)
    crystals[0, 9] = crystals[1, 49] = crystals[4, 49] = 3.0
    crystals[1, 19] = 1.0
    objective.update(Embedded(batch, torch.zeros(5, 230), crystals), batch, 0)
    assert objective.compute() == {
        "space_group_top1": 0.25,
        "space_group_top1_chance": 0.5,
        "space_group_top5": 0.5,
        "space_group_top5_chance": 1.0,
    }


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
