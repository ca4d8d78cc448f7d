"""A teacher is asked once; its answers stay beside the store."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.files import FULL
from crysdistill.graphs.batch import CrystalBatch, mean_over_atoms
from crysdistill.store.store import Store
from crysdistill.teachers import Answer, EncoderTeacher, Teacher, answers_for
from crysdistill.teachers.answers import Block, TeacherAnswers
from crysdistill.teachers.kept import AnswerWriter, KeptAnswers
from tests.together import joined_call, together
from tests.toy_stores import SMALL_GRAPH, labelled, open_store

CRYSTALS = labelled(12)
HERE = {"progress": False, "workers": 1}


class Plain(Teacher):
    """Answers with positions and mean atomic numbers; records the rows it was asked."""

    def __init__(self, name: str = "plain") -> None:
        self.name = name
        self.atom_width, self.crystal_width = 4, 1
        self.asked: list[int] = []

    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def __call__(self, batch: CrystalBatch) -> Answer:
        self.asked += batch.rows.tolist()
        numbers = batch.atomic_numbers.float().unsqueeze(1)  # (N, 1)
        atoms = torch.cat((batch.frac_coords, numbers), dim=1)  # (N, 4)
        return Answer(atoms, mean_over_atoms(numbers, batch))


class Renamed(Plain):
    """The same teacher under another name, like a moved file."""

    def fingerprint(self) -> str:
        return Plain().fingerprint()


class Slow(Plain):
    SLOW = True


class Dies(Plain):
    """Dies after some answers."""

    def __call__(self, batch: CrystalBatch) -> Answer:
        if self.asked:
            raise KeyboardInterrupt
        return super().__call__(batch)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return open_store(tmp_path_factory.mktemp("store") / "s.h5", CRYSTALS).path


@pytest.fixture
def store(made, tmp_path) -> Store:
    return Store.open(shutil.copy(made, tmp_path / "s.h5"))


def check(answers: TeacherAnswers, store: Store, rows: list[int]) -> None:
    """Compare with the answers of `Plain`, crystal by crystal."""
    atoms, crystals = [], []
    for row in rows:
        crystal = CRYSTALS[row]
        for place, z in zip(crystal.frac_coords, crystal.atomic_numbers, strict=True):
            atoms.append([*place, z])
        crystals.append([crystal.atomic_numbers.astype(float).mean()])
    found = answers.gather_atoms(torch.tensor(rows), len(atoms))
    np.testing.assert_allclose(found, atoms, atol=1e-5)
    np.testing.assert_allclose(answers.gather_crystals(torch.tensor(rows)), crystals)


def folders(store: Store) -> list[Path]:
    return sorted(Path(f"{store.path}.teachers").iterdir())


# --------------------------------------------------------------------------- gathering


def test_answers_are_gathered_for_any_rows_in_any_order(store):
    answers = answers_for(Plain(), store, [7, 2, 5, 2], **HERE)
    assert (answers.atom_width, answers.crystal_width, len(answers)) == (4, 1, 3)
    check(answers, store, [5, 7, 2, 7])
    check(answers, store, [2])
    assert answers.gather_atoms(torch.tensor([], dtype=torch.int64)).shape == (0, 4)


def test_they_are_those_of_the_batch_of_the_store(store):
    torch.manual_seed(0)
    teacher = EncoderTeacher(CGCNN(width=8), SMALL_GRAPH)
    answers = answers_for(teacher, store, np.arange(12), **HERE)
    batch = store.batch([9, 1, 4])
    torch.testing.assert_close(
        answers.gather_atoms(batch.rows, batch.num_nodes), teacher(batch).atoms
    )
    torch.testing.assert_close(
        answers.gather_crystals(batch.rows), teacher(batch).crystals
    )


@pytest.mark.parametrize("row", [3, 12, -1])
def test_a_crystal_that_nobody_asked_about_is_named(row, store):
    answers = answers_for(Plain(), store, [4, 2], **HERE)
    with pytest.raises(InputError, match=f"not asked about row {row} of the store"):
        answers.gather_atoms(torch.tensor([4, row]))
    with pytest.raises(InputError, match=f"not asked about row {row} of the store"):
        answers.gather_crystals(torch.tensor([4, row]))


def test_no_crystals_are_refused(store):
    with pytest.raises(InputError, match="there are no crystals to ask the teacher"):
        answers_for(Plain(), store, [], **HERE)


def test_a_level_without_answers_is_refused(store):
    answers = answers_for(Plain(), store, [1], **HERE)
    answers.crystals = None
    for ask in (
        lambda: answers.gather_crystals(torch.tensor([1])),
        lambda: answers.statistics("crystals"),
    ):
        with pytest.raises(InputError, match="teacher does not answer for crystals"):
            ask()


def test_a_device_gets_what_was_asked_for_and_no_more(store):
    answers_for(Plain(), store, np.arange(12), **HERE)
    answers = answers_for(Plain(), store, [7, 2], **HERE)
    atoms = sum(len(CRYSTALS[row].atomic_numbers) for row in (2, 7))
    assert answers.nbytes == 4 * (4 * atoms + 2)
    moved = answers.to("cpu")
    assert len(moved.atoms.values) == atoms
    assert (moved.atoms.values.nbytes + moved.crystals.values.nbytes) == answers.nbytes
    check(moved, store, [7, 2, 2])
    with pytest.raises(InputError, match="not asked about row 3"):
        moved.gather_atoms(torch.tensor([3]))


# -------------------------------------------------------------------------- statistics


def test_statistics_equal_those_of_numpy(store, monkeypatch):
    monkeypatch.setattr("crysdistill.teachers.answers._AT_ONCE", 5)  # several parts
    rows = [1, 3, 6, 10]
    answers = answers_for(Plain(), store, rows, **HERE)
    atoms = answers.gather_atoms(torch.tensor(rows)).double().numpy()
    mean, var = answers.statistics("atoms")
    np.testing.assert_allclose(mean, atoms.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, atoms.var(0), rtol=1e-6)
    crystals = answers.gather_crystals(torch.tensor(rows)).double().numpy()
    mean, var = answers.statistics("crystals")
    np.testing.assert_allclose(var, crystals.var(0), rtol=1e-6)


def test_statistics_of_large_numbers_that_hardly_differ():
    torch.manual_seed(0)
    x = 1000 + 0.1 * torch.randn(500, 3)
    x[:, 1] = 3.3  # always the same
    rows = torch.arange(500)
    block = Block(x, rows, torch.ones_like(rows))
    mean, var = TeacherAnswers(rows, None, block).statistics("crystals")
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-7)
    expected = x.double().var(0, unbiased=False)
    expected[1] = 0
    np.testing.assert_allclose(var, expected, rtol=1e-6)


# ----------------------------------------------------------------- asked once, for all


def test_only_what_is_missing_is_asked_about(store):
    first, second, third = Plain(), Plain(), Plain()
    answers_for(first, store, [7, 2, 5], **HERE)
    check(answers_for(second, store, [2, 3, 7, 8], **HERE), store, [8, 2, 3, 7])
    check(answers_for(third, store, [2, 3, 5, 7, 8], **HERE), store, [5, 8])
    assert (first.asked, second.asked, third.asked) == ([2, 5, 7], [3, 8], [])
    assert len(folders(store)) == 1


def test_another_teacher_or_other_structures_have_their_own(store, tmp_path):
    answers_for(Plain(), store, [1], **HERE)
    other = Plain("other")
    answers_for(other, store, [1], **HERE)
    assert other.asked == [1]
    assert len(folders(store)) == 2
    # A store with the same name but other structures.
    moved = [replace(c, cell=c.cell * 1.01) for c in CRYSTALS]
    new = open_store(tmp_path / "new" / "s.h5", moved)
    shutil.copy(new.path, store.path)
    again = Plain()
    answers_for(again, Store.open(store.path), [1], **HERE)
    assert again.asked == [1]


def test_the_name_of_a_teacher_does_not_matter(store):
    answers_for(Plain(), store, [1, 2], **HERE)
    again = Renamed("moved")
    check(answers_for(again, store, [1, 2], **HERE), store, [2, 1])
    assert not again.asked


def test_labels_and_graph_do_not_matter_to_who_does_not_read_them(store, tmp_path):
    answers_for(Plain(), store, [1, 2], **HERE)
    plain = [replace(c, properties={}) for c in CRYSTALS]
    graph = replace(SMALL_GRAPH, max_neighbors=3)
    other = open_store(tmp_path / "other" / "s.h5", plain, graph=graph)
    shutil.copy(other.path, store.path)
    again = Plain()
    check(answers_for(again, Store.open(store.path), [1, 2], **HERE), store, [2, 1])
    assert not again.asked


def test_a_killed_computation_goes_on(store, monkeypatch):
    monkeypatch.setattr("crysdistill.teachers.asking._CRYSTALS", 3)
    monkeypatch.setattr("crysdistill.teachers.kept._EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        answers_for(Dies(), store, np.arange(12), **HERE)
    again = Plain()
    check(answers_for(again, store, np.arange(12), **HERE), store, list(range(12)))
    assert again.asked == list(range(3, 12))


def test_answers_count_only_once_they_are_on_the_disk(store, monkeypatch):
    """A process may die between writing the answers and committing them."""
    monkeypatch.setattr(AnswerWriter, "commit", lambda self: None)
    answers_for(Plain(), store, [1, 2], **HERE)
    monkeypatch.undo()
    again = Plain()
    answers_for(again, store, [1, 2], **HERE)
    assert again.asked == [1, 2]


@pytest.mark.parametrize("name", ["atoms.f32", "crystals.f32", "done", "about.json"])
def test_a_damaged_file_is_made_anew(name, store):
    answers_for(Plain(), store, [1, 2], **HERE)
    path = folders(store)[0] / name
    path.write_bytes(path.read_bytes()[:-1])
    again = Plain()
    check(answers_for(again, store, [1, 2], **HERE), store, [2, 1])
    assert again.asked == [1, 2]


def test_what_nobody_asked_about_takes_no_room(tmp_path):
    store = open_store(tmp_path / "s.h5", CRYSTALS)
    teacher = Plain()
    teacher.atom_width = 10**6
    kept = tmp_path / "s.h5.teachers"
    with pytest.raises(
        RuntimeError, match=r"plain answered \(2, 4\), not \(2, 1000000"
    ):
        answers_for(teacher, store, [1], **HERE)
    (path,) = kept.rglob("atoms.f32")
    assert path.stat().st_size == 4 * 10**6 * store.atom_offsets[-1]
    assert path.stat().st_blocks * 512 < 100_000


def test_where_nothing_can_be_written_the_run_keeps_them(store, tmp_path):
    Path(f"{store.path}.teachers").write_text("a file in the way")
    text = (
        r"s\.h5\.teachers/\w+: cannot write the answers of plain there; give a folder"
    )
    with pytest.raises(InputError, match=text):
        answers_for(Plain(), store, [1], **HERE)
    run = tmp_path / "run"
    check(answers_for(Plain(), store, [1, 5], fallback=run, **HERE), store, [5, 1])
    assert len(list(run.glob("teacher/*/about.json"))) == 1
    again = Plain()
    answers_for(again, store, [1, 5], fallback=run, **HERE)
    assert not again.asked


def test_a_run_waits_for_another_that_asks_the_same(store, capsys):
    answers_for(Plain(), store, [1], **HERE)
    held = threading.Event()

    def hold() -> None:
        with (folders(store)[0] / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    answers_for(Plain(), store, [1], **HERE)  # existing answers need no lock
    assert other.is_alive()
    check(answers_for(Plain(), store, [1, 2], **HERE), store, [2])
    assert not other.is_alive()
    assert capsys.readouterr().err == "waiting for another run that asks plain\n"


def test_a_run_that_waited_has_nothing_left_to_ask(store, monkeypatch):
    class Asks(Plain):
        @contextmanager
        def ready_for(self, store, rows, **_):
            assert len(rows), "got ready for no crystals"
            yield

    writing = KeptAnswers.writing

    def other_first(self):
        monkeypatch.undo()  # the other run asks, and then this one gets the lock
        answers_for(Plain(), store, [1, 2], **HERE)
        return writing(self)

    monkeypatch.setattr(KeptAnswers, "writing", other_first)
    late = Asks()
    check(answers_for(late, store, [1, 2], **HERE), store, [1, 2])
    assert not late.asked


def test_a_full_disk_is_told_and_what_is_there_stays(store, monkeypatch):
    def full(self, *_):
        raise OSError(FULL[0], "No space left on device")

    answers_for(Plain(), store, [1], **HERE)
    monkeypatch.setattr(AnswerWriter, "_write", full)
    with pytest.raises(
        InputError, match=r"No space left .* answers so far are kept in"
    ):
        answers_for(Plain(), store, [1, 2], **HERE)
    monkeypatch.undo()
    again = Plain()
    answers_for(again, store, [1, 2], **HERE)
    assert again.asked == [2]


def test_an_answer_that_is_no_number_is_refused_and_named(store):
    class Bad(Plain):
        def __call__(self, batch):
            answer = super().__call__(batch)
            answer.atoms[batch.batch == 2, 1] = float("nan")
            return answer

    text = f"plain answers for {CRYSTALS[5].material_id} with a number that is not fin"
    with pytest.raises(InputError, match=text):
        answers_for(Bad(), store, [1, 3, 5, 7], **HERE)


# ------------------------------------------------------------------- in many processes


@pytest.mark.slow
def test_a_slow_teacher_is_asked_on_all_cores(store, monkeypatch, forked_workers):
    monkeypatch.setattr("crysdistill.teachers.asking._SLOW_CRYSTALS", 2)
    teacher = Slow()
    answers = answers_for(teacher, store, np.arange(12), workers=2, progress=False)
    assert not teacher.asked  # the workers were asked
    check(answers, store, list(range(12)))


@pytest.mark.slow
def test_the_first_rank_asks_and_the_others_find_the_answers(store):
    found = together(2, joined_call, _count, store.path)
    assert found == [12.0, 12.0], found


def _count(path: Path) -> float:
    answers = answers_for(Plain(), Store.open(path), np.arange(12), **HERE)
    return float(len(answers.gather_crystals(torch.arange(12))))
