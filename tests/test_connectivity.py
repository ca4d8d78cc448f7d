"""Connectivity: pairs of atoms, and the decoder against a plain dense form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crysdistill.graphs.batch import GraphSettings, make_batch
from crysdistill.objectives import Connectivity, connectivity
from crysdistill.objectives.pairs import CLASSES, all_pairs, sampled_pairs
from tests.conftest import crystal
from tests.toy_batches import Toy, batch_of, embed, embedded, gradients, toy

SIZES = (5, 1, 30, 2, 12, 11, 3, 29)
TOYS = [toy(row, atoms) for row, atoms in enumerate(SIZES)]


def plain_labels(toys: list[Toy]) -> list[list[list[int]]]:
    """Entry i, j: how often j is a neighbour of i, at most 5."""
    return [
        [
            [min(own.count(j), 5) for j in range(len(t.neighbours))]
            for own in t.neighbours
        ]
        for t in toys
    ]


def plain_logits(objective: Connectivity, first, second) -> torch.Tensor:
    """The two layers of CrysGNN on expanded pairs."""
    return objective.mix(objective.bilinear(first, second))


def plain_all_pairs(objective: Connectivity, atoms, toys: list[Toy], weight):
    """Dense form: N x N x F per crystal, one crystal after the other."""
    total, weights, start = 0.0, 0.0, 0
    for t, label in zip(toys, plain_labels(toys), strict=True):
        n = len(label)
        h = atoms[start : start + n]
        h = h / h.square().sum(dim=1, keepdim=True).sqrt()
        start += n
        first = h.unsqueeze(1).expand(n, n, -1).reshape(n * n, -1)
        second = h.unsqueeze(0).expand(n, n, -1).reshape(n * n, -1)
        logp = plain_logits(objective, first, second).log_softmax(dim=1)
        for row, c in enumerate(torch.tensor(label).flatten().tolist()):
            total = total - weight[c] * logp[row, c]
            weights = weights + weight[c]
        assert len(t.neighbours) == n
    return total / weights


@pytest.mark.parametrize("limit", [1 << 20, 400, 50, 1])
def test_published_loss_against_the_dense_form(limit, monkeypatch):
    """Also in blocks of crystals, and in blocks of one crystal's rows."""
    monkeypatch.setattr(connectivity, "PAIRS_AT_ONCE", limit)
    torch.manual_seed(0)
    objective = Connectivity(8, **Connectivity.PUBLISHED).double()
    seen = embed(batch_of(TOYS))
    loss = objective((seen,), seen.batch, 0)
    plain = plain_all_pairs(objective, seen.atoms, TOYS, [0.1, 1, 1, 1, 1, 1])
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    wanted = (seen.atoms, *objective.parameters())
    for ours, theirs in zip(
        gradients(loss, *wanted), gradients(plain, *wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-8)


def test_padding_of_the_published_graph_connects_to_atom_0():
    settings = GraphSettings(max_neighbors=6, mode="cgcnn")
    sparse = [Toy(1, [1, 2, 3], [[1], [0, 2], [2, 1, 1]])]
    filled = [Toy(1, [1, 2, 3], [[1] + [0] * 5, [0, 2] + [0] * 4, [2, 1, 1] + [0] * 3])]
    batch = batch_of(sparse, settings)
    assert batch.padding.sum() == 12
    (block,) = all_pairs(batch, 100)
    assert block.labels.tolist() == plain_labels(filled)
    assert block.labels[0].tolist() == [[5, 1, 0], [5, 0, 1], [3, 2, 1]]
    # The sampled pairs exclude padding edges.
    pairs = sampled_pairs(batch, 0)
    known = plain_labels(sparse)[0]
    for i, j, c in zip(
        *map(torch.Tensor.tolist, (pairs.first, pairs.second, pairs.labels)),
        strict=True,
    ):
        assert c == known[i][j]


@pytest.mark.parametrize("limit", [1 << 20, 500, 7])
def test_all_pairs_are_each_seen_once(limit):
    batch = batch_of(TOYS)
    seen = {}
    for block in all_pairs(batch, limit):
        if block.first.shape[1] > 1:
            assert block.labels.numel() <= max(limit, block.second.shape[1])
        for g, i, j in (block.labels >= 0).nonzero().tolist():
            pair = (block.first[g, i].item(), block.second[g, j].item())
            assert pair not in seen
            seen[pair] = block.labels[g, i, j].item()
    expected = {}
    for start, label in zip(batch.ptr.tolist(), plain_labels(TOYS), strict=False):
        for i, row in enumerate(label):
            expected.update({(start + i, start + j): c for j, c in enumerate(row)})
    assert seen == expected


def test_labels_of_textbook_crystals():
    """In primitive fcc copper, all twelve neighbours are images of one atom."""
    fcc = 3.61 / 2 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    crystals = [
        crystal("fcc-Cu", fcc, ["Cu"], [[0, 0, 0]]),
        crystal("CsCl", 4.12 * np.eye(3), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    ]
    batch = make_batch(crystals, GraphSettings(max_neighbors=8))
    blocks = list(all_pairs(batch, 1000))
    labels = {tuple(b.first.flatten().tolist()): b.labels.tolist() for b in blocks}
    assert len(blocks) == 1
    # CsCl: eight neighbours, all of the other element; fcc: at least five of one atom.
    assert labels[(1, 2, 0, 0)] == [[[0, 5], [5, 0]], [[5, -1], [-1, -1]]]


# --------------------------------------------------------------- sampled pairs


def by_atom(pairs) -> dict[int, dict[int, int]]:
    out: dict[int, dict[int, int]] = {}
    for i, j, c in zip(
        pairs.first.tolist(), pairs.second.tolist(), pairs.labels.tolist(), strict=True
    ):
        assert j not in out.setdefault(i, {})  # no pair twice
        out[i][j] = c
    return out


@pytest.mark.parametrize("seed", range(5))
def test_sampled_pairs_have_all_edges_and_as_many_others(seed):
    batch = batch_of(TOYS)
    pairs = sampled_pairs(batch, seed)
    assert (pairs.first.diff() >= 0).all()
    assert torch.equal(pairs.counts, torch.bincount(pairs.first))
    found = by_atom(pairs)
    for start, label in zip(batch.ptr.tolist(), plain_labels(TOYS), strict=False):
        n = len(label)
        for i, row in enumerate(label):
            edges = {start + j: c for j, c in enumerate(row) if c}
            sampled = found[start + i]
            others = [j for j, c in sampled.items() if c == 0]
            assert {j: c for j, c in sampled.items() if c} == edges
            assert len(others) == min(len(edges), n - len(edges))
            assert all(start <= j < start + n and j not in edges for j in others)


def test_sampled_strangers_are_uniform_and_belong_to_the_crystal():
    """Atom 0 of 20 has 3 partners; each of the other 17 is drawn 3 times in 17."""
    lonely = [[(i + k) % 20 for k in (1, 2, 5)] for i in range(20)]
    batch = batch_of([toy(9, 4), Toy(4, [1] * 20, lonely)])
    counts = torch.zeros(20)
    for seed in range(600):
        pairs = sampled_pairs(batch, seed)
        ours = (pairs.first == 4) & (pairs.labels == 0)
        counts[pairs.second[ours] - 4] += 1
    assert (counts[[1, 2, 5]] == 0).all()
    rest = torch.tensor([j for j in range(20) if j not in (1, 2, 5)])
    # 600 x 3 / 17 = 106 expected, standard deviation 9.3
    assert (counts[rest] - 106).abs().max() < 40
    alone = sampled_pairs(batch_of([Toy(4, [1] * 20, lonely)]), 599)
    assert torch.equal(alone.second + 4, pairs.second[pairs.first >= 4])


def test_sampled_loss_against_the_dense_form_of_its_pairs():
    torch.manual_seed(0)
    objective = Connectivity(8).double()
    seen = embed(batch_of(TOYS))
    loss = objective((seen,), seen.batch, 3)
    pairs = sampled_pairs(seen.batch, 3)
    h = seen.atoms / seen.atoms.square().sum(dim=1, keepdim=True).sqrt()
    logp = plain_logits(objective, h[pairs.first], h[pairs.second]).log_softmax(dim=1)
    weight = [pairs.labels.tolist().count(c) or 1 for c in range(CLASSES)]
    total = weights = 0.0
    for row, c in enumerate(pairs.labels.tolist()):
        total = total - logp[row, c] * weight[c] ** -0.5
        weights += weight[c] ** -0.5
    plain = total / weights
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    wanted = (seen.atoms, *objective.parameters())
    for ours, theirs in zip(
        gradients(loss, *wanted), gradients(plain, *wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_every_mixture_of_pairs_and_weights():
    seen = embed(batch_of(TOYS))
    for pairs in ("sampled", "all"):
        for weights in ("balanced", "published"):
            objective = Connectivity(8, pairs=pairs, weights=weights).double()
            assert objective((seen,), seen.batch, 0) > 0
    balanced = Connectivity(8, pairs="all").double()
    flat = [c for label in plain_labels(TOYS) for row in label for c in row]
    weight = [max(flat.count(c), 1) ** -0.5 for c in range(CLASSES)]
    plain = plain_all_pairs(balanced, seen.atoms, TOYS, weight)
    loss = balanced((seen,), seen.batch, 0)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_cost_is_linear_in_atoms():
    """No tensor of the sampled loss is quadratic in the number of atoms."""
    objective = Connectivity(8)
    largest = {}
    for atoms in (100, 400):
        batch = batch_of([toy(1, atoms)])
        seen = embed(batch, dtype=torch.float32)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            objective((seen,), batch, 0)
        largest[atoms] = sum(saved)
    assert largest[400] < 4.5 * largest[100]


# --------------------------------------------------------------------- numbers


def test_edge_f1_of_known_answers():
    batch = batch_of(TOYS)
    zero = embedded(batch, torch.zeros(batch.num_nodes, 8), torch.zeros(8, 8))
    pairs = sampled_pairs(batch, 0)
    prevalence = (pairs.labels > 0).float().mean().item()
    objective = Connectivity(8)
    for bias, f1 in ((5.0, 0.0), (-5.0, 2 * prevalence / (1 + prevalence))):
        objective.mix.bias.data = torch.tensor([bias, 0, 0, 0, 0, 0])
        objective.reset()
        objective.update((zero,), batch, 0)
        numbers = objective.compute()
        assert numbers["edge_f1"] == pytest.approx(f1)
        assert numbers["edge_f1_chance"] == pytest.approx(
            2 * prevalence / (1 + prevalence)
        )


def test_connected_means_that_all_multiplicities_together_win():
    """With p(0) = 0.3 and p(1..5) = 0.14, the answer is connected."""
    objective = Connectivity(8)
    objective.mix.bias.data = torch.log(torch.tensor([0.3] + [0.14] * 5))
    objective.bilinear.bias.data.zero_()
    batch = batch_of(TOYS)
    zero = embedded(batch, torch.zeros(batch.num_nodes, 8), torch.zeros(8, 8))
    objective.update((zero,), batch, 0)
    numbers = objective.compute()
    assert numbers["edge_f1"] == pytest.approx(numbers["edge_f1_chance"])


def test_auroc_against_counting():
    torch.manual_seed(0)
    objective = Connectivity(8)
    objective.mix.weight.data *= 20
    batch = batch_of(TOYS)
    seen = embed(batch, dtype=torch.float32)
    pairs = sampled_pairs(batch, 0)
    h = torch.nn.functional.normalize(seen.atoms, dim=1)
    p = (
        1
        - plain_logits(objective, h[pairs.first], h[pairs.second]).softmax(dim=1)[:, 0]
    )
    yes, no = p[pairs.labels > 0], p[pairs.labels == 0]
    plain = (yes.unsqueeze(1) > no).float().mean().item()
    for _ in range(2):  # repeating the pairs does not change the value
        objective.update((seen,), batch, 0)
    numbers = objective.compute()
    assert numbers["edge_auroc"] == pytest.approx(plain, abs=2e-3)
    assert numbers["edge_auroc_chance"] == 0.5
