"""Edits: functions that return a batch with changed crystals or another graph.

They do not change their input, and share unchanged tensors with it. After every edit,
edges are sorted by centre, and all tensors that count atoms or edges agree. All edits
except `rebuild` work on any device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crysdistill.errors import BadStructure
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, replace
from crysdistill.graphs.search import search

__all__ = ["drop_edges", "move_atoms", "rebuild", "repeat_cell", "strain"]


def drop_edges(batch: CrystalBatch, dropped: Tensor) -> CrystalBatch:
    """Leave some edges out.

    Args:
        batch: a batch with any graph.
        dropped: (E,) bool, the edges to drop. The caller must leave each atom one edge.
    """
    before = _starts(~dropped)  # (E + 1,), kept ones before each edge
    kept = (~dropped).nonzero().squeeze(1)  # (E',)
    return replace(
        batch,
        edge_index=batch.edge_index.index_select(1, kept),
        edge_shift=batch.edge_shift.index_select(0, kept),
        neighbor_ptr=before[batch.neighbor_ptr],
        padding=batch.padding[kept] if "padding" in batch else None,
    )


def move_atoms(batch: CrystalBatch, by: Tensor) -> CrystalBatch:
    """Move atoms; they keep their neighbours, but the distances change.

    Coordinates are not wrapped, so that edges keep their lattice translations.

    Args:
        batch: a batch with any graph.
        by: (N, 3), Å. Steps of a tenth of an Å or more may change the nearest
            neighbours; then use `rebuild`.
    """
    inverse, _ = torch.linalg.inv_ex(batch.cell)  # without waiting for a device
    steps = torch.einsum("na,nab->nb", by, inverse[batch.batch])  # (N, 3)
    return replace(batch, frac_coords=batch.frac_coords + steps)


def strain(batch: CrystalBatch, by: Tensor) -> CrystalBatch:
    """Strain the cells together with their atoms; atoms keep their neighbours.

    A vector v becomes v (1 + e).

    Args:
        batch: a batch with any graph.
        by: (B, 3, 3), e of each crystal; a symmetric e rotates nothing. Strains of a
            few hundredths may change the nearest neighbours; then use `rebuild`.
    """
    return replace(batch, cell=batch.cell + batch.cell @ by)


# ----------------------------------------------------------------- larger cells


def repeat_cell(batch: CrystalBatch, times: Tensor) -> CrystalBatch:
    """Describe each crystal by a cell that is several times as large.

    Each copy of an atom has copies of that atom's neighbours, at the same distances. A
    search would find the same graph, except for shells that mode `nearest` cuts. Fake
    edges of mode `cgcnn` point at atom 0 of the centre's own copy. The copy of the old
    cell at the origin comes first, with its atoms in their order.

    Args:
        batch: a batch with any graph.
        times: (B, 3) int64, along each lattice vector, at least 1.

    Returns:
        The batch, with one more attribute, `copy_of` (N',) int64: the original of each
        atom in the input batch. If that batch has copies itself, the originals are
        those of the batch before it.
    """
    device = batch.ptr.device
    sizes = batch.ptr.diff()  # (B,)
    ptr = _starts(sizes * times.prod(dim=1))
    crystal = _owners(ptr)  # (N',)
    number = torch.arange(len(crystal), device=device) - ptr[crystal]
    atom = batch.ptr[crystal] + number % sizes[crystal]  # (N',), in the batch given
    along = times[crystal]  # (N', 3)
    place = _unravel(number // sizes[crystal], along)  # (N', 3), of the copy

    neighbor_ptr = _starts(batch.neighbor_ptr.diff()[atom])
    centre = _owners(neighbor_ptr)  # (E',)
    nth = torch.arange(len(centre), device=device) - neighbor_ptr[centre]
    edge = batch.neighbor_ptr[atom[centre]] + nth  # (E',), in the batch given
    # The copy that holds the neighbour, and its lattice translation in large cells.
    there, along_e = place[centre] + batch.edge_shift[edge], along[centre]
    shift = torch.div(there, along_e, rounding_mode="floor")  # (E', 3)
    own = crystal[centre]
    neighbour = batch.edge_index[0, edge] - batch.ptr[own] + ptr[own]
    neighbour = neighbour + _ravel(there - shift * along_e, along_e) * sizes[own]

    return replace(
        batch,
        atomic_numbers=batch.atomic_numbers[atom],
        masked_atoms=batch.masked_atoms[atom] if "masked_atoms" in batch else None,
        copy_of=batch.copy_of[atom] if "copy_of" in batch else atom,
        frac_coords=(batch.frac_coords[atom] + place) / along,
        cell=batch.cell * times.unsqueeze(2),
        batch=crystal,
        ptr=ptr,
        num_nodes=len(atom),
        edge_index=torch.stack((neighbour, centre)),
        edge_shift=shift.to(batch.edge_shift.dtype),
        neighbor_ptr=neighbor_ptr,
        padding=batch.padding[edge] if "padding" in batch else None,
    )


def _ravel(place: Tensor, times: Tensor) -> Tensor:
    """Return the number of a copy from its place in the large cell: (., 3) to (.,)."""
    a, b, c = place.unbind(1)
    return (a * times[:, 1] + b) * times[:, 2] + c


def _unravel(number: Tensor, times: Tensor) -> Tensor:
    """Return the place of a copy from its number: (.,) to (., 3)."""
    _, b, c = times.unbind(1)
    return torch.stack((number // (b * c), number // c % b, number % c), dim=1)


# ------------------------------------------------------------ graphs found anew


def rebuild(
    batch: CrystalBatch,
    settings: GraphSettings,
    *,
    lonely: Literal["refuse", "keep"] = "refuse",
) -> CrystalBatch:
    """Find the neighbours again: the graph that a store of these settings would hold.

    A compiled loop (`crysdistill.graphs.search`) does this on the host. If the batch is
    on a device, the host waits for its coordinates and sends the edges back.
    Coordinates of batches are float32, but stores make graphs from float64. So if mode
    `nearest` cuts a shell, it may choose other neighbours than in a store.

    Args:
        batch: a batch with any graph; its old edges are ignored.
        settings: the settings of the new graph.
        lonely: whether to `refuse` an atom that has no neighbour within the cutoff, or
            to `keep` the old edges of its whole crystal.

    Raises:
        BadStructure: an atom has no neighbour and `lonely` refuses it; the text names
            the atom.
        InputError: the mode is `cgcnn`.
    """
    device = batch.ptr.device
    found = search(
        batch.frac_coords.double().cpu().numpy(),
        batch.cell.double().cpu().numpy(),
        batch.ptr.cpu().numpy(),
        settings,
    )
    neighbour, shift, counts = (torch.from_numpy(a).to(device) for a in found)
    neighbor_ptr = _starts(counts)
    edge_index = torch.stack((neighbour, _owners(neighbor_ptr)))
    alone = (counts == 0).nonzero().squeeze(1)
    if len(alone):
        if lonely == "refuse":
            raise BadStructure(_loneliness(batch, int(alone[0]), settings))
        keeps = torch.zeros(batch.num_graphs, dtype=torch.bool, device=device)
        keeps[batch.batch[alone]] = True
        edge_index, shift, neighbor_ptr = _mixed(batch, keeps, edge_index, shift)
    return replace(
        batch,
        edge_index=edge_index,
        edge_shift=shift,
        neighbor_ptr=neighbor_ptr,
        padding=None,
        padding_distance=settings.cutoff + 1.0,
    )


def _loneliness(batch: CrystalBatch, atom: int, settings: GraphSettings) -> str:
    """Return the message for an atom that has no neighbour."""
    crystal = int(batch.batch[atom])
    name = f"row {int(batch.rows[crystal])}"
    if "material_ids" in batch:
        name = batch.material_ids[crystal]
    return (
        f"{name}: no neighbour within {settings.cutoff} Å of atom "
        f"{atom - int(batch.ptr[crystal])}; increase `cutoff`"
    )


def _mixed(
    batch: CrystalBatch, keeps: Tensor, edge_index: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return new edges, or the old edges without fake ones if a crystal keeps them.

    Args:
        batch: the batch with the old edges.
        keeps: (B,) bool, whether a crystal keeps its old edges.
        edge_index: (2, E), the new edges.
        shift: (E, 3), of the new edges.
    """
    old = keeps[batch.batch[batch.edge_index[1]]]
    if "padding" in batch:
        old = old & ~batch.padding
    new = ~keeps[batch.batch[edge_index[1]]]
    edges = torch.cat((edge_index[:, new], batch.edge_index[:, old]), dim=1)
    shifts = torch.cat((shift[new], batch.edge_shift[old].to(shift.dtype)))
    order = edges[1].argsort(stable=True)
    counts = torch.bincount(edges[1], minlength=batch.num_nodes)
    return edges[:, order], shifts[order], _starts(counts)


# ------------------------------------------------------------------ runs of edges


def _starts(counts: Tensor) -> Tensor:
    """Return the start of each run, and the end of the last: (n,) to (n + 1,)."""
    return torch.cat((counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)))


def _owners(starts: Tensor) -> Tensor:
    """Return the run of each element: (n + 1,) to (elements,)."""
    runs = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(runs, starts.diff())
