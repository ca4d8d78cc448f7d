"""The objective `teacher`: learns teachers' answers for a part of the corpus."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from crysdistill.encoders import CGCNN, make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives import Embedded, FromTeachers, make_objective
from crysdistill.objectives import objective as sums
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.training.cleaning import Cleaned
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.settings import OptimizerSettings, TrainerSettings
from crysdistill.transfer.seen import seen
from crysdistill.transfer.weights import Provenance, read_header, save_weights
from tests.toy_batches import embed
from tests.toy_stores import (
    SMALL_ENCODER,
    SMALL_GRAPH,
    known_by_hash,
    labelled,
    open_store,
)

CRYSTALS = labelled(24)
TRAIN, HELD_OUT = np.arange(18), np.arange(18, 24)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(tmp_path_factory.mktemp("store") / "s.h5", CRYSTALS)


def facts(crystal: Crystal) -> np.ndarray:
    """The toy teacher's answer: three numbers for each atom, one of them always 7."""
    z = crystal.atomic_numbers.astype(float)
    volume = abs(np.linalg.det(crystal.cell)) / len(z)
    return np.stack([z, np.full(len(z), volume), np.full(len(z), 7.0)], axis=1)


def write_table(path: Path, crystals: list[Crystal], **about: str) -> Path:
    """Write a table that covers some crystals."""
    atoms = [facts(c) for c in crystals]
    names = "\n".join(c.material_id for c in crystals).encode()
    arrays = {
        "material_ids": np.frombuffer(names, np.uint8),
        "ptr": np.cumsum([0, *(len(a) for a in atoms)]),
        "atomic_numbers": np.concatenate([c.atomic_numbers for c in crystals]),
        "frac_coords": np.concatenate([c.frac_coords for c in crystals]),
        "atoms": np.concatenate(atoms).astype(np.float32),
        "crystals": np.stack([a.mean(0) for a in atoms]).astype(np.float32),
    }
    save_file(arrays, path, {"origin": "a toy model", "licence": "MIT", **about})
    return path


@pytest.fixture
def table(tmp_path) -> Path:
    """A table with every second crystal."""
    return write_table(tmp_path / "table.safetensors", CRYSTALS[::2])


def begun(store: Store, folder: Path, *teachers: object, **settings) -> FromTeachers:
    encoder = CGCNN(width=8, convolutions=1)
    torch.manual_seed(0)
    made = make_objective(
        "teacher", encoder, teachers=[str(t) for t in teachers], **settings
    )
    assert isinstance(made, FromTeachers)
    made.prepare(store, TRAIN)
    made.begin(
        store, TRAIN, HELD_OUT,
        folder=folder, device=torch.device("cpu"), progress=False,
    )  # fmt: skip
    return made


def shown(batch: CrystalBatch, seed: int = 0) -> tuple[Embedded]:
    return (embed(batch, seed=seed, dtype=torch.float32),)


def known_to_the_table(row: int) -> bool:
    return row % 2 == 0


# ---------------------------------------------------------------------- loss and number


def plain(
    objective: FromTeachers,
    seen: Embedded,
    batch: CrystalBatch,
    level: str,
    learned: list[int],
    known: Callable[[int], bool],
    number: int = 0,
) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
    """The loss of one lesson by plain loops, with its predictions and targets."""
    vectors = [facts(CRYSTALS[r]) for r in learned]
    if level == "crystals":
        vectors = [v.mean(0, keepdims=True) for v in vectors]
    all_of_them = np.concatenate(vectors)
    mean, std = all_of_them.mean(0), all_of_them.std(0)
    std[2] = 1  # this number is constant
    decoder = objective.lessons[number].decoder
    said, wanted = [], []
    for k, row in enumerate(batch.rows.tolist()):
        if not known(row):
            continue
        truth = facts(CRYSTALS[row])
        if level == "crystals":
            mine, truth = seen.crystals[k : k + 1], truth.mean(0, keepdims=True)
        else:
            mine = seen.atoms[batch.ptr[k] : batch.ptr[k + 1]]
        said += list(decoder(mine).detach().double().numpy())
        wanted += list((truth - mean) / std)
    errors = np.square(np.array(said) - np.array(wanted))
    return errors.mean(), said, wanted


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.parametrize("level", ["atoms", "crystals"])
def test_loss_and_number_equal_a_plain_second_implementation(
    level, store, table, tmp_path
):
    objective = begun(store, tmp_path, table, levels=[level])
    batch = store.batch([4, 7, 2, 9, 20])
    seen_ = shown(batch)
    learned = [r for r in TRAIN.tolist() if known_to_the_table(r)]
    value, said, wanted = plain(
        objective, seen_[0], batch, level, learned, known_to_the_table
    )
    assert objective(seen_, batch, 0).item() == pytest.approx(value, rel=1e-4)
    objective.update(seen_, batch, 0)
    s, w = np.array(said), np.array(wanted)
    r2 = 1 - np.square(s - w).sum() / np.square(w - w.mean(0)).sum()
    name = f"teacher_r2_{level}"
    assert objective.compute() == {
        name: pytest.approx(r2, rel=1e-3),
        f"{name}_chance": 0.0,
    }
    objective.reset()
    assert np.isnan(objective.compute()[name])


def test_the_mean_alone_has_loss_1(store, tmp_path):
    table = write_table(tmp_path / "all.safetensors", CRYSTALS)
    objective = begun(store, tmp_path, table)
    for parameter in objective.parameters():
        torch.nn.init.zeros_(parameter)
    batch = store.batch(TRAIN)
    # Two of three numbers vary; the third is constant.
    assert objective(shown(batch), batch, 0).item() == pytest.approx(2 / 3, rel=1e-5)


def test_what_the_teacher_does_not_know_has_no_say(store, table, tmp_path):
    objective = begun(store, tmp_path, table)
    batch = store.batch([1, 4, 3])
    (seen_,) = shown(batch)
    objective((seen_,), batch, 0).backward()
    moved = seen_.atoms.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == (batch.batch == 1).tolist()
    unknown = store.batch([1, 3])
    (seen_,) = shown(unknown)
    loss = objective((seen_,), unknown, 0)
    loss.backward()
    assert loss == 0  # connected to the graph
    assert (seen_.atoms.grad == 0).all()
    assert all((p.grad == p.grad).all() for p in objective.parameters())


def test_ranks_share_the_loss_of_the_whole_batch(store, table, tmp_path, monkeypatch):
    objective = begun(store, tmp_path, table, levels=["atoms", "crystals"])
    whole, parts = store.batch([4, 7, 2, 9]), [store.batch([4, 7, 2]), store.batch([9])]
    (seen_,) = shown(whole)
    expected = objective((seen_,), whole, 0)
    atoms = sum(len(CRYSTALS[r].atomic_numbers) for r in (4, 2))
    totals = iter([3.0 * atoms, 6.0] * 2)
    monkeypatch.setattr(sums, "sum_over_ranks", lambda x: torch.tensor(next(totals)))
    shares, first, begin = [], 0, 0
    for part in parts:
        n, b = part.num_nodes, part.num_graphs
        mine = replace(
            seen_.embeddings,
            atoms=seen_.atoms[first : first + n],
            crystals=seen_.crystals[begin : begin + b],
        )
        shares.append(objective((Embedded(part, mine),), part, 0))
        first, begin = first + n, begin + b
    torch.testing.assert_close(sum(shares), expected)


# ------------------------------------------------------------------- choice of crystals


def test_several_teachers_are_learned_at_once(store, table, tmp_path):
    other = write_table(tmp_path / "other.safetensors", CRYSTALS[::3])
    both = begun(store, tmp_path, table, other)
    batch = store.batch([4, 7, 3, 6])
    seen_ = shown(batch)
    losses = []
    for number, (each, step) in enumerate(((table, 2), (other, 3))):
        alone = begun(store, tmp_path, each)
        alone.lessons[0].load_state_dict(both.lessons[number].state_dict())
        losses.append(alone(seen_, batch, 0))
        learned = [r for r in TRAIN.tolist() if r % step == 0]
        value, *_ = plain(
            both, seen_[0], batch, "atoms", learned,
            lambda row, step=step: row % step == 0, number,
        )  # fmt: skip
        assert losses[-1].item() == pytest.approx(value, rel=1e-4)
    torch.testing.assert_close(both(seen_, batch, 0), torch.stack(losses).mean())
    both.update(seen_, batch, 0)
    assert set(both.compute()) == {
        "teacher_r2_atoms",
        "teacher_r2_atoms_chance",
        "teacher2_r2_atoms",
        "teacher2_r2_atoms_chance",
    }
    known = [r % 2 == 0 or r % 3 == 0 for r in range(24)]
    assert both.speaks_of(np.arange(24)).tolist() == known


def test_limits_on_what_is_asked(store, tmp_path):
    table = write_table(tmp_path / "all.safetensors", CRYSTALS)
    sizes = np.array([len(c.atomic_numbers) for c in CRYSTALS])
    small = begun(store, tmp_path, table, max_atoms=2)
    assert (small.speaks_of(np.arange(24)) == (sizes <= 2)).all()
    few = begun(store, tmp_path, table, max_crystals=6)
    assert few.speaks_of(TRAIN).sum() == 6
    # About a third of the held-out crystals are drawn.
    assert few.speaks_of(HELD_OUT).sum() < 6
    again = begun(store, tmp_path, table, max_crystals=6)
    assert (few.speaks_of(TRAIN) == again.speaks_of(TRAIN)).all()
    other = begun(store, tmp_path, table, max_crystals=6, seed=2)
    assert (few.speaks_of(TRAIN) != other.speaks_of(TRAIN)).any()
    # Both limits at once.
    both = begun(store, tmp_path, table, max_atoms=2, max_crystals=6)
    asked = both.speaks_of(TRAIN)
    assert asked.sum() == 6
    assert (sizes[TRAIN][asked] <= 2).all()


def test_answers_of_earlier_runs_do_not_matter(store, tmp_path):
    """Files may hold answers for other crystals; the loss ignores them."""
    settings = {"teacher_encoder": SMALL_ENCODER}
    first = begun(store, tmp_path, "random", max_atoms=2, **settings)
    before = first(shown(store.batch([0, 1, 2, 3])), store.batch([0, 1, 2, 3]), 0)
    begun(store, tmp_path, "random", **settings)
    again = begun(store, tmp_path, "random", max_atoms=2, **settings)
    after = again(shown(store.batch([0, 1, 2, 3])), store.batch([0, 1, 2, 3]), 0)
    assert before == after


def test_levels_follow_from_what_the_teacher_answers(store, table, tmp_path):
    assert [x.level for x in begun(store, tmp_path, table).lessons] == ["atoms"]
    arrays = {
        "material_ids": np.frombuffer(
            "\n".join(c.material_id for c in CRYSTALS).encode(), np.uint8
        ),
        "crystals": np.random.default_rng(0).random((24, 5), np.float32),
    }
    only = tmp_path / "only.safetensors"
    save_file(arrays, only)
    made = begun(store, tmp_path, only)
    assert [x.level for x in made.lessons] == ["crystals"]
    with pytest.raises(
        InputError,
        match=r"`levels` has atoms, but only.safetensors does not answer for atoms; "
        "leave it out",
    ):
        begun(store, tmp_path, only, levels=["atoms"])


def test_elements_can_be_hidden(store, table, tmp_path):
    made = begun(store, tmp_path, table, mask_fraction=0.3)
    batch = store.batch([4, 6])
    assert (made.views[0](batch, 0).atomic_numbers == 0).any()
    clean = begun(store, tmp_path, table)
    assert (clean.views[0](batch, 0).atomic_numbers > 0).all()


def test_wrong_settings_are_refused(store, table, tmp_path):
    def made(**settings) -> None:
        make_objective("teacher", CGCNN(width=8, convolutions=1), **settings)

    for settings, text in (
        ({"teachers": []}, "`teachers` is empty; name at least one"),
        ({"teachers": ["a", "a"]}, "`teachers` has a twice; leave one out"),
        ({"levels": []}, "`levels` is empty; give atoms, crystals or both"),
        ({"max_atoms": 0}, "`max_atoms` is 0 but must be at least 1"),
        ({"max_crystals": -2}, "`max_crystals` is -2 but must be at least 1"),
        ({"mask_fraction": 2}, "`mask_fraction` is 2 but must be between 0 and 1"),
    ):
        with pytest.raises(InputError, match=text):
            made(**{"teachers": ["random"], **settings})
    with pytest.raises(InputError, match="no teacher 'nobody': there is no such file"):
        begun(store, tmp_path, "nobody")
    stranger = write_table(tmp_path / "x.safetensors", labelled(3, first=100))
    with pytest.raises(
        InputError,
        match=r"x.safetensors knows none of the 18 crystals of .*s.h5 to learn from; "
        "name another teacher",
    ):
        begun(store, tmp_path, stranger)
    large = [c for c in CRYSTALS if len(c.atomic_numbers) > 1]
    other = write_table(tmp_path / "y.safetensors", large)
    with pytest.raises(InputError, match="to learn from that have at most 1 atoms"):
        begun(store, tmp_path, other, max_atoms=1)


# ------------------------------------------------------------------------- whole runs


def run(store: Store, out: Path, objectives: dict, **more) -> Path:
    config = {
        "corpus": store.path,
        "out": out,
        "encoder": {**SMALL_ENCODER, "bias": False, "normalize": True},
        "objectives": objectives,
        "held_out": 0.25,
        "optimizer": OptimizerSettings(lr=0.02, schedule="constant"),
        "trainer": TrainerSettings(
            epochs=1, batch_size=4, accelerator="cpu", progress=False
        ),
    }
    return pretrain(PretrainConfig(**(config | more)))


def test_a_student_learns_what_the_teacher_says(store, table, tmp_path, capsys):
    trainer = TrainerSettings(
        epochs=30, batch_size=4, accelerator="cpu", progress=False
    )
    weights = run(
        store, tmp_path / "run", {"teacher": {"teachers": [str(table)]}},
        trainer=trainer,
    )  # fmt: skip
    results = json.loads((weights.parent / "results.json").read_text())
    assert results["numbers"]["teacher_r2_atoms"] > 0.5
    # Crystals outside the table are in no batch.
    said = capsys.readouterr().out.replace("\n", " ")
    known = int(said.split("table.safetensors teaches ")[1].split(" of")[0])
    assert f"on {known} crystals, judged on {12 - known}" in said
    with (weights.parent / "metrics.csv").open(newline="") as file:
        found = [r["train_teacher"] for r in csv.DictReader(file)]
    losses = [float(value) for value in found if value]
    assert losses[-1] < 0.5 * losses[0]
    assert not [name for name in read_header(weights).encoder if "teacher" in name]


def test_beside_another_objective_all_crystals_stay(store, table, tmp_path, capsys):
    run(
        store, tmp_path / "run",
        {"teacher": {"teachers": [str(table)]}, "fingerprint": {"weight": 0.5}},
    )  # fmt: skip
    assert "on 18 crystals, judged on 6" in capsys.readouterr().out.replace("\n", " ")


# --------------------------------------------------------------- overlap in the weights

CLEAN = DatasetCheck("judge.h5", "d" * 64, "e" * 64, ("id",), 9, 2, 2, 0)
SEEN = replace(CLEAN, left_out=0, kept=2)


def test_weights_say_who_taught_them(store, table, tmp_path):
    weights = run(store, tmp_path / "run", {"teacher": {"teachers": [str(table)]}})
    found = read_header(weights).provenance
    assert found.overlap == "unknown"
    assert found.taught_by == "a toy model"
    assert found.origin.endswith("; taught by a toy model")
    assert "MIT" in found.licence
    results = json.loads((weights.parent / "results.json").read_text())
    assert results["licence"] == found.licence
    assert results["overlap"] == (
        "unknown (taught by a toy model; nobody has compared its crystals with any "
        "dataset); the corpus alone: unknown (compared with no dataset)"
    )


def by_teacher(checks: list[DatasetCheck], path: Path, **more) -> Path:
    """An encoder with a corpus that was compared with datasets."""
    provenance = Provenance("c" * 64, checks=checks, origin="an encoder", **more)
    torch.manual_seed(0)
    return save_weights(path, make_encoder(**SMALL_ENCODER), SMALL_GRAPH, provenance)


@pytest.mark.parametrize(
    ("own", "theirs", "taught_by", "word"),
    [
        ([CLEAN], [CLEAN], "", "clean"),
        ([CLEAN], [], "", "unknown"),  # unknown what the teacher saw
        ([CLEAN], [SEEN], "", "transductive"),
        ([], [SEEN], "", "transductive"),
        ([SEEN], [CLEAN], "", "transductive"),
        ([CLEAN], [CLEAN], "a stranger", "unknown"),  # the teacher's own teacher
    ],
)
def test_clean_is_only_what_was_compared_on_all_sides(
    own, theirs, taught_by, word, store, tmp_path, monkeypatch
):
    teacher = by_teacher(theirs, tmp_path / "t.safetensors", taught_by=taught_by)
    monkeypatch.setattr(
        "crysdistill.training.pretrain.clean_rows",
        lambda store, *_, **__: Cleaned(np.arange(len(store)), own),
    )
    weights = run(store, tmp_path / "run", {"teacher": {"teachers": [str(teacher)]}})
    header = read_header(weights)
    assert header.provenance.overlap == word
    assert seen(header, known_by_hash("d" * 64))[0] == word
    if taught_by:
        assert (
            "(taught by a stranger; nobody has"
            in seen(header, known_by_hash("d" * 64))[1]
        )


def test_a_teacher_that_knows_nothing_spoils_nothing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "crysdistill.training.pretrain.clean_rows",
        lambda store, *_, **__: Cleaned(np.arange(len(store)), [CLEAN]),
    )
    settings = {"teachers": ["random"], "teacher_encoder": SMALL_ENCODER}
    weights = run(store, tmp_path / "run", {"teacher": settings})
    assert read_header(weights).provenance.overlap == "clean"
