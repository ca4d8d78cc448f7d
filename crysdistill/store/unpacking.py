"""Unpacking the edges of a batch by tensor operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_edges(
    code: Tensor, low: Tensor, bits: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor]:
    """Undo `shards.pack_edges` for the edges of many crystals.

    Args:
        code: (E,), int16 (with the bits of unsigned integers) or int32.
        low: (B, 3) int8, the lowest translation of each crystal.
        bits: (B, 3) int32, the width of each field.
        edges: (B,) edges of each crystal.

    Returns:
        Neighbours (E,) int64 and translations (E, 3) int8.
    """
    wide = code.to(torch.int32)
    code = wide & 0xFFFF if code.dtype == torch.int16 else wide
    # One column at a time: operations on contiguous numbers are many times faster than
    # on the columns of a matrix.
    crystal = torch.arange(len(edges), device=code.device)
    crystal = torch.repeat_interleave(crystal, edges, output_size=len(code))  # (E,)
    masks = (1 << bits) - 1  # (B, 3)
    axes: list[Tensor] = []
    for axis in (2, 1, 0):
        field = code & masks[:, axis].index_select(0, crystal)
        lowest = low[:, axis].to(torch.int32).index_select(0, crystal)
        axes.insert(0, (field + lowest).to(torch.int8))  # (E,)
        code = code >> bits[:, axis].index_select(0, crystal)
    return code.long(), torch.stack(axes, dim=1)
