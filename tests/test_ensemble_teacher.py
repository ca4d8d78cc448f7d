"""Predictors as a teacher: their mean, and weights from how far they agree."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.objectives import make_objective
from crysdistill.store.store import Store
from crysdistill.teachers import answers_for, make_teacher
from crysdistill.teachers.ensemble import EnsembleTeacher
from crysdistill.teachers.trust import trust
from crysdistill.training.inference import predict
from crysdistill.transfer.distillation import Distillation
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.stack import Stack
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import load_predictor, save_weights
from tests.test_teacher_objective import shown
from tests.toy_runs import DENSITY
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled, open_store

CRYSTALS = labelled(24)
TRAIN, HELD_OUT = np.arange(18), np.arange(18, 24)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(tmp_path_factory.mktemp("store") / "s.h5", CRYSTALS)


def member(
    path: Path,
    seed: int,
    targets: tuple[Target, ...] = (DENSITY,),
    classes: int = 2,
    graph: GraphSettings = SMALL_GRAPH,
) -> Path:
    """A predictor with random weights, and a scale of its own for each target."""
    torch.manual_seed(seed)
    scales = [
        Normalizer(classes=classes)
        if target.task == "classification"
        else Normalizer(0.3 + 0.1 * seed, 0.5 + seed)
        for target in targets
    ]
    outputs = Outputs(targets, scales)
    encoder = make_encoder(**SMALL_ENCODER, cutoff=graph.cutoff)
    head = PropertyHead(encoder.crystal_width, outputs=outputs.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_weights(path, Predictor(encoder, head, outputs, graph))


@pytest.fixture
def members(tmp_path) -> list[Path]:
    """The weights of three runs in the folder `members`."""
    return [
        member(tmp_path / "members" / f"{seed}" / "weights.safetensors", seed)
        for seed in range(3)
    ]


def predicted(weights: Path, store: Store, out: Path) -> pd.DataFrame:
    table = pd.read_csv(predict(weights, [store.path], out, progress=False))
    return table.set_index("material_id").loc[store.material_ids]


def answers(spec: object, store: Store, rows: np.ndarray = TRAIN):
    return answers_for(make_teacher(str(spec), store), store, rows, progress=False)


# --------------------------------------------------------------- mean, spread, weights


def test_the_mean_and_the_spread_are_those_of_the_predictions(members, store, tmp_path):
    teacher = make_teacher(f"ensemble:{tmp_path}/members", store)
    found = teacher(store.batch(TRAIN)).crystals.numpy()
    each = np.stack(
        [predicted(m, store, tmp_path / "p.csv")["density"][:18] for m in members]
    )
    np.testing.assert_allclose(found[:, 0], each.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found[:, 1], each.std(0, ddof=1), rtol=1e-4)
    assert teacher.name == f"{tmp_path}/members (3 predictors)"
    assert (teacher.atom_width, teacher.crystal_width, teacher.spreads) == (
        None, 1, True,
    )  # fmt: skip


def test_links_that_lead_in_circles(members, tmp_path):
    (tmp_path / "members" / "again").symlink_to(tmp_path / "members")
    assert len(EnsembleTeacher(str(tmp_path / "members")).members) == len(members)


def test_what_an_answer_means_for_each_kind_of_target(store, tmp_path):
    targets = (
        Target("modulus", "GPa", transform="log10"),
        Target("metal", task="classification"),
        Target("gap", "eV"),
    )
    paths = [member(tmp_path / f"{k}.safetensors", k, targets) for k in (0, 1)]
    teacher = EnsembleTeacher(f"{tmp_path}/*.safetensors")
    found = teacher(store.batch(TRAIN)).crystals.numpy()
    tables = [predicted(path, store, tmp_path / "p.csv")[:18] for path in paths]
    for column, (name, scale) in enumerate(
        [("modulus", np.log10), ("metal", np.asarray), ("gap", np.asarray)]
    ):
        each = np.stack([scale(table[name].to_numpy()) for table in tables])
        np.testing.assert_allclose(found[:, column], each.mean(0), rtol=1e-4)
        np.testing.assert_allclose(
            found[:, 3 + column], each.std(0, ddof=1), rtol=1e-3, atol=1e-6
        )
    several = member(tmp_path / "m" / "0.safetensors", 0, targets[1:2], classes=3)
    teacher = EnsembleTeacher(str(several))
    shares = teacher(store.batch(TRAIN)).crystals
    table = predicted(several, store, tmp_path / "p.csv")[:18]
    expected = table[["metal_0", "metal_1", "metal_2"]]
    np.testing.assert_allclose(shares, expected, rtol=1e-4)


def test_the_rule_of_the_weights():
    """By hand: spreads 0, 1, 2 have the mean square 5/3."""
    spread = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    raw = np.array([1, 1 / (1 + 3 / 5), 1 / (1 + 12 / 5)])
    np.testing.assert_allclose(trust(spread)[:, 0], raw / raw.mean(), rtol=1e-6)
    assert trust(spread)[:, 1].tolist() == [1, 1, 1]  # all agree everywhere
    # No answer counts more than twice as much as one with the usual spread.
    usual = trust(torch.tensor([[0.0]] + [[1.0]] * 999 + [[1.000500]]))[:, 0]
    assert usual.max() / usual[1] == pytest.approx(2, rel=2e-3)


def test_answers_keep_their_weights(members, store, tmp_path):
    found = answers(f"ensemble:{tmp_path}/members", store)
    each = np.stack(
        [predicted(m, store, tmp_path / "p.csv")["density"] for m in members]
    )
    rows = torch.tensor([5, 2])
    np.testing.assert_allclose(
        found.gather_crystals(rows)[:, 0], each.mean(0)[[5, 2]], rtol=1e-4
    )
    expected = trust(torch.tensor(each.std(0, ddof=1)[:18, None]))
    weights = found.gather_weights(rows)
    torch.testing.assert_close(weights, expected[[5, 2]], rtol=1e-4, atol=1e-5)
    assert found.gather_weights(found.rows).mean() == pytest.approx(1, rel=1e-5)
    for same in (found.to("cpu"), found.about(np.array([2, 5]))):
        assert torch.equal(same.gather_weights(rows), weights)
    assert found.nbytes == 18 * 8
    # A weight goes with its answer to another crystal.
    shuffled = found.shuffled(0)
    pairs, dealt = (
        {
            (round(x.item(), 6), round(w.item(), 6))
            for x, w in zip(
                one.gather_crystals(one.rows), one.gather_weights(one.rows), strict=True
            )
        }
        for one in (found, shuffled)
    )
    assert pairs == dealt
    assert not torch.equal(
        shuffled.gather_weights(found.rows), found.gather_weights(found.rows)
    )


def test_one_predictor_counts_everywhere_alike(members, store, tmp_path):
    teacher = make_teacher(f"ensemble:{members[1]}", store)
    assert (teacher.name, teacher.spreads) == (str(members[1]), False)
    found = answers(f"ensemble:{members[1]}", store)
    assert found.gather_weights(found.rows) is None
    expected = predicted(members[1], store, tmp_path / "p.csv")["density"][:18]
    np.testing.assert_allclose(
        found.gather_crystals(found.rows)[:, 0], expected, rtol=1e-4
    )


def test_members_of_any_kind(store, tmp_path):
    """A mean of networks, as `fit` writes it, stands beside a network."""
    alike = [member(tmp_path / f"{k}.safetensors", 3) for k in range(2)]
    networks = [load_predictor(path) for path in alike]
    torch.nn.init.ones_(networks[1].encoder.embedding.bias)
    folder = tmp_path / "both"
    folder.mkdir()
    stack = save_weights(folder / "stack.safetensors", Stack(networks))
    alone = shutil.copy(alike[0], folder / "alone.safetensors")
    found = EnsembleTeacher(f"{folder}/*")(store.batch(TRAIN)).crystals
    each = np.stack(
        [
            predicted(w, store, tmp_path / "p.csv")["density"][:18]
            for w in (stack, alone)
        ]
    )
    np.testing.assert_allclose(found[:, 0], each.mean(0), rtol=1e-4)
    assert found[:, 1].min() > 0


def test_members_with_another_graph_than_the_store(store, tmp_path):
    graph = replace(SMALL_GRAPH, max_neighbors=4)
    for k in range(2):
        member(tmp_path / f"{k}.safetensors", k, graph=graph)
    other = open_store(tmp_path / "other.h5", CRYSTALS, graph=graph)
    found, same = (
        answers(f"ensemble:{tmp_path}/*.safetensors", s) for s in (store, other)
    )
    rows = found.rows
    torch.testing.assert_close(found.gather_crystals(rows), same.gather_crystals(rows))
    torch.testing.assert_close(found.gather_weights(rows), same.gather_weights(rows))


# ------------------------------------------------------------------ kept beside a store


def test_answers_are_kept_and_read_again(members, store, tmp_path, monkeypatch):
    spec = f"ensemble:{tmp_path}/members"
    first = answers(spec, store)
    monkeypatch.setattr(EnsembleTeacher, "__call__", None)  # would fail
    again = answers(spec, store)
    rows = first.rows
    assert torch.equal(first.gather_crystals(rows), again.gather_crystals(rows))
    assert torch.equal(first.gather_weights(rows), again.gather_weights(rows))


def test_the_fingerprint_depends_on_every_member(members, store, tmp_path):
    prints = {EnsembleTeacher(f"{tmp_path}/members").fingerprint()}
    moved = tmp_path / "moved"
    for name, old in zip("cab", members, strict=True):  # other names, another order
        (moved / name).mkdir(parents=True)
        shutil.copy(old, moved / name / "weights.safetensors")
    prints.add(EnsembleTeacher(str(moved)).fingerprint())
    assert len(prints) == 1
    for k, name in enumerate("abc"):
        member(moved / name / "weights.safetensors", 10 + k)
        prints.add(EnsembleTeacher(str(moved)).fingerprint())
    shutil.rmtree(moved / "a")
    prints.add(EnsembleTeacher(str(moved)).fingerprint())
    assert len(prints) == 5


# ------------------------------------------------------------------------ the losses


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_the_loss_is_weighted_and_the_number_is_not(members, store, tmp_path):
    torch.manual_seed(0)
    objective = make_objective(
        "teacher",
        make_encoder(**SMALL_ENCODER),
        teachers=[f"ensemble:{tmp_path}/members"],
    )
    objective.prepare(store, TRAIN)
    objective.begin(
        store, TRAIN, HELD_OUT,
        folder=tmp_path, device=torch.device("cpu"), progress=False,
    )  # fmt: skip
    each = np.stack(
        [predicted(m, store, tmp_path / "p.csv")["density"] for m in members]
    )
    mean, square = each.mean(0), each.var(0, ddof=1)
    raw = 1 / (1 + square / square.mean())
    weight = raw / raw.mean()
    wanted = (mean - mean[:18].mean()) / mean[:18].std()
    rows = [4, 7, 2, 20]
    batch = store.batch(rows)
    seen = shown(batch)
    (lesson,) = objective.lessons
    said = lesson.decoder(seen[0].crystals).detach().double().numpy()[:, 0]
    errors = np.square(said - wanted[rows])
    loss = objective(seen, batch, 0)
    assert loss.item() == pytest.approx((weight[rows] * errors).mean(), rel=1e-3)
    assert loss.item() != pytest.approx(errors.mean(), rel=0.01)
    objective.update(seen, batch, 0)
    truth = wanted[rows]
    r2 = 1 - errors.sum() / np.square(truth - truth.mean()).sum()
    assert objective.compute()["teacher_r2_crystals"] == pytest.approx(r2, rel=1e-3)


def test_weights_in_the_loss_of_a_distilled_student(store):
    torch.manual_seed(0)
    student, teacher, weights = torch.rand(3, 8), torch.rand(3, 2), torch.rand(3, 2)
    part = Distillation.between(
        (8, 8), (None, 2), loss="standardized_crystals", spreads=True
    )
    part.standardize(torch.tensor([0.5, 0.4]), torch.tensor([0.04, 0.09]))
    batch = store.batch([0, 1, 2])
    wanted = (teacher - torch.tensor([0.5, 0.4])) / torch.tensor([0.2, 0.3])
    errors = (part.projector(student) - wanted).square()
    found = part(student, teacher, batch, weights)
    torch.testing.assert_close(found, (weights * errors).mean())
    torch.testing.assert_close(part(student, teacher, batch), errors.mean())


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            "relations_crystals",
            "`loss` is relations_crystals, which cannot weigh answers by their spread, "
            "as this teacher needs; choose standardized_crystals$",
        ),
        (
            "standardized_atoms",
            "`loss` is standardized_atoms, which compares atoms, but the teacher does "
            "not answer for atoms; choose standardized_crystals$",
        ),
    ],
)
def test_losses_that_it_does_not_fit_are_refused(loss, text):
    with pytest.raises(InputError, match=text):
        Distillation.between((8, 8), (None, 1), loss=loss, spreads=True)


def test_a_teacher_without_a_spread_can_teach_relations():
    Distillation.between((8, 8), (None, 1), loss="relations_crystals")


# ------------------------------------------------------------------------ wrong members


def test_what_is_no_ensemble_is_refused_in_one_line(members, store, tmp_path):
    folder = f"{tmp_path}/members"
    here = f"{folder}/0/weights.safetensors"
    encoder = make_encoder(**SMALL_ENCODER)
    save_weights(tmp_path / "encoder.safetensors", encoder, SMALL_GRAPH)
    (tmp_path / "empty").mkdir()

    def refused(where: str) -> str:
        with pytest.raises(InputError) as caught:
            make_teacher(f"ensemble{where}", store)
        return str(caught.value)

    hint = "give a weights file, a folder of runs or a pattern, as in"
    assert refused("") == refused(":")
    assert refused("") == (
        f"`ensemble` names no predictors; {hint} `ensemble:runs/members`"
    )
    assert refused(f":{tmp_path}/none-*") == (
        f"{tmp_path}/none-* is no file or folder, and none fits it as a pattern; give "
        "the weights of a predictor, or a folder of runs"
    )
    assert refused(f":{tmp_path}/empty") == (
        f"{tmp_path}/empty holds no weights.safetensors; give a folder of runs, or a "
        f"pattern such as `ensemble:{tmp_path}/empty/*.safetensors`"
    )
    assert refused(f":{tmp_path}/encoder.safetensors").startswith(
        f"{tmp_path}/encoder.safetensors holds an encoder without a head"
    )
    late = Path(folder) / "9" / "weights.safetensors"
    late.parent.mkdir()
    shutil.copy(members[1], late)
    assert refused(f":{folder}") == (
        f"{late} holds the same weights as {members[1]}; leave one out"
    )
    for target, mine in (
        (Target("density", "g/cm³"), "density (g/cm³)"),
        (Target("volume", "1/Å³"), "volume (1/Å³)"),
        (Target("density", "1/Å³", transform="log10"), "density (1/Å³, log10)"),
        (Target("density", task="classification"), "density (2 classes)"),
    ):
        member(late, 5, (target,))
        assert refused(f":{folder}") == (
            f"{late} predicts {mine} but {here} predicts density (1/Å³); an ensemble "
            "has the same targets: leave one of them out"
        )
    # How a target was weighted in its loss does not matter.
    member(late, 5, (replace(DENSITY, weight=2.0),))
    assert make_teacher(f"ensemble:{folder}", store).name.endswith("(4 predictors)")
    member(late, 5, graph=replace(SMALL_GRAPH, max_neighbors=4))
    said = refused(f":{folder}")
    assert said.startswith(f"{late} reads the graph (")
    assert "max_neighbors 4" in said
    assert said.endswith("name them as two teachers, each with its graph")
