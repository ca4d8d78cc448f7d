"""What every teacher is: it answers for the atoms or crystals of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.store.store import Store
from crysdistill.teachers.answers import TeacherAnswers
from crysdistill.transfer.seen import Learned
from crysdistill.transfer.weights import Provenance


@dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher says of a batch.

    Args:
        atoms: (N, F); None where it does not answer for atoms.
        crystals: (B, F'); None where it does not answer for crystals.
    """

    atoms: Tensor | None
    crystals: Tensor | None


@dataclass(frozen=True, slots=True)
class Foreign:
    """What is known of a model that has no weights file of ours.

    Args:
        provenance: what it learned from, and under which licence.
        kind: as in `Learned`.
    """

    provenance: Provenance
    kind: str = "foreign"


class Teacher(ABC):
    """Answers for crystals, and does not learn.

    It is no `nn.Module`, so that a module which holds one neither trains it nor saves
    it among its own weights. A subclass is one file.

    Attributes:
        SLOW: whether an answer takes so long that all cores should give answers.
        name: what people call it.
        atom_width: F, of its answers for atoms; None where it gives none.
        crystal_width: F', of its answers for crystals; None where it gives none.
        graph: the graph that batches must have; None if it finds its own neighbours.
        learned: what it has learned from; None for one that has learned nothing.
    """

    SLOW: ClassVar[bool] = False
    name: str
    atom_width: int | None = None
    crystal_width: int | None = None
    graph: GraphSettings | None = None
    learned: Learned | None = None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what its answers depend on, as a hash of 64 hex digits."""

    @abstractmethod
    def __call__(self, batch: CrystalBatch) -> Answer:
        """Answer for a batch, without gradients; the rest of the batch has no say."""

    def prepare(  # noqa: B027 - most need nothing
        self, store: Store, rows: np.ndarray
    ) -> None:
        """Get ready to be asked about some crystals.

        Args:
            store: where they are.
            rows: which of them a student will learn from.

        Raises:
            InputError: it cannot answer for one of them.
        """

    def knows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Return about which crystals it can be asked, (R,) bool; all, for most.

        Where only some of them are to be learned from, the others are left out. Every
        rank asks, and must be told the same.

        Args:
            store: where they are.
            rows: (R,).
        """
        return np.ones(len(rows), dtype=bool)

    def at_hand(self, rows: np.ndarray) -> TeacherAnswers | None:
        """Return answers that need no computing; None if it has to think."""
        return None

    def to(self, device: str | torch.device) -> Teacher:
        """Move to a device, in place."""
        return self

    @property
    def provenance(self) -> Provenance:
        """What it learned from and under which licence: its students hand that on."""
        if self.learned is None:
            return Provenance(origin=f"{self.name}, which has learned nothing")
        return self.learned.provenance
