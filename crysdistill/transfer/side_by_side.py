"""Several encoders that read the same crystals, as one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import ClassVar

import torch
from torch import nn

from crysdistill.encoders import Blocks, Embeddings, Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch


class SideBySide(Encoder):
    """Embeddings of several encoders, one after the other in each vector.

    Encoders that learned different things make one vector of features, from which a
    readout takes what its property needs. It is made of encoders that exist, so it is
    no architecture that a configuration can name.

    An encoder with fewer convolutions repeats its last layer.

    Args:
        encoders: at least two; they become part of it.

    Raises:
        InputError: there are fewer than two encoders.
    """

    name: ClassVar[str] = "side_by_side"

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise InputError(
                f"`encoders` holds {len(encoders)} but must hold 2 or more"
            )
        self.encoders = nn.ModuleList(encoders)
        self.width = sum(one.width for one in encoders)
        self.crystal_width = sum(one.crystal_width for one in encoders)
        self.settings = {
            "encoders": [{"name": e.name, "settings": e.settings} for e in encoders]
        }

    @property
    def parts(self) -> list[Encoder]:
        """Its encoders, typed."""
        return [one for one in self.encoders if isinstance(one, Encoder)]

    def forward(self, batch: CrystalBatch, layers: bool = False) -> Embeddings:
        """Encode a batch; edges and state are left out."""
        found = [encoder(batch, layers) for encoder in self.parts]
        depth = max(len(one.layers) for one in found)
        padded = [
            one.layers + one.layers[-1:] * (depth - len(one.layers)) for one in found
        ]
        return Embeddings(
            atoms=torch.cat([one.atoms for one in found], dim=1),
            crystals=torch.cat([one.crystals for one in found], dim=1),
            layers=tuple(torch.cat(x, dim=1) for x in zip(*padded, strict=True)),
        )

    def blocks(self) -> Blocks:
        """Return the blocks of all encoders, those of the same depth together."""
        every = [encoder.blocks() for encoder in self.parts]
        steps = zip_longest(*(blocks.convolutions for blocks in every))
        pooling = [blocks.pooling for blocks in every if blocks.pooling is not None]
        return Blocks(
            nn.ModuleList([blocks.embedding for blocks in every]),
            [nn.ModuleList([one for one in step if one is not None]) for step in steps],
            nn.ModuleList(pooling) if pooling else None,
        )
