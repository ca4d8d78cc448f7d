"""Gathering random crystals of a store into one batch, in one pass over memory.

PyTorch needs a dozen passes to unpack edges, each over an array as long as the edges.
A compiled loop reads each code once and runs at the speed of memory. On devices the
passes are cheap, and `store.py` makes them. Tests compare the two.
"""

from __future__ import annotations

import numpy as np

from crysdistill.machine_code import machine_code


@machine_code
def count(
    rows: np.ndarray, atom_offsets: np.ndarray, edge_offsets: np.ndarray
) -> tuple[int, int]:
    """Return the total numbers of atoms and edges of some crystals."""
    atoms, edges = 0, 0
    for row in rows:
        atoms += atom_offsets[row + 1] - atom_offsets[row]
        edges += edge_offsets[row + 1] - edge_offsets[row]
    return atoms, edges


@machine_code
def gather_atoms(
    rows: np.ndarray,
    atom_offsets: np.ndarray,
    atomic_numbers: np.ndarray,
    frac_coords: np.ndarray,
    neighbor_counts: np.ndarray,
    numbers_out: np.ndarray,
    frac_out: np.ndarray,
    batch_out: np.ndarray,
    ptr_out: np.ndarray,
    neighbor_ptr_out: np.ndarray,
) -> None:
    """Fill the arrays of a batch's N atoms.

    Args:
        rows: (B,) rows of the crystals.
        atom_offsets: (all + 1,) first atom of each crystal of the store.
        atomic_numbers: atomic numbers of all atoms.
        frac_coords: (all, 3).
        neighbor_counts: edges of each atom.
        numbers_out: (N,) int64.
        frac_out: (N, 3) float32.
        batch_out: (N,) int64, the crystal of each atom.
        ptr_out: (B + 1,) int64, the first atom of each crystal.
        neighbor_ptr_out: (N + 1,) int64, the first edge of each atom.
    """
    atom, edge = 0, 0
    ptr_out[0] = 0
    neighbor_ptr_out[0] = 0
    for crystal, row in enumerate(rows):
        for source in range(atom_offsets[row], atom_offsets[row + 1]):
            numbers_out[atom] = atomic_numbers[source]
            frac_out[atom, 0] = frac_coords[source, 0]
            frac_out[atom, 1] = frac_coords[source, 1]
            frac_out[atom, 2] = frac_coords[source, 2]
            batch_out[atom] = crystal
            edge += neighbor_counts[source]
            atom += 1
            neighbor_ptr_out[atom] = edge
        ptr_out[crystal + 1] = atom


@machine_code
def gather_edges(
    rows: np.ndarray,
    edge_offsets: np.ndarray,
    edge_codes: np.ndarray,
    shift_low: np.ndarray,
    shift_bits: np.ndarray,
    ptr: np.ndarray,
    neighbor_ptr: np.ndarray,
    edge_index_out: np.ndarray,
    shift_out: np.ndarray,
) -> None:
    """Unpack the E edges of a batch (`shards.pack_edges` packed them).

    Args:
        rows: (B,) rows of the crystals.
        edge_offsets: (all + 1,) first edge of each crystal of the store.
        edge_codes: codes of all edges; int16 codes are unsigned.
        shift_low: (all, 3) int8, the lowest translation of each crystal.
        shift_bits: (all, 3) uint8, the width of each field.
        ptr: (B + 1,) from `gather_atoms`.
        neighbor_ptr: (N + 1,) from `gather_atoms`.
        edge_index_out: (2, E) int64.
        shift_out: (E, 3) int8.
    """
    unsigned = (1 << (8 * edge_codes.itemsize)) - 1
    for crystal, row in enumerate(rows):
        a = np.int64(shift_bits[row, 0])
        b = np.int64(shift_bits[row, 1])
        c = np.int64(shift_bits[row, 2])
        mask_a, mask_b, mask_c = (1 << a) - 1, (1 << b) - 1, (1 << c) - 1
        low_a = np.int64(shift_low[row, 0])
        low_b = np.int64(shift_low[row, 1])
        low_c = np.int64(shift_low[row, 2])
        first = ptr[crystal]
        source = edge_offsets[row]
        for atom in range(first, ptr[crystal + 1]):
            for edge in range(neighbor_ptr[atom], neighbor_ptr[atom + 1]):
                code = np.int64(edge_codes[source]) & unsigned
                source += 1
                shift_out[edge, 2] = (code & mask_c) + low_c
                code >>= c
                shift_out[edge, 1] = (code & mask_b) + low_b
                code >>= b
                shift_out[edge, 0] = (code & mask_a) + low_a
                edge_index_out[0, edge] = (code >> a) + first
                edge_index_out[1, edge] = atom
