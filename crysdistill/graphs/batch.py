"""The batch of crystals, and the operations with which encoders read it.

Shapes, here and everywhere: N atoms, E edges, B crystals, F width, K basis
functions, T targets. Edges are sorted by their centre atom, so that a sum over the
neighbours of an atom is a sum over consecutive rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from crysdistill.errors import BadStructure
from crysdistill.graphs.neighbors import GraphSettings, find_neighbors

if TYPE_CHECKING:
    from crysdistill.structures.crystal import Crystal

__all__ = [
    "CrystalBatch",
    "GraphSettings",
    "composition",
    "distances",
    "edge_vectors",
    "gather_centres",
    "gather_crystals",
    "gather_neighbours",
    "make_batch",
    "mean_over_atoms",
    "mean_over_edges",
    "mean_over_neighbours",
    "replace",
    "softmax_over_atoms",
    "softmax_over_neighbours",
    "sum_over_atoms",
    "sum_over_neighbours",
]


class CrystalBatch(Data):
    """B crystals as one graph of flat tensors.

    A PyG `Data`, so that `.to(device)`, `.pin_memory()` and PyG layers work on it.

    Attributes:
        atomic_numbers: (N,) int64; 0 is a masked atom.
        frac_coords: (N, 3) float32.
        cell: (B, 3, 3) float32, Å, rows are lattice vectors.
        edge_index: (2, E) int64; row 0 the neighbour j, row 1 the centre i.
        edge_shift: (E, 3), lattice translations of the neighbour.
        padding: (E,) bool, the fake edges of graph mode `cgcnn`; absent in others.
        padding_distance: Å, the length those fake edges claim.
        batch: (N,) int64, the crystal of each atom.
        ptr: (B + 1,) int64, the first atom of each crystal.
        neighbor_ptr: (N + 1,) int64, the first edge of each centre atom.
        space_groups: (B,) int64, 1-230; 0 where not known.
        targets: (B, T) float32; NaN where not known.
        rows: (B,) int64, the rows of the store that the crystals came from.
        material_ids: B names; absent in a store's batches, where `rows` identify them.
    """

    atomic_numbers: Tensor
    frac_coords: Tensor
    cell: Tensor
    edge_index: Tensor
    edge_shift: Tensor
    padding: Tensor
    padding_distance: float
    batch: Tensor
    ptr: Tensor
    neighbor_ptr: Tensor
    space_groups: Tensor
    targets: Tensor
    rows: Tensor
    material_ids: list[str]

    @property
    def num_graphs(self) -> int:
        """B, under the name that PyG uses."""
        return len(self.ptr) - 1

    def __repr__(self) -> str:
        return (
            f"CrystalBatch(crystals={self.num_graphs}, atoms={self.num_nodes}, "
            f"edges={self.num_edges})"
        )


def replace(batch: CrystalBatch, /, **tensors: Any) -> CrystalBatch:
    """Return a shallow copy of `batch` with some tensors replaced."""
    other = copy.copy(batch)
    for name, value in tensors.items():
        setattr(other, name, value)
    return other


# ------------------------------------------------------------------- the verbs


def edge_vectors(batch: CrystalBatch) -> Tensor:
    """Return the vectors from centre i to neighbour j, (E, 3) in Å."""
    cell = batch.cell  # (B, 3, 3)
    positions = torch.einsum(
        "na,nab->nb", batch.frac_coords, cell[batch.batch]
    )  # (N, 3)
    neighbour, centre = batch.edge_index
    shift = batch.edge_shift.to(cell.dtype)
    translation = torch.einsum("ea,eab->eb", shift, cell[batch.batch[centre]])  # (E, 3)
    return positions[neighbour] - positions[centre] + translation


def distances(batch: CrystalBatch) -> Tensor:
    """Return the length of every edge, (E,) in Å; fake edges have their own."""
    length = torch.linalg.vector_norm(edge_vectors(batch), dim=1)  # (E,)
    padding = getattr(batch, "padding", None)
    if padding is None:
        return length
    return length.masked_fill(padding, batch.padding_distance)


def gather_neighbours(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Return the row of each edge's neighbour j: (N, F) to (E, F)."""
    return x.index_select(0, batch.edge_index[0])


def gather_centres(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Return the row of each edge's centre i: (N, F) to (E, F)."""
    return x.index_select(0, batch.edge_index[1])


def gather_crystals(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Return the row of each atom's crystal: (B, F) to (N, F)."""
    return x.index_select(0, batch.batch)


def sum_over_neighbours(messages: Tensor, batch: CrystalBatch) -> Tensor:
    """Sum the messages that arrive at each atom: (E, ...) to (N, ...).

    Sums of half-precision numbers are float32, here and over atoms.
    """
    return _sum(messages, batch.edge_index[1], batch.num_nodes)


def mean_over_neighbours(messages: Tensor, batch: CrystalBatch) -> Tensor:
    """Average the messages that arrive at each atom: (E, F) to (N, F).

    An atom without neighbours has zeros.
    """
    counts = batch.neighbor_ptr[1:] - batch.neighbor_ptr[:-1]  # (N,)
    total = sum_over_neighbours(messages, batch)
    return total / counts.clamp(min=1).to(total.dtype).unsqueeze(1)


def softmax_over_neighbours(scores: Tensor, batch: CrystalBatch) -> Tensor:
    """Return weights that sum to one over the neighbours of each atom, (E, H).

    Args:
        scores: (E, H), one for each of H heads.
        batch: the batch of the edges.
    """
    return _softmax(scores, batch.edge_index[1], batch.num_nodes)


def sum_over_atoms(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Sum over the atoms of each crystal: (N, F) to (B, F)."""
    return _sum(x, batch.batch, batch.num_graphs)


def mean_over_atoms(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Average over the atoms of each crystal: (N, F) to (B, F)."""
    atoms = batch.ptr[1:] - batch.ptr[:-1]  # (B,)
    total = sum_over_atoms(x, batch)
    return total / atoms.to(total.dtype).unsqueeze(1)


def mean_over_edges(x: Tensor, batch: CrystalBatch) -> Tensor:
    """Average over all edges of each crystal: (E, F) to (B, F)."""
    first = batch.neighbor_ptr[batch.ptr]  # (B + 1,), the first edge of each crystal
    counts = (first[1:] - first[:-1]).clamp(min=1)  # (B,)
    crystal = batch.batch.index_select(0, batch.edge_index[1])  # (E,)
    total = _sum(x, crystal, batch.num_graphs)
    return total / counts.to(total.dtype).unsqueeze(1)


def softmax_over_atoms(scores: Tensor, batch: CrystalBatch) -> Tensor:
    """Return weights that sum to one over the atoms of each crystal, (N, H)."""
    return _softmax(scores, batch.batch, batch.num_graphs)


def composition(batch: CrystalBatch, elements: int = 101) -> Tensor:
    """Return the share of each atomic number in each crystal, (B, elements).

    Column 0 is the share of masked atoms. An atomic number without a column is an
    IndexError.
    """
    atoms = (batch.ptr[1:] - batch.ptr[:-1]).to(batch.cell.dtype)  # (B,)
    share = (1 / atoms).index_select(0, batch.batch)  # (N,)
    place = batch.batch, batch.atomic_numbers
    empty = share.new_zeros(batch.num_graphs, elements)
    return empty.index_put(place, share, accumulate=True)


def _sum(x: Tensor, owner: Tensor, owners: int) -> Tensor:
    x = _wide(x)
    return x.new_zeros(owners, *x.shape[1:]).index_add(0, owner, x)


def _softmax(scores: Tensor, owner: Tensor, owners: int) -> Tensor:
    scores = _wide(scores)
    index = owner.unsqueeze(1).expand_as(scores)
    # Subtract the largest score of each owner, so that no exponential overflows.
    largest = scores.detach().new_zeros(owners, scores.shape[1])
    largest = largest.scatter_reduce(
        0, index, scores.detach(), "amax", include_self=False
    )
    weights = torch.exp(scores - largest.index_select(0, owner))
    return weights / _sum(weights, owner, owners).index_select(0, owner)


def _wide(x: Tensor) -> Tensor:
    """Return `x` in float32 or wider, since half precision cannot count beyond 256."""
    if not x.is_floating_point():
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------- making a batch


def assemble(
    atomic_numbers: Tensor,
    frac_coords: Tensor,
    cell: Tensor,
    atoms: Tensor,
    neighbor: Tensor,
    shift: Tensor,
    counts: Tensor,
    settings: GraphSettings,
    **extra: Any,
) -> CrystalBatch:
    """Make a batch from concatenated arrays of B crystals.

    Args:
        atomic_numbers: (N,).
        frac_coords: (N, 3).
        cell: (B, 3, 3), Å.
        atoms: (B,) int64, atoms of each crystal.
        neighbor: (E,) int64, neighbours numbered from 0 in each crystal.
        shift: (E, 3), lattice translations.
        counts: (N,) int64, edges of each centre atom.
        settings: the graph's settings; mode `cgcnn` adds the published padding.
        extra: further attributes of the batch.
    """
    device = atoms.device
    n_atoms, n_edges = len(atomic_numbers), len(neighbor)
    ptr = torch.zeros(len(atoms) + 1, dtype=torch.int64, device=device)
    torch.cumsum(atoms, 0, out=ptr[1:])
    batch = torch.repeat_interleave(
        torch.arange(len(atoms), device=device), atoms, output_size=n_atoms
    )  # (N,)
    first_atom = ptr.index_select(0, batch)  # (N,)
    padding = None
    if settings.mode == "cgcnn":
        neighbor, shift, counts, padding = _pad(neighbor, shift, counts, settings)
        n_edges = len(neighbor)
    centre = torch.repeat_interleave(
        torch.arange(n_atoms, device=device), counts, output_size=n_edges
    )  # (E,)
    edge_index = torch.empty(2, n_edges, dtype=torch.int64, device=device)
    torch.add(neighbor, first_atom.index_select(0, centre), out=edge_index[0])
    edge_index[1] = centre
    neighbor_ptr = torch.zeros(n_atoms + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts, 0, out=neighbor_ptr[1:])
    return CrystalBatch(
        atomic_numbers=atomic_numbers.long(),
        frac_coords=frac_coords,
        cell=cell,
        edge_index=edge_index,
        edge_shift=shift,
        padding=padding,
        padding_distance=settings.cutoff + 1.0,
        batch=batch,
        ptr=ptr,
        neighbor_ptr=neighbor_ptr,
        num_nodes=n_atoms,
        **extra,
    )


def _pad(
    neighbor: Tensor, shift: Tensor, counts: Tensor, settings: GraphSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill every atom up to `max_neighbors` edges with fake ones to atom 0."""
    width = settings.max_neighbors
    # The k-th edge of atom i goes to place 12 i + k.
    places = torch.arange(len(neighbor), device=counts.device)
    missing = (width - counts).cumsum(0) - (width - counts)  # (N,), before each atom
    places = places + missing.repeat_interleave(counts, output_size=len(neighbor))
    full = neighbor.new_zeros(len(counts) * width)
    full.index_copy_(0, places, neighbor)
    full_shift = shift.new_zeros(len(full), 3)
    full_shift.index_copy_(0, places, shift)
    padding = torch.ones(len(full), dtype=torch.bool, device=counts.device)
    padding.index_fill_(0, places, False)
    return full, full_shift, torch.full_like(counts, width), padding


def make_batch(
    crystals: Sequence[Crystal],
    settings: GraphSettings | None = None,
    properties: Sequence[str] = (),
) -> CrystalBatch:
    """Make a batch directly from crystals and find their neighbours.

    Use this in tests, notebooks and single predictions; training reads stores.

    Args:
        crystals: the crystals of the batch.
        settings: the settings of the graph; the defaults if None.
        properties: the names of properties whose values become `targets` (B, T).

    Raises:
        BadStructure: a crystal has no graph; the text names it.
    """
    settings = settings or GraphSettings()
    graphs = []
    for crystal in crystals:
        try:
            graphs.append(find_neighbors(crystal.frac_coords, crystal.cell, settings))
        except BadStructure as error:
            raise BadStructure(f"{crystal.material_id}: {error}") from None
    targets = [
        [crystal.properties.get(name, np.nan) for name in properties]
        for crystal in crystals
    ]
    return assemble(
        torch.from_numpy(np.concatenate([c.atomic_numbers for c in crystals])),
        torch.from_numpy(np.concatenate([c.frac_coords for c in crystals])).float(),
        torch.from_numpy(np.stack([c.cell for c in crystals])).float(),
        torch.tensor([len(c.atomic_numbers) for c in crystals]),
        torch.from_numpy(np.concatenate([g.neighbor for g in graphs])),
        torch.from_numpy(np.concatenate([g.shifts for g in graphs]).astype(np.int8)),
        torch.from_numpy(np.concatenate([g.counts for g in graphs])),
        settings,
        space_groups=torch.zeros(len(crystals), dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.float32).reshape(len(crystals), -1),
        rows=torch.arange(len(crystals)),
        material_ids=[c.material_id for c in crystals],
    )
