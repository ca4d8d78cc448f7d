"""Objective: bring crystals of one crystal system together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.contrastive import Contrast
from crysdistill.structures.symmetry import crystal_system

__all__ = ["CrystalSystem"]


class CrystalSystem(Contrast):
    """Contrast crystals: those of one crystal system are positives of each other.

    CrysGNN applies NT-Xent to the pooled embeddings themselves, with one term per
    positive pair. That pulls all cubic crystals to one point, whatever their elements,
    and gives a system with n crystals in the batch n^2 terms. The defaults insert a
    projection head (two Linear with ReLU), which absorbs this pull, and count every
    crystal once (SupCon).

    Numbers: `system_retrieval`, how often the nearest other validation crystal is of
    the same system. Distance is the cosine of crystal embeddings, taken before the
    head, as pretraining exports them. The chance level draws the other crystal at
    random.

    Sources: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892;
    see `nt_xent` and `supervised_contrastive`.

    Args:
        crystal_width: F', the width of crystal embeddings.
        loss: `supcon` or `nt-xent`.
        projection: whether there is a projection head.
        temperature: T, which divides cosines.
        mask_fraction: the chance that an atom's element is hidden from the encoder; 0,
            as in CrysGNN, hides none.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "crystal_system"
    number: ClassVar[str] = "system"
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "loss": "nt-xent",
        "projection": False,
        "mask_fraction": 0.0,
    }

    systems: Tensor

    def __init__(
        self,
        crystal_width: int,
        *,
        loss: Literal["supcon", "nt-xent"] = "supcon",
        projection: bool = True,
        temperature: float = 0.07,
        mask_fraction: float = 0.15,
    ) -> None:
        super().__init__(crystal_width, loss, projection, temperature, mask_fraction)
        systems = torch.from_numpy(crystal_system(np.arange(231)))
        self.register_buffer("systems", systems, persistent=False)  # (231,), -1 to 6

    def classes(self, batch: CrystalBatch) -> Tensor:
        """Return the crystal systems, (B,), 0 to 6; -1 where unknown."""
        return self.systems[batch.space_groups]
