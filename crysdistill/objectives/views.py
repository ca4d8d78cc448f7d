"""Views: what an encoder is shown of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, replace
from crysdistill.graphs.randomness import per_atom_uniform

__all__ = ["Clean", "MaskedAtoms", "View"]


class View(Protocol):
    """A frozen dataclass that turns a batch into the batch that is encoded.

    Objectives with equal views share one pass of the encoder.
    """

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return the batch to encode; the one given is left as it is."""
        ...

    def __hash__(self) -> int:
        """Views are keys: the trainer encodes each distinct one once."""
        ...


@dataclass(frozen=True)
class Clean:
    """The batch as it is."""

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return `batch` itself."""
        return batch


@dataclass(frozen=True)
class MaskedAtoms:
    """Hide the element of some atoms, at least one in every crystal.

    A hidden atom has atomic number 0, whose row in an element table says "no
    element"; it stays in the graph. The batch returned has one more attribute,
    `masked_atoms` (N,) bool. Which atoms are hidden depends on the seed, the
    crystal's row in the store and the atom's number in its crystal alone.

    Source: attribute masking, W. Hu et al., ICLR 2020, arXiv:1905.12265.

    Args:
        fraction: the chance of each atom. An atom with the lowest draw in its
            crystal is always hidden, so that small cells lose a larger share.

    Raises:
        InputError: `fraction` is not in (0, 1].
    """

    fraction: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"`fraction` is {self.fraction} but must be above 0 and at most 1"
            )

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return a copy of `batch` with hidden atoms."""
        draw = per_atom_uniform(batch, seed, "masked atoms")  # (N,)
        lowest = draw.new_ones(batch.num_graphs)
        lowest = lowest.scatter_reduce(0, batch.batch, draw, "amin")  # (B,)
        masked = (draw < self.fraction) | (draw == lowest[batch.batch])  # (N,)
        return replace(
            batch,
            atomic_numbers=batch.atomic_numbers.masked_fill(masked, 0),
            masked_atoms=masked,
        )
