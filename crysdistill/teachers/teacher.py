"""The base class of teachers, which answer for the atoms or crystals of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.store.formulas import Formulas
from crysdistill.store.store import Store
from crysdistill.teachers.answers import TeacherAnswers
from crysdistill.transfer.seen import Learned
from crysdistill.transfer.weights import Provenance


@dataclass(frozen=True, slots=True)
class Answer:
    """A teacher's answer for a batch.

    Args:
        atoms: (N, F); None if it does not answer for atoms.
        crystals: (B, F'); None if it does not answer for crystals. (B, 2 F') if the
            teacher `spreads`: the numbers, and then the spread of each.
    """

    atoms: Tensor | None
    crystals: Tensor | None


@dataclass(frozen=True, slots=True)
class Foreign:
    """What is known of a model that has no weights file of this package.

    Args:
        provenance: the model's training data and licence.
        kind: as in `Learned`.
    """

    provenance: Provenance
    kind: str = "foreign"


class Teacher(ABC):
    """Answers for crystals, and does not learn.

    A teacher is not an `nn.Module`: a module that holds one neither trains it nor saves
    its weights. A subclass is one file.

    Attributes:
        SLOW: whether answers take so long that all cores should compute them.
        name: the teacher's name in messages.
        atom_width: F, of its answers for atoms; None if it gives none.
        crystal_width: F', of its answers for crystals; None if it gives none.
        spreads: whether it says how uncertain each number of a crystal is. Students
            then learn with weights (`crysdistill.teachers.trust`).
        graph: the graph that batches must have; None if it finds its own neighbours.
        learned: its training data; None for an untrained teacher.
    """

    SLOW: ClassVar[bool] = False
    name: str
    atom_width: int | None = None
    crystal_width: int | None = None
    spreads: bool = False
    graph: GraphSettings | None = None
    learned: Learned | None = None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of all that its answers depend on, 64 hex digits."""

    @abstractmethod
    def __call__(self, batch: CrystalBatch) -> Answer:
        """Answer for a batch, without gradients, each crystal independently."""

    def prepare(  # noqa: B027 - most need nothing
        self, store: Store, rows: np.ndarray
    ) -> None:
        """Get ready to answer for some crystals.

        Args:
            store: the store with the crystals.
            rows: the rows that a student will learn from.

        Raises:
            InputError: it cannot answer for one of them.
        """

    def knows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Return which crystals it can answer for, (R,) bool; by default all.

        A run that may use only these crystals leaves the others out. Every rank calls
        this and must get the same result.

        Args:
            store: the store with the crystals.
            rows: (R,).
        """
        return np.ones(len(rows), dtype=bool)

    @contextmanager
    def ready_for(
        self,
        store: Store,
        rows: np.ndarray,
        *,
        fallback: Path | None = None,
        device: str | torch.device = "cpu",
        workers: int | None = None,
        progress: bool = True,
    ) -> Iterator[None]:
        """Hold what it needs to answer for these crystals, until the `with` block ends.

        By default nothing. `prepare` checks and writes nothing; this may compute for
        long: a teacher that asks other teachers asks them here, about all crystals.

        Args:
            store: the store with the crystals.
            rows: their rows.
            fallback: a folder for answers if the store's folder cannot be written to.
            device: where to compute.
            workers: processes that ask a slow teacher; None uses all cores.
            progress: whether to show a progress bar.

        Raises:
            InputError: it cannot answer for one of them.
        """
        yield

    def at_hand(self, rows: np.ndarray) -> TeacherAnswers | None:
        """Return answers that need no computing; None if they must be computed."""
        return None

    def to(self, device: str | torch.device) -> Teacher:
        """Move to a device, in place."""
        return self

    @property
    def kept_width(self) -> int | None:
        """The width of `Answer.crystals`, and of the file that keeps them."""
        both = 2 if self.spreads else 1
        return None if self.crystal_width is None else both * self.crystal_width

    @property
    def provenance(self) -> Provenance:
        """Its training data and licence, which its students inherit."""
        if self.learned is None:
            origin = f"{self.name}, which has learned nothing"
            return Provenance(origin=origin, formulas=Formulas(), used=())
        return self.learned.provenance
