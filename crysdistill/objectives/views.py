"""Views: versions of a batch to show to an encoder.

A view is a value: equal views share one pass of the encoder, whichever objectives ask
for them. Its random draws depend on the seed of the step, on its kind and name, and on
the crystal's row in the store. So they are the same in every batch and on every rank,
and views of one kind draw differently if their names differ.

There is no view of the primitive cell, because finding the symmetry of a crystal takes
longer than learning from it. A corpus of primitive cells with `Supercell` has the same
effect.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, replace
from crysdistill.graphs.edits import (
    drop_edges,
    move_atoms,
    rebuild,
    repeat_cell,
    strain,
)
from crysdistill.graphs.randomness import (
    per_atom_normal,
    per_atom_uniform,
    per_bond_uniform,
    per_crystal_uniform,
)
from crysdistill.graphs.search import check_searchable

__all__ = [
    "Chain",
    "Clean",
    "DroppedEdges",
    "MaskedAtoms",
    "MovedAtoms",
    "Rebuilt",
    "Strained",
    "Supercell",
    "View",
    "masked_or_clean",
]


@dataclass(frozen=True, kw_only=True)
class View(ABC):
    """A frozen dataclass that turns a batch into the batch to encode.

    Args:
        name: of its random draws.
    """

    name: str = ""

    @abstractmethod
    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return the batch to encode, leaving the given one unchanged.

        Args:
            batch: crystals of a store; its `rows` are their rows there.
            seed: of the step.
        """

    @property
    def stream(self) -> str:
        """The name that keeps its draws apart from those of other views."""
        return f"{type(self).__name__} {self.name}"

    def called(self, name: str) -> Self:
        """Return the same view under another name."""
        return dataclasses.replace(self, name=name)


@dataclass(frozen=True)
class Clean(View):
    """The batch without changes."""

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return `batch` itself."""
        return batch


# -------------------------------------------------------------- what is hidden


@dataclass(frozen=True)
class MaskedAtoms(View):
    """Hide the elements of some atoms: at least one in every crystal, but never all.

    A hidden atom stays in the graph and has atomic number 0, whose row in an element
    table means "no element". The returned batch has one more attribute, `masked_atoms`
    (N,) bool.

    Source: attribute masking, W. Hu et al., ICLR 2020, arXiv:1905.12265.

    Args:
        fraction: the chance of each atom. The atom with its crystal's lowest draw is
            always hidden, so that small cells lose a larger share. The atom with the
            highest draw never is, unless it is the only one.

    Raises:
        InputError: `fraction` is not in (0, 1].
    """

    fraction: float = 0.15

    def __post_init__(self) -> None:
        _check_most("fraction", self.fraction, 1)

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return a copy of `batch` with hidden atoms."""
        draw = per_atom_uniform(batch, seed, self.stream)  # (N,)
        visible = batch.atomic_numbers > 0
        # Only among atoms that no earlier view has hidden.
        lowest = _per_crystal(draw.masked_fill(~visible, 1.0), batch, "amin")
        highest = _per_crystal(draw.masked_fill(~visible, 0.0), batch, "amax")
        several = (batch.ptr.diff() > 1)[batch.batch]
        masked = visible & ((draw < self.fraction) | (draw == lowest))
        masked = masked & ~(several & (draw == highest))
        return replace(
            batch,
            atomic_numbers=batch.atomic_numbers.masked_fill(masked, 0),
            masked_atoms=masked | ~visible,
        )


@dataclass(frozen=True)
class DroppedEdges(View):
    """Leave some bonds out, in both directions; every atom keeps at least one.

    Fake edges of graph mode `cgcnn` stay.

    Source: edge masking, R. Magar, Y. Wang and A. Barati Farimani, npj Comput. Mater.
    8, 231 (2022), doi:10.1038/s41524-022-00921-5.

    Differs from the paper: a bond is left out in both directions or in neither.

    Args:
        fraction: the chance of each bond. An atom always keeps its bond with the
            highest draw, so that atoms with few neighbours lose a smaller share.

    Raises:
        InputError: `fraction` is not in (0, 1].
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        _check_most("fraction", self.fraction, 1)

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return a copy of `batch` with fewer edges."""
        draw = per_bond_uniform(batch, seed, self.stream)  # (E,)
        neighbour, centre = batch.edge_index
        padding = getattr(batch, "padding", torch.zeros_like(centre, dtype=torch.bool))
        best = draw.new_full((batch.num_nodes,), -1.0)  # (N,)
        best = best.scatter_reduce(0, centre, draw.masked_fill(padding, -1.0), "amax")
        # A bond that either end needs stays in both directions.
        needed = (draw == best[centre]) | (draw == best[neighbour])
        return drop_edges(batch, (draw < self.fraction) & ~needed & ~padding)


# --------------------------------------------------------------- what is moved


@dataclass(frozen=True)
class MovedAtoms(View):
    """Move atoms by normally distributed steps, keeping the list of neighbours.

    From a `sigma` of about 0.1 Å on, other atoms may be nearest: chain with `Rebuilt`.

    Source: S. Zaidi et al., ICLR 2023, arXiv:2206.00133.

    Args:
        sigma: Å, the standard deviation along each axis.
        drawn: whether each crystal draws its own deviation, uniform between 0 and
            `sigma`.

    Raises:
        InputError: `sigma` is not in (0, 1] Å.
    """

    sigma: float = 0.05
    drawn: bool = False

    def __post_init__(self) -> None:
        _check_most("sigma", self.sigma, 1, " Å")

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return a copy of `batch` with moved atoms."""
        by = self.sigma * per_atom_normal(batch, 3, seed, self.stream)  # (N, 3)
        if self.drawn:
            stream = f"{self.stream} sigma"
            share = per_crystal_uniform(batch.rows, 1, seed, stream)  # (B, 1)
            by = by * share[batch.batch]
        return move_atoms(batch, by)


@dataclass(frozen=True)
class Strained(View):
    """Strain each cell at random, without rotation, keeping the list of neighbours.

    From a few hundredths on, other atoms may be nearest: chain with `Rebuilt`.

    Args:
        largest: each of the six components is uniform between `-largest` and `largest`.

    Raises:
        InputError: `largest` is not in (0, 0.3]; above a third a cell could collapse.
    """

    largest: float = 0.02

    def __post_init__(self) -> None:
        _check_most("largest", self.largest, 0.3)

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return a copy of `batch` with strained cells."""
        draw = per_crystal_uniform(batch.rows, 6, seed, self.stream)  # (B, 6)
        xx, yy, zz, yz, xz, xy = (self.largest * (2 * draw - 1)).unbind(1)
        rows = torch.stack((xx, xy, xz, xy, yy, yz, xz, yz, zz), dim=1)  # (B, 9)
        return strain(batch, rows.view(-1, 3, 3))


@dataclass(frozen=True)
class Rebuilt(View):
    """Find the neighbours again, as the last view of a chain with large moves.

    A compiled loop on the host does this, and a device has to wait for it. If an atom
    would have no neighbour within the cutoff, its crystal keeps its old edges.

    Args:
        graph: how to pick neighbours, as in the store.

    Raises:
        InputError: the graph's mode is `cgcnn`.
    """

    graph: GraphSettings

    def __post_init__(self) -> None:
        check_searchable(self.graph)

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return a copy of `batch` with another graph."""
        return rebuild(batch, self.graph, lonely="keep")


# ------------------------------------------- the same crystal, described otherwise


@dataclass(frozen=True)
class Supercell(View):
    """Describe each crystal by a cell that is several times as long along one axis.

    The returned batch has more atoms than the given one. Its attribute `copy_of` (N',)
    holds, for each atom, the original atom.

    Args:
        copies: how many times as long.
        axis: 0, 1 or 2; None draws one for each crystal.

    Raises:
        InputError: `copies` is not 2 to 8, or `axis` is none of 0, 1, 2 and None.
    """

    copies: int = 2
    axis: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.copies <= 8:
            raise InputError(f"`copies` is {self.copies} but must be between 2 and 8")
        if self.axis not in (None, 0, 1, 2):
            raise InputError(f"`axis` is {self.axis} but must be 0, 1, 2 or None")

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return a copy of `batch` in larger cells."""
        if self.axis is None:
            draw = per_crystal_uniform(batch.rows, 1, seed, self.stream)  # (B, 1)
            axis = (3 * draw).long()
        else:
            axis = torch.full_like(batch.rows, self.axis).unsqueeze(1)
        times = torch.ones_like(axis).repeat(1, 3)  # (B, 3)
        return repeat_cell(batch, times.scatter(1, axis, self.copies))


@dataclass(frozen=True)
class Chain(View):
    """Several views, one after the other.

    Args:
        views: the first is applied first.
        name: prefixed to the names of its views, so that two chains of the same views
            draw differently.

    Raises:
        InputError: there are no views, or two of one kind would draw alike.
    """

    views: Sequence[View]

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))  # a tuple has a hash
        streams = [view.stream for view in self.views]
        if not streams:
            raise InputError("`views` is empty; name at least one")
        for view in self.views:
            if streams.count(view.stream) > 1:
                raise InputError(
                    f"two views {type(view).__name__} of a chain would draw alike; "
                    "give one another `name`"
                )

    def __call__(self, batch: CrystalBatch, seed: int) -> CrystalBatch:
        """Return `batch` after all views."""
        for view in self.views:
            own = view.called(f"{self.name} {view.name}") if self.name else view
            batch = own(batch, seed)
        return batch


# ------------------------------------------------------------------------------


def masked_or_clean(mask_fraction: float) -> View:
    """Return the view for an objective's setting `mask_fraction`.

    Raises:
        InputError: it is not in [0, 1].
    """
    if not 0 <= mask_fraction <= 1:
        raise InputError(
            f"`mask_fraction` is {mask_fraction} but must be between 0 and 1"
        )
    return MaskedAtoms(mask_fraction) if mask_fraction else Clean()


def _check_most(name: str, value: float, most: float, unit: str = "") -> None:
    """Refuse a value that is not above 0 and at most `most`."""
    if not 0 < value <= most:
        raise InputError(
            f"`{name}` is {value} but must be above 0 and at most {most}{unit}"
        )


def _per_crystal(x: Tensor, batch: CrystalBatch, which: str) -> Tensor:
    """Return the lowest or highest number of each atom's crystal, (N,)."""
    found = x.new_zeros(batch.num_graphs)
    found = found.scatter_reduce(0, batch.batch, x, which, include_self=False)
    return found[batch.batch]
