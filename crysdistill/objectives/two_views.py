"""The base of all objectives that compare two views of a crystal."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.layers.settings import at_least
from crysdistill.objectives.nearest import NearestIsAlike
from crysdistill.objectives.objective import Embedded, Objective, full_precision
from crysdistill.objectives.views import (
    Chain,
    DroppedEdges,
    MaskedAtoms,
    MovedAtoms,
    View,
)
from crysdistill.ranks import gather_rows, world_size

__all__ = ["TwoViews", "projector", "two_chains"]


def two_chains(mask_fraction: float, drop_fraction: float, sigma: float) -> list[View]:
    """Return two views with the same settings and different random draws.

    Args:
        mask_fraction: the chance that an atom is hidden; 0 hides none.
        drop_fraction: the chance that a bond is left out; 0 leaves out none.
        sigma: Å, how far atoms are moved along each axis; 0 moves none.

    Raises:
        InputError: one is out of range, or all are 0.
    """
    for name, value, unit in (
        ("mask_fraction", mask_fraction, ""),
        ("drop_fraction", drop_fraction, ""),
        ("sigma", sigma, " Å"),
    ):
        if not 0 <= value <= 1:
            raise InputError(f"`{name}` is {value} but must be between 0 and 1{unit}")
    steps: list[View] = []
    if mask_fraction:
        steps.append(MaskedAtoms(mask_fraction))
    if drop_fraction:
        steps.append(DroppedEdges(drop_fraction))
    if sigma:
        steps.append(MovedAtoms(sigma))
    if not steps:
        raise InputError(
            "`mask_fraction`, `drop_fraction` and `sigma` are all 0, so both views are "
            "the same; set one"
        )
    return [Chain(steps, name=name) for name in ("one", "two")]


def projector(width: int, projected: int) -> nn.Sequential:
    """Return the layers between embeddings and a loss: Linear, ReLU, Linear.

    Args:
        width: F', of the embeddings.
        projected: P, of the projected embeddings.

    Raises:
        InputError: `projected` is less than 2.
    """
    at_least(2, projected=projected)
    # No bias at the end: adding it to all rows changes no variance and no difference.
    return nn.Sequential(
        nn.Linear(width, projected),
        nn.ReLU(),
        nn.Linear(projected, projected, bias=False),
    )


class TwoViews(Objective):
    """Embed two views of a crystal alike, and different crystals differently.

    A subclass defines the loss. It compares the crystals of the whole batch, over all
    ranks: each rank computes the whole loss and returns its share.

    Number: `NAME_retrieval`. Both views of all validation crystals are embedded; it is
    how often the embedding nearest to a view, by cosine, is the other view of the same
    crystal. The chance level draws that embedding at random.

    Args:
        crystal_width: F', the width of crystal embeddings.
        mask_fraction: the chance that an atom is hidden.
        drop_fraction: the chance that a bond is left out.
        sigma: Å, how far atoms are moved along each axis.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str]

    def __init__(
        self,
        crystal_width: int,
        mask_fraction: float,
        drop_fraction: float,
        sigma: float,
    ) -> None:
        super().__init__()
        self.views = tuple(two_chains(mask_fraction, drop_fraction, sigma))
        self.retrieval = NearestIsAlike(crystal_width)

    @abstractmethod
    def compare(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the loss of the crystals of all ranks.

        Args:
            one: (B, F'), embeddings of the first view, at least in single precision.
            two: (B, F'), embeddings of the second view.
        """

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the loss; 0 if there is only one crystal."""
        both = torch.cat([embedded.crystals for embedded in seen], dim=1)  # (B, 2 F')
        rows, _ = gather_rows(full_precision(both))
        # Half precision is too coarse for correlations.
        with torch.autocast(rows.device.type, enabled=False):
            loss = self.compare(*rows.chunk(2, dim=1))
        return loss * float(len(rows) > 1) / world_size()

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the number."""
        for embedded in seen:
            self.retrieval.update(embedded.crystals, batch.rows)

    def compute(self) -> dict[str, float]:
        """Return the retrieval precision beside its chance level."""
        precision, chance = self.retrieval.compute()
        return {
            f"{self.name}_retrieval": precision.item(),
            f"{self.name}_retrieval_chance": chance.item(),
        }
