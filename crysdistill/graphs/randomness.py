"""Random numbers that belong to a crystal, to its atoms or to its bonds.

A number depends only on the seed, the stream, the crystal's row in the store, and the
atom's number in the crystal. So a crystal is masked and sampled alike in every batch,
at every place in it, and on every rank and device. A bond is identified by its atoms
and the lattice translation between them. It has the same number in every graph that
holds it, and in both directions.

Source: the mixing function is the finaliser of SplitMix64, G. L. Steele, D. Lea and
C. H. Flood, ACM SIGPLAN Not. 49(10), 453 (2014), doi:10.1145/2714064.2660195.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch

__all__ = [
    "per_atom_integers",
    "per_atom_normal",
    "per_atom_uniform",
    "per_bond_uniform",
    "per_crystal_uniform",
]

_WORD = 1 << 64


def _signed(word: int) -> int:
    """Return the int64 that has the bits of an unsigned 64-bit word."""
    word %= _WORD
    return word - _WORD if word >= _WORD >> 1 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right like an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Scramble int64; flipping one input bit flips half of the output bits."""
    # Products of int64 wrap around, which is the arithmetic modulo 2^64 that we want.
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def _crystal_words(rows: Tensor, seed: int, stream: str) -> Tensor:
    """Return 64 random bits for each crystal, (B,) int64."""
    # The stream keeps two uses of one seed apart (masks and sampled pairs, say).
    rows = rows.long()
    key = torch.full_like(rows, _signed(seed))
    key = _mix(key * _GAMMA + zlib.crc32(stream.encode()))
    return _mix(key ^ _mix((rows + 1) * _GAMMA))


def _words(batch: CrystalBatch, seed: int, stream: str) -> Tensor:
    """Return 64 random bits for each atom, (N,) int64."""
    crystal = _crystal_words(batch.rows, seed, stream)  # (B,)
    atoms = torch.arange(len(batch.batch), device=crystal.device)
    number = atoms - batch.ptr[batch.batch]  # (N,), from 0 in each crystal
    return _mix(crystal[batch.batch] + (number + 1) * _GAMMA)


def _several(words: Tensor, width: int) -> Tensor:
    """Return `width` words for each word, (..., width) int64."""
    number = torch.arange(1, width + 1, device=words.device)
    return _mix(words.unsqueeze(-1) + number * _GAMMA)


def per_atom_integers(batch: CrystalBatch, seed: int, stream: str) -> Tensor:
    """Return a random integer for each atom, (N,) int64, uniform in [0, 2^63).

    Args:
        batch: the batch of the atoms; only `rows`, `ptr` and `batch` are read.
        seed: the seed of the step or epoch; any integer.
        stream: the name of the use. Other uses of the same seed are independent.
    """
    return _shift_right(_words(batch, seed, stream), 1)


def per_atom_uniform(batch: CrystalBatch, seed: int, stream: str) -> Tensor:
    """Return a random number for each atom, (N,) float32, uniform in [0, 1).

    Args:
        batch: the batch of the atoms; only `rows`, `ptr` and `batch` are read.
        seed: the seed of the step or epoch; any integer.
        stream: the name of the use. Other uses of the same seed are independent.
    """
    return _uniform(_words(batch, seed, stream))


def per_atom_normal(batch: CrystalBatch, width: int, seed: int, stream: str) -> Tensor:
    """Return random numbers for each atom, (N, width) float32, standard normal.

    No number exceeds 5.8, beyond which one in 10^8 should lie. Devices may differ in
    the last bit.

    Source: G. E. P. Box and M. E. Muller, Ann. Math. Stat. 29, 610 (1958),
    doi:10.1214/aoms/1177706645.

    Args:
        batch: the batch of the atoms; only `rows`, `ptr` and `batch` are read.
        width: the count of numbers for each atom.
        seed: the seed of the step or epoch; any integer.
        stream: the name of the use. Other uses of the same seed are independent.
    """
    words = _several(_words(batch, seed, stream), 2 * width)  # (N, 2 width)
    length, turn = _uniform(words).chunk(2, dim=1)  # (N, width) each
    # 1 - u is never 0.
    return (-2 * torch.log1p(-length)).sqrt() * torch.cos(2 * math.pi * turn)


def per_bond_uniform(batch: CrystalBatch, seed: int, stream: str) -> Tensor:
    """Return the random number of each edge's bond, (E,) float32, uniform in [0, 1).

    An edge and its reverse have the same number, whatever else is in the graph. Fake
    edges of graph mode `cgcnn` also have numbers, which mean nothing.

    Args:
        batch: the batch of the bonds; its geometry is not read.
        seed: the seed of the step or epoch; any integer.
        stream: the name of the use. Other uses of the same seed are independent.
    """
    atoms = _words(batch, seed, stream)  # (N,)
    neighbour, centre = batch.edge_index
    a, b, c = batch.edge_shift.long().unbind(1)
    translation = (a << 32) + (b << 16) + c  # (E,); one number for each triple
    # Seen from the other end, the translation has the opposite sign.
    way = torch.sign(neighbour - centre)
    translation = torch.where(way == 0, translation.abs(), way * translation)
    ends = atoms[neighbour] + atoms[centre]
    return _uniform(_mix(ends ^ _mix((translation + 1) * _GAMMA)))


def per_crystal_uniform(rows: Tensor, width: int, seed: int, stream: str) -> Tensor:
    """Return random numbers for each crystal, (B, width) float32, uniform in [0, 1).

    Args:
        rows: (B,) the rows of the crystals in their store.
        width: the count of numbers for each crystal.
        seed: the seed of the step or epoch; any integer.
        stream: the name of the use. Other uses of the same seed are independent.
    """
    return _uniform(_several(_crystal_words(rows, seed, stream), width))


def _uniform(words: Tensor) -> Tensor:
    # float32 holds 24 bits without rounding up to 1.
    return _shift_right(words, 40).float() * 2.0**-24
