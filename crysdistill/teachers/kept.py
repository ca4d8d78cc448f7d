"""A teacher's answers, kept beside the store for all runs.

`STORE.h5.teachers/KEY/` holds one teacher's answers for the crystals of one store:

- `atoms.f32` and `crystals.f32`: the vectors of all atoms and crystals of the store, in
  its order; crystals without answers are holes, which take no room on the disk;
- `done`: a byte for each crystal, 1 once its answers are on the disk;
- `about.json`: a description of the answers.

A computation that was killed continues where it stopped. Answers for other crystals are
added when they are needed.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.files import FULL, write_whole
from crysdistill.store.store import Store
from crysdistill.teachers.answers import Block, TeacherAnswers
from crysdistill.teachers.teacher import Answer

_EVERY = 2.0  # seconds between two writes of answers to the disk


@dataclass(frozen=True)
class About:
    """What a folder of answers holds.

    Args:
        teacher: its current name, for messages.
        key: a hash of the teacher and the structures.
        crystals: the number of crystals in the store.
        atoms: the number of atoms in the store.
        atom_width: F, or None.
        crystal_width: F', or None.
    """

    teacher: str = field(compare=False)
    key: str
    crystals: int
    atoms: int
    atom_width: int | None
    crystal_width: int | None


class KeptAnswers:
    """A folder of answers.

    Args:
        folder: the folder; it need not exist yet.
        about: what the folder holds, or will hold.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = folder
        self.about = about

    @classmethod
    def open(cls, folder: Path) -> KeptAnswers:
        """Open a folder that holds answers.

        Raises:
            InputError: it holds none.
        """
        try:
            text = (folder / "about.json").read_text("utf-8")
            return cls(folder, About(**json.loads(text)))
        except (OSError, ValueError, TypeError):
            raise InputError(
                f"{folder} holds no readable answers of a teacher; remove it"
            ) from None

    @property
    def _sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        about = self.about
        sizes = {"done": about.crystals}
        if about.atom_width is not None:
            sizes["atoms.f32"] = 4 * about.atoms * about.atom_width
        if about.crystal_width is not None:
            sizes["crystals.f32"] = 4 * about.crystals * about.crystal_width
        return sizes

    def done(self) -> np.ndarray:
        """Return which crystals have answers, (crystals,); none in damaged files."""
        none = np.zeros(self.about.crystals, dtype=bool)
        try:
            if KeptAnswers.open(self.folder).about != self.about:
                return none
            for name, size in self._sizes.items():
                if (self.folder / name).stat().st_size != size:
                    return none
            return np.fromfile(self.folder / "done", np.uint8) == 1
        except (OSError, InputError):
            return none

    def answers(self, store: Store, rows: Tensor) -> TeacherAnswers:
        """Map the answers for some crystals, which must all be there."""
        done = torch.from_numpy(self.done())
        offsets = torch.from_numpy(np.asarray(store.atom_offsets, np.int64))

        def block(name: str, width: int | None, ends: Tensor) -> Block | None:
            if width is None:
                return None
            values = self._map(name, (int(ends[-1]), width))
            first = ends[:-1].masked_fill(~done, -1)
            return Block(values, first, ends[1:] - ends[:-1])

        about = self.about
        return TeacherAnswers(
            rows,
            block("atoms.f32", about.atom_width, offsets),
            block("crystals.f32", about.crystal_width, torch.arange(len(store) + 1)),
        )

    def _map(self, name: str, shape: tuple[int, int]) -> Tensor:
        # "Copy on write" spares torch a warning of arrays that cannot be written.
        values = np.memmap(self.folder / name, np.float32, "c", shape=shape)
        return torch.from_numpy(values)

    def can_write(self) -> bool:
        """Create the folder; return whether it can be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "lock").open("a").close()
        except OSError as error:
            if error.errno in FULL:
                raise
            return False
        return True

    @contextmanager
    def writing(self) -> Iterator[AnswerWriter]:
        """Hold the folder's lock; wait if another process holds it.

        Raises:
            OSError: the disk is full.
        """
        with ExitStack() as stack:
            lock = stack.enter_context((self.folder / "lock").open("w"))
            _wait_for(lock, self.about.teacher)
            done = self.done()
            if not done.any():
                self._create()
            files = {
                name: stack.enter_context((self.folder / name).open("r+b"))
                for name in self._sizes
            }
            writer = AnswerWriter(files, done)
            yield writer
            writer.commit()

    def _create(self) -> None:
        """Create sparse files, and `about.json` last, once they are complete."""
        (self.folder / "about.json").unlink(missing_ok=True)
        for name, size in self._sizes.items():
            path = self.folder / name
            path.unlink(missing_ok=True)  # another run may have mapped the old one
            with path.open("wb") as file:
                file.truncate(size)
        text = json.dumps(asdict(self.about), indent=2)
        write_whole(self.folder / "about.json", text.encode())


class AnswerWriter:
    """Writes answers to their places in the files.

    Args:
        files: open files by name.
        done: (crystals,) which crystals have answers.
    """

    def __init__(self, files: Mapping[str, IO[bytes]], done: np.ndarray) -> None:
        self.done = done
        self._files = files
        self._waiting: list[np.ndarray] = []
        self._last = time.monotonic()

    def write(self, rows: np.ndarray, answer: Answer, store: Store) -> None:
        """Write a teacher's answers for some crystals.

        The files are not mapped into memory: a full disk would then end the process.
        """
        offsets = store.atom_offsets
        if answer.atoms is not None:
            counts = offsets[rows + 1] - offsets[rows]
            self._write("atoms.f32", answer.atoms, offsets[rows], counts)
        if answer.crystals is not None:
            self._write("crystals.f32", answer.crystals, rows, np.ones_like(rows))
        self._waiting.append(rows)
        if time.monotonic() - self._last > _EVERY:
            self.commit()

    def _write(
        self, name: str, values: Tensor, first: np.ndarray, counts: np.ndarray
    ) -> None:
        x = np.ascontiguousarray(values.float().cpu().numpy())
        file, end = self._files[name], 0
        for place, count in zip(first.tolist(), counts.tolist(), strict=True):
            file.seek(place * x[:1].nbytes)
            file.write(x[end : end + count])
            end += count

    def commit(self) -> None:
        """Write the answers to the disk, and only then mark them as done."""
        if not self._waiting:
            return
        names = [name for name in self._files if name != "done"]
        for name in names:
            _to_disk(self._files[name])
        flags = self._files["done"]
        for row in np.concatenate(self._waiting).tolist():
            flags.seek(row)
            flags.write(b"\1")
            self.done[row] = True
        _to_disk(flags)
        self._waiting, self._last = [], time.monotonic()


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _wait_for(lock: IO[str], teacher: str) -> None:
    """Take a lock; wait while a live process holds it (a dead one holds none)."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that asks {teacher}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # a disk without locks: both compute the same
